# SPDX-License-Identifier: Apache-2.0
r"""
Evaluate model and guide at all particles: a graph of small log factors.

A latent site's factor is :math:`\log f_i - \log K` of (20)-(22) of [1]: the model's ``log_prob``,
in the dims of the indices that it reads, and the proposal's density, in the dim of its own index.
An observed site has its ``log_prob`` alone. ``-log K`` of each index enters here and nowhere else.

Factors are **packed**: no dims of size one, a letter for each dim. An **ordinal** is the set of
plates that a factor, or an index, sits in.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis._typing import Ordinal, SampleMessage
from pyro_mpis.dependencies import Index, Site, Structure
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, SiteValue, exchange_dims
from pyro_mpis.handlers import Programs, check_same_sites, place, quoted, replay
from pyro_mpis.proposals import Particles, model_inputs


def build_graph(
    structure: Structure,
    particles: Particles,
    programs: Programs,
) -> FactorGraph:
    """
    Evaluate model and guide with every index in a dim of its own, and pack their log factors.

    :raises ValueError: if a log_prob is nan or infinite, or lacks a dim that it should have.
    """
    dims = {index.symbol: index.dim for index in structure.indices}
    enumerated = {index.sites[0]: index.dim for index in structure.indices if index.enumerated}
    random = {
        name: place(value, structure.index_of[name].dim, shared_dim=structure.shared_dim)
        for name, value in particles.values.items()
        if name in structure.index_of and name not in enumerated
    }
    guide_sites = _replay_guide(structure, particles, programs, random, enumerated)
    carried = {name: site.value for name, site in guide_sites.items()}
    values = model_inputs(structure, random, carried)
    model_sites = replay(
        programs,
        "model",
        values=values,
        enumerated=enumerated,
        num_samples=particles.num_samples,
    )
    check_same_sites("model", set(structure.model), set(model_sites))

    with pyro.validation_enabled(False):  # the tensors are large, and have been checked
        factors = _factors(structure, particles, guide_sites, model_sites)
    anything = factors[0].tensor if factors else torch.zeros(())
    return FactorGraph(
        factors=tuple(factors),
        sizes={**particles.sizes}
        | {symbol: plate.size for symbol, plate in structure.plates.items()},
        index_plates={index.symbol: index.plates for index in structure.indices},
        plate_dims={symbol: plate.dim for symbol, plate in structure.plates.items()},
        max_plate_nesting=structure.max_plate_nesting,
        values={
            name: _site_value(structure, name, model_sites[name], dims, particles.sizes)
            for name in structure.origins
            if _has_value(structure, name)
        },
        plate_names={symbol: plate.name for symbol, plate in structure.plates.items()},
        index_sites={index.symbol: index.sites for index in structure.indices},
        dtype=_result_type(factors),
        device=anything.device,
    )


def _factors(
    structure: Structure,
    particles: Particles,
    guide_sites: "Mapping[str, Carried]",
    model_sites: Mapping[str, SampleMessage],
) -> list[LogFactor]:
    """Evaluate and pack the densities of all sites."""
    packer = _Packer(structure, particles.sizes)

    factors = _proposal_factors(structure, particles, packer)
    for name, guide_site in guide_sites.items():
        log_density = -guide_site.log_density
        factors += packer.pack(f"{name} (guide)", log_density, structure.guide[name], strict=False)
    for name, site in model_sites.items():
        origin = structure.origins.get(name)
        if origin == "enumerated":
            factors.append(packer.zeros(structure.index_of[name], site["value"].device))
        if structure.model[name].silent or origin == "model_delta":
            continue
        log_prob = site["fn"].log_prob(site["value"])
        log_prob = scale_and_mask(log_prob, site["scale"], site["mask"])
        factors += packer.pack(name, log_prob, structure.model[name], strict=True)
        del log_prob
    return factors


@dataclass(frozen=True)
class Carried:
    """A site of the guide without particles of its own, in the dims of those that it reads."""

    value: Tensor
    log_density: Tensor


def _replay_guide(
    structure: Structure,
    particles: Particles,
    programs: Programs,
    random: Mapping[str, Tensor],
    enumerated: Mapping[str, int],
) -> dict[str, Carried]:
    """
    Run the guide with each index in its own dim, if any of its sites is computed from others.

    :param random: the values of the random sites, in the dims of their indices.
    :param enumerated: the dims of the sites to sum exactly.
    :return: the ``Delta`` sites that the model has, and the guide's ``pyro.factor`` statements.
    """
    names = [*structure.guide_factors, *_carried(structure)]
    if not names:
        return {}
    values = {name: value for name, value in random.items() if name in structure.guide}

    def run(values: Mapping[str, Tensor]) -> dict[str, SampleMessage]:
        return replay(
            programs,
            "guide",
            values=values,
            enumerated=enumerated,
            num_samples=particles.num_samples,
        )

    try:
        sites = run(values)
    except ValueError as error:
        try:  # a guide that wants one batch shape for all of its sites, as AutoStructured does
            sites = run(_expanded(structure, particles, values, names))
        except ValueError:
            raise error from None
    return {
        name: Carried(
            _only_read(structure, name, sites[name]["value"], structure.guide[name].event_dim),
            _only_read(structure, name, log_density(sites[name]), 0),
        )
        for name in names
    }


def log_density(site: SampleMessage) -> Tensor:
    """Return the density that a site of the guide is drawn from: masked, not scaled."""
    log_prob = site["fn"].log_prob(site["value"])
    result: Tensor = scale_and_mask(log_prob, mask=site["mask"])
    return result


def _expanded(
    structure: Structure,
    particles: Particles,
    values: Mapping[str, Tensor],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Expand values to the dims of all indices that any site reads together with theirs."""
    together = {index.symbol: {index.symbol} for index in structure.indices}
    for name in names:
        union = set().union(*(together[s] for s in structure.reads(structure.guide[name])))
        for symbol in union:
            together[symbol] = union
    result = {}
    for name, value in values.items():
        symbols = together[structure.index_of[name].symbol]
        sizes = {structure.by_symbol[s].dim: particles.sizes[s] for s in symbols}
        event_dim = structure.guide[name].event_dim
        missing = -min(sizes) + event_dim - value.dim()
        shape = list((1,) * missing + value.shape)
        for dim, size in sizes.items():
            shape[dim - event_dim] = size
        result[name] = value.expand(shape)
    return result


