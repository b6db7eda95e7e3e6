# SPDX-License-Identifier: Apache-2.0
r"""
Evaluate model and guide at all particles: a graph of small log factors.

A latent site's factor is :math:`\log f_i - \log K` of (20)-(22) of [1]: the model's ``log_prob``,
in the dims of the indices that it reads, and the proposal's density, in the dim of its own index.
An observed site has its ``log_prob`` alone. ``-log K`` of each index enters here and nowhere else.

The densities come from one mapped run (:mod:`~pyro_mpis.particles.evaluation`), so that each has
dims of exactly those indices that it was computed from.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, SiteValue, exchange_dims
from pyro_mpis.particles.evaluation import Evaluated
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.programs.structure import Index, Site, Structure
from pyro_mpis.programs.tensors import Mapped, device_of

Part = TypeVar("Part", LogFactor, SiteValue)
SMALL = 2**10  # entries of factors that are looked at in one tensor
PRECISE = torch.float32.itemsize  # numbers of fewer bytes are too coarse to add up log_probs


def build_graph(
    structure: Structure, particles: Particles, evaluated: Evaluated, *, for_sum: bool = False
) -> FactorGraph:
    """
    Pack what model and guide said at all particles into log factors.

    :param for_sum: whether only the sum is asked for, not the sites' values, and whoever asks looks
        whether it is finite. Then factors are not looked at here.
    :raises ValueError: if a log_prob is nan at a combination that no other factor rules out, or
        infinite.
    :raises MissedReadError: if a site reads more than the structure says.
    """
    packer = Packer(structure, particles.sizes, evaluated)
    factors = _factors(structure, particles, evaluated, packer)
    if not for_sum:
        factors = without_ruled_out(factors, structure)
    values = {
        name: packer.value(structure.model[name], evaluated.model[name]["value"])
        for name in structure.origins
        if not for_sum and _has_value(structure, name)
    }
    graph = graph_of(structure, factors, particles.sizes, values)
    scales = {s: plate.scale for s, plate in structure.plates.items() if plate.scale != 1}
    return replace(graph, plate_scales=scales)


def graph_of(
    structure: Structure,
    factors: Sequence[LogFactor],
    sizes: Mapping[str, int],
    values: Mapping[str, SiteValue],
) -> FactorGraph:
    """
    Put factors together with what the structure says of indices and plates.

    :param sizes: of the indices.
    """
    plates = structure.plates
    device = device_of(factor.tensor for factor in factors)
    return FactorGraph(
        factors=tuple(_on(device, factor) for factor in factors),
        sizes={**sizes, **{symbol: plate.size for symbol, plate in plates.items()}},
        index_plates={index.symbol: index.plates for index in structure.indices},
        plate_dims={symbol: plate.dim for symbol, plate in plates.items()},
        max_plate_nesting=structure.max_plate_nesting,
        values={name: _on(device, value) for name, value in values.items()},
        plate_names={symbol: plate.name for symbol, plate in plates.items()},
        index_sites={index.symbol: index.sites for index in structure.indices},
        dtype=_result_type(factors),
        device=device,
    )


def _on(device: torch.device, part: Part) -> Part:
    """Move a factor or values to a device, if they are not there."""
    return part if part.tensor.device == device else replace(part, tensor=part.tensor.to(device))


def _factors(
    structure: Structure,
    particles: Particles,
    evaluated: Evaluated,
    packer: "Packer",
) -> list[LogFactor]:
    """Pack the densities of all sites."""
    factors = _proposal_factors(structure, particles, packer)
    for name, said in evaluated.guide.items():
        site = structure.guide[name]
        log_prob = said["log_prob"]
        density = Mapped(-log_prob.tensor, log_prob.levels)
        factors.append(packer.pack(f"{name} (guide)", density, site))
    for name, said in evaluated.model.items():
        if structure.origins.get(name) == "enumerated":
            index = structure.index_of.get(name)
            if index is not None and index.enumerated:
                factors.append(packer.zeros(index, said["value"].tensor.device))
        if "log_prob" in said:
            factors.append(packer.pack(name, said["log_prob"], structure.model[name]))
    return factors


def _proposal_factors(
    structure: Structure, particles: Particles, packer: "Packer"
) -> list[LogFactor]:
    """Return ``-log Q - log K`` of every index, (14) and (18): the only place where K enters."""
    factors = []
    for index in structure.indices:
        if not index.enumerated:
            name = _name_of_proposal(index)
            log_k = math.log(particles.num_samples[index.symbol])
            tensor = -particles.log_proposals[index.symbol] - log_k
            factors.append(packer.pack_index(name, tensor, index))
    return factors


def _name_of_proposal(index: Index) -> str:
    return " and ".join(index.sites) + " (proposal)"


def _has_value(structure: Structure, name: str) -> bool:
    """Whether queries can be asked of a site: not of a model's Delta that reads another plate."""
    site = structure.model[name]
    inside = (structure.by_symbol[symbol].plates for symbol in structure.indices_read(site))
    return structure.origins[name] != "model_delta" or all(p <= site.plates for p in inside)