def _only_read(structure: Structure, name: str, tensor: Tensor, event_dim: int) -> Tensor:
    """Drop the particles of indices that a site does not read, along which it is constant."""
    reads = structure.reads(structure.guide[name])
    dims = {index.dim for index in structure.indices if index.symbol in reads}
    for index in structure.indices:
        position = index.dim - event_dim
        if index.dim not in dims and -position <= tensor.dim():
            tensor = tensor.narrow(position, 0, 1)
    return tensor


def _carried(structure: Structure) -> list[str]:
    return [name for name, origin in structure.origins.items() if origin == "guide_delta"]


def _proposal_factors(
    structure: Structure, particles: Particles, packer: "_Packer"
) -> list[LogFactor]:
    """Return ``-log Q - log K`` of every index: the only place where K enters."""
    log_k = math.log(particles.num_samples)
    factors = []
    for index in structure.indices:
        if index.enumerated:
            continue
        log_proposal = particles.log_proposals[index.symbol]
        tensor = place(-log_proposal - log_k, index.dim, shared_dim=structure.shared_dim)
        name = " and ".join(index.sites) + " (proposal)"
        factors += packer.pack_index(name, tensor, index)
    return factors


def _has_value(structure: Structure, name: str) -> bool:
    """Whether queries can be asked of a site: not of a model's Delta that reads another plate."""
    site = structure.model[name]
    inside = (structure.by_symbol[symbol].plates for symbol in structure.reads(site))
    return structure.origins[name] != "model_delta" or all(p <= site.plates for p in inside)


def _site_value(
    structure: Structure,
    name: str,
    site: SampleMessage,
    dims: Mapping[str, int],
    sizes: Mapping[str, int],
) -> SiteValue:
    """Bring a value's particle dims to the front, in the order of their indices."""
    reads = structure.reads(structure.model[name])
    if structure.origins[name] == "guide_delta":
        reads = structure.reads(structure.guide[name])
    elif structure.origins[name] != "model_delta":
        reads = frozenset({structure.index_of[name].symbol})
    indices = "".join(sorted(reads, key=lambda symbol: -dims[symbol]))
    own = structure.model[name]
    num_dims = structure.max_plate_nesting + own.event_dim
    value = site["value"].detach()  # a guide's Delta may be a parameter itself
    if value.dim() < num_dims:
        value = value.reshape((1,) * (num_dims - value.dim()) + value.shape)
    left = value.dim() - num_dims
    wanted = [left - 1 + (dims[symbol] - structure.shared_dim) for symbol in indices]
    if wanted and min(wanted) < 0:
        grow = -min(wanted)
        value = value.reshape((1,) * grow + value.shape)
        left, wanted = left + grow, [position + grow for position in wanted]
    rest = [position for position in range(left) if position not in wanted]
    middle = left + structure.max_plate_nesting
    sizes_now = [value.shape[middle + dim] for dim in own.undeclared]
    undeclared = [own.batch_shape[dim] for dim in own.undeclared]
    if any(value.shape[position] != 1 for position in rest) or any(
        now not in (1, size) for now, size in zip(sizes_now, undeclared, strict=True)
    ):
        raise ValueError(
            f"site '{name}': its value has more particles' dims than the sites it was computed "
            "from. Compute it from the values of sites only, without writing in place."
        )
    value = value.permute((*wanted, *rest, *range(left, value.dim())))
    value = value.reshape(value.shape[: len(wanted)] + value.shape[left:])
    middle = len(indices) + structure.max_plate_nesting
    value = value.reshape(value.shape[:middle] + (1,) * len(undeclared) + value.shape[middle:])
    value = exchange_dims(value, middle, own.undeclared)
    batch = value.shape[len(indices) : middle]
    event = value.shape[middle + len(undeclared) :]
    value = value.expand((*(sizes[symbol] for symbol in indices), *batch, *undeclared, *event))
    batch_shape = list(own.batch_shape)
    for dim in own.undeclared:
        batch_shape[dim] = 1
    return SiteValue(
        value,
        indices,
        own.event_dim + len(undeclared),
        torch.Size(batch_shape),
        own.plates,
        own.undeclared,
    )