def _result_type(factors: Sequence[LogFactor]) -> torch.dtype:
    result = torch.get_default_dtype() if not factors else factors[0].tensor.dtype
    for factor in factors:
        result = torch.promote_types(result, factor.tensor.dtype)
    return result


@dataclass(frozen=True)
class Packer:
    """Turns results of mapped runs into packed factors and values."""

    structure: Structure
    sizes: Mapping[str, int]
    evaluated: Evaluated

    def pack(self, name: str, log_prob: Mapped, site: Site) -> LogFactor:
        """Pack the log_prob of a site, summed over its undeclared dims."""
        lead = self.evaluated.symbols(name, log_prob, self.structure.indices_read(site))
        batch = log_prob.tensor.shape[len(lead) :]
        tensor = log_prob.tensor
        for dim in self.structure.summed_dims(site):  # of the guide's sites
            if -dim <= len(batch) and tensor.shape[dim] > 1:
                tensor = tensor.sum(dim, keepdim=True, dtype=torch.double).to(tensor.dtype)
        return self._pack(name, tensor, lead, site.factor_plates)

    def pack_index(self, name: str, tensor: Tensor, index: Index) -> LogFactor:
        """Pack ``(K, *plates)`` of an index."""
        return self._pack(name, tensor, index.symbol, index.plates)

    def zeros(self, index: Index, device: torch.device) -> LogFactor:
        """Return log 1 in the dims of an enumerated index, to say which plates it sits in."""
        dims = "".join(s for s in (index.symbol, *sorted(index.plates)) if self.size(s) > 1)
        tensor = torch.zeros([self.size(symbol) for symbol in dims], device=device)
        return LogFactor(f"{index.sites[0]} (support)", tensor, dims, index.plates)

    def _pack(self, name: str, tensor: Tensor, lead: str, plates: Ordinal) -> LogFactor:
        """Name the dims of ``(*lead, *batch dims)``, drop those of size one, expand to plates."""
        if tensor.dtype.itemsize < PRECISE:
            tensor = tensor.float()
        letters = {self.structure.plates[symbol].dim: symbol for symbol in plates}
        dims, shape = "", []
        for position, size in enumerate(tensor.shape):
            if size == 1:
                continue
            batch = position >= len(lead)
            symbol = letters.get(position - tensor.dim()) if batch else lead[position]
            if symbol is None or size != self.size(symbol):
                raise ValueError(
                    f"site '{name}': log_prob has shape {tuple(tensor.shape[len(lead) :])}; dim "
                    f"{position - tensor.dim()} of size {size} is not one that the site had in its "
                    "first run. A site must have the same shape in every run."
                )
            dims += symbol
            shape.append(size)
        tensor = tensor.reshape(shape)
        for symbol in sorted(plates - set(dims)):  # a plate that the log_prob did not expand to
            tensor = tensor.unsqueeze(-1).expand((*tensor.shape, self.size(symbol)))
            dims += symbol
        return LogFactor(name, tensor, dims, plates)

    def value(self, site: Site, value: Mapped) -> SiteValue:
        """Bring a latent's values to ``(*indices, *plates, *undeclared, *event)``."""
        structure = self.structure
        expected = structure.indices_read(site)
        if structure.origins[site.name] == "guide_delta":
            expected |= structure.indices_read(structure.guide[site.name])
        lead = self.evaluated.symbols(site.name, value, expected)
        tensor = value.tensor.detach()  # a guide's Delta may be a parameter itself
        return site_value(structure, site, tensor, lead)

    def size(self, symbol: str) -> int:
        """Return the size of an index or a plate."""
        plates = self.structure.plates
        return plates[symbol].size if symbol in plates else self.sizes[symbol]


def site_value(structure: Structure, site: Site, tensor: Tensor, lead: str) -> SiteValue:
    """
    Bring a latent's values to the layout that queries read.

    :param tensor: ``(*lead, *shape)``.
    :param lead: the indices of its first dims.
    """
    shape = tensor.shape[len(lead) :]
    shape = torch.Size((*(1,) * (len(site.shape) - len(shape)), *shape))
    batch, event = shape[: len(site.batch_shape)], shape[len(site.batch_shape) :]
    missing = structure.max_plate_nesting - len(batch)
    sizes = [site.batch_shape[dim] for dim in site.undeclared]
    tensor = tensor.reshape(
        (*tensor.shape[: len(lead)], *(1,) * missing, *batch, *(1,) * len(sizes), *event)
    )
    middle = len(lead) + structure.max_plate_nesting
    tensor = exchange_dims(tensor, middle, site.undeclared)
    tensor = tensor.expand((*tensor.shape[:middle], *sizes, *event))
    batch_shape = list(site.batch_shape)
    for dim in site.undeclared:
        batch_shape[dim] = 1
    return SiteValue(
        tensor,
        lead,
        site.event_dim + len(sizes),
        torch.Size(batch_shape),
        site.plates,
        site.undeclared,
    )


def without_ruled_out(factors: Sequence[LogFactor], structure: Structure) -> list[LogFactor]:
    """
    Refuse nan and +inf, but for combinations that another factor makes impossible.

    There nan becomes -inf: as where a Binomial has fewer trials left than none, since more were
    drawn than there are.

    :raises ValueError: names the site.
    """
    result = []
    wrong_ones = _with_wrong_entries(factors)
    for number, factor in enumerate(factors):
        tensor = factor.tensor
        if number in wrong_ones:
            wrong = tensor.isnan()
            for other in factors:
                if other is not factor and bool(wrong.any()):
                    wrong = wrong & ~_ruled_out(factor, other, structure)
            _refuse(factor.name, tensor, wrong)
            factor = replace(factor, tensor=tensor.masked_fill(tensor.isnan(), -math.inf))
        result.append(factor)
    return result


def _with_wrong_entries(factors: Sequence[LogFactor]) -> set[int]:
    """Return the numbers of the factors that have nan or +inf; looks at small ones together."""
    together: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    alone = []
    for number, factor in enumerate(factors):
        tensor = factor.tensor
        if tensor.numel() < SMALL:
            together.setdefault((tensor.dtype, tensor.device), []).append(number)
        else:
            alone.append(number)
    for numbers in together.values():
        if not _all_below_infinity(torch.cat([factors[n].tensor.reshape(-1) for n in numbers])):
            alone += numbers
    return {number for number in alone if not _all_below_infinity(factors[number].tensor)}


def _all_below_infinity(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or bool(tensor.max() < math.inf)


def _ruled_out(factor: LogFactor, other: LogFactor, structure: Structure) -> Tensor:
    """
    Return where another factor is zero, in the dims of a factor.

    The proposal of a site is zero where its prior had invalid arguments. Where all are, it is no
    reason for them: whether another factor is one is asked of the prior's density.
    """
    zero = other.tensor == -math.inf
    dims = other.dims
    for symbol, index in structure.by_symbol.items():
        if factor.name in index.sites and other.name == _name_of_proposal(index):
            everywhere = zero.all(dims.index(symbol), keepdim=True) if symbol in dims else zero
            zero = zero & ~everywhere
    for symbol in other.dims:  # all particles of an index, then any element of a plate
        if symbol not in factor.dims and symbol in structure.by_symbol:
            zero, dims = zero.all(dims.index(symbol)), dims.replace(symbol, "")
    for symbol in other.dims:
        if symbol not in factor.dims and symbol not in structure.by_symbol:
            zero, dims = zero.any(dims.index(symbol)), dims.replace(symbol, "")
    zero = zero.permute([dims.index(symbol) for symbol in factor.dims if symbol in dims])
    for position, symbol in enumerate(factor.dims):
        if symbol not in dims:
            zero = zero.unsqueeze(position)
    return zero


def _refuse(name: str, tensor: Tensor, wrong: Tensor) -> None:
    """Refuse nan where nothing rules it out, and +inf."""
    if bool(wrong.any()):
        raise ValueError(
            f"site '{name}': log_prob is nan at {int(wrong.sum())} of {tensor.numel()} "
            "combinations of particles and plate elements. Check the distribution's arguments for "
            "values that the latents can take (a negative scale, 0/0, log or sqrt of a negative "
            "number), and the data for nan."
        )
    if bool((tensor == math.inf).any()):
        raise ValueError(
            f"site '{name}': log_prob is +inf, an infinite density, for some particle. Check "
            "scales of zero, and values at the edge of a distribution's support."
        )