def _result_type(factors: Sequence[LogFactor]) -> torch.dtype:
    result = torch.get_default_dtype() if not factors else factors[0].tensor.dtype
    for factor in factors:
        result = torch.promote_types(result, factor.tensor.dtype)
    return result


class _Packer:
    """Turns tensors with batch dims into packed factors, and checks what dims they have."""

    def __init__(self, structure: Structure, sizes: Mapping[str, int]) -> None:
        self.structure = structure
        self.sizes = sizes

    def pack_index(self, name: str, tensor: Tensor, index: Index) -> list[LogFactor]:
        """Pack a tensor with the dims of an index and its plates."""
        _check_finite(name, tensor)
        return self._pack(name, tensor, {index.symbol}, index.plates, True)

    def zeros(self, index: Index, device: torch.device) -> LogFactor:
        """Return log 1 in the dims of an enumerated index, to say which plates it sits in."""
        dims = "".join(s for s in (index.symbol, *sorted(index.plates)) if self.size(s) > 1)
        tensor = torch.zeros([self.size(symbol) for symbol in dims], device=device)
        return LogFactor(f"{index.sites[0]} (support)", tensor, dims, index.plates)

    def pack(self, name: str, tensor: Tensor, site: Site, *, strict: bool) -> list[LogFactor]:
        """Pack the log_prob of a site, summed over its undeclared dims."""
        _check_finite(name, tensor)
        for dim in self.structure.summed_dims(site):
            if -dim <= tensor.dim() and tensor.shape[dim] == site.batch_shape[dim]:
                tensor = tensor.sum(dim, keepdim=True, dtype=torch.double).to(tensor.dtype)
        return self._pack(name, tensor, self.structure.reads(site), site.factor_plates, strict)

    def _pack(
        self, name: str, tensor: Tensor, reads: Collection[str], plates: Ordinal, strict: bool
    ) -> list[LogFactor]:
        structure = self.structure
        if tensor.dtype.itemsize < torch.float32.itemsize:  # too coarse to add up log_probs
            tensor = tensor.float()
        letters = {structure.plates[symbol].dim: symbol for symbol in plates}
        visible = (
            structure.indices if structure.unique_dims else map(structure.by_symbol.get, reads)
        )
        letters |= {index.dim: index.symbol for index in visible if index is not None}
        dims = ""
        for position, size in enumerate(tensor.shape, start=-tensor.dim()):
            if size == 1:
                continue
            symbol = letters.get(position)
            if symbol is None or size != self.size(symbol):
                raise ValueError(
                    f"site '{name}': with particles, log_prob has shape {tuple(tensor.shape)}; dim "
                    f"{position} of size {size} is neither a dim that the site has without them "
                    "nor the particles of a latent that it reads. Enclose the site in a "
                    "pyro.plate or use .to_event; read a vector by index with "
                    "pyro.ops.indexing.Vindex(x)[..., index], and along a plate of size n with "
                    "Vindex(x)[..., torch.arange(n)]; keep batch dims when reshaping or writing in "
                    "place."
                )
            dims += symbol
        missing = {s for s in reads if self.size(s) > 1 and s not in dims}
        if strict and missing:
            sites = quoted({site for s in missing for site in structure.by_symbol[s].sites})
            raise ValueError(
                f"site '{name}': it was computed from {sites}, yet its log_prob is the same for "
                "all particles of them. Particles are in batch dims left of the plates: index from "
                "the right (x[..., 0], not x[0]), do not reduce over all dims, and make constants "
                "by torch.zeros, not by x.new_zeros."
            )
        tensor = tensor.reshape([size for size in tensor.shape if size != 1])
        for symbol in sorted(plates - set(dims)):  # a plate that the log_prob did not expand to
            tensor = tensor.unsqueeze(-1).expand((*tensor.shape, self.size(symbol)))
            dims += symbol
        return [LogFactor(name, tensor, dims, plates)]

    def size(self, symbol: str) -> int:
        plates = self.structure.plates
        return plates[symbol].size if symbol in plates else self.sizes[symbol]


def _check_finite(name: str, tensor: Tensor) -> None:
    """Refuse nan and +inf; -inf means impossible."""
    highest = tensor.max() if tensor.numel() else tensor.new_zeros(())
    if bool(torch.isnan(highest)):
        count = int(tensor.isnan().sum())
        raise ValueError(
            f"site '{name}': log_prob is nan at {count} of {tensor.numel()} combinations of "
            "particles and plate elements. Check the distribution's arguments for values that "
            "the latents can take (0/0, log or sqrt of a negative number), and the data for nan."
        )
    if bool(highest == math.inf):
        raise ValueError(
            f"site '{name}': log_prob is +inf, an infinite density, for some particle. Check "
            "scales of zero, and values at the edge of a distribution's support."
        )
