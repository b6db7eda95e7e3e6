# SPDX-License-Identifier: Apache-2.0
"""
Draw the particles of every random site, by one mapped run of guide and model.

Draw j of a site is made given draw j of all that it reads. Where indices have different numbers of
particles, as many draws are made of each as the largest has, and K of them are its particles. Draws
that are no particles serve in mixtures only: see :attr:`Structure.num_draws`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyro
import torch
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.mapped import log_prob_of
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import drawn_from
from pyro_mpis.programs.not_mappable import OtherSitesError
from pyro_mpis.programs.runs import Collect, Programs, Wanted, draw
from pyro_mpis.programs.stratified import Strata
from pyro_mpis.programs.structure import Site, Structure
from pyro_mpis.programs.tensors import Mapped, Said, is_mapped, tensors_of


@dataclass(frozen=True)
class Draw:
    """The draws of one random site."""

    value: Tensor  # (draws, *shape), the shape of an ordinary run
    log_prob: Tensor  # (draws, *batch shape): the density that each was drawn with
    reads_particles: bool  # whether the proposal differs between particles
    support: Tensor | None = None  # (values, *shape), of a site that is to be summed over it


@dataclass(frozen=True)
class Drawn:
    """Draws of every random site, and which are particles, before they are weighed."""

    draws: Mapping[str, Draw]
    kept: Mapping[str, Tensor]  # symbol -> (K, *plates), the draws that are its particles, if not
    # the first K
    carried: Said = field(default_factory=dict)  # value and density of sites that the guide carries

    def particles(self, structure: Structure, name: str) -> Draw:
        """Return the particles of a site alone."""
        draw, index = self.draws[name], structure.index_of[name]
        value, log_prob = draw.value, draw.log_prob
        if index.symbol not in self.kept:
            part = slice(index.num_samples)
            return replace(draw, value=value[part], log_prob=log_prob[part])
        kept = _of_batch(self.kept[index.symbol], log_prob.dim() - 1)
        events = (1,) * (value.dim() - log_prob.dim())
        return replace(
            draw,
            value=_taken(value, kept.reshape((*kept.shape, *events))),
            log_prob=_taken(log_prob, kept),
        )

    def chosen_anew(self, structure: Structure) -> "Drawn":
        """Return the same draws with the particles that another structure asks for."""
        return replace(self, kept=_chosen(structure))


def draw_particles(
    structure: Structure,
    programs: Programs,
    *,
    stratified: bool,
    carried: Mapping[str, Collect] = {},
) -> Drawn:
    """
    Draw the particles of every random site; draws random numbers.

    :param stratified: whether to spread the particles of a site evenly over its proposal.
    :param carried: what to keep of sites that the guide carries, each particle from the same one of
        all sites that it reads.
    :raises NotMappableError: if torch cannot map the programs.
    """
    num_samples = max(structure.num_draws.values(), default=1)
    kept = _chosen(structure)
    strata = {
        name: _strata(structure, name, num_samples, kept) if stratified else Strata(num_samples, 0)
        for name in {*structure.guide, *structure.origins}
    }
    from_guide = _from_guide(structure)
    supports: dict[str, Tensor | None] = {}
    with pyro.validation_enabled(False):
        said_by_guide, said_by_model = draw(
            programs,
            num_samples,
            strata=strata,
            guide=Wanted(
                {name: _collecting(structure.guide[name], supports) for name in from_guide}
                | dict(carried),
                frozenset(structure.guide),
            ),
            model=Wanted(
                {
                    name: _collecting(structure.model[name], supports)
                    for name, origin in structure.origins.items()
                    if origin == "prior" or (origin == "enumerated" and name not in from_guide)
                }
            ),
            shapes=structure.latent_shapes,
        )
    of_carried = {name: said_by_guide.pop(name) for name in carried}
    draws = {}
    for name, said in (said_by_guide | said_by_model).items():
        site = structure.guide[name] if name in said_by_guide else structure.model[name]
        draws[name] = Draw(
            value=_of_particles(said["value"], site.shape, num_samples),
            log_prob=_of_particles(said["log_prob"], site.batch_shape, num_samples),
            reads_particles="reads" in said,
            support=supports[name],
        )
    return Drawn(draws, kept, of_carried)


def _chosen(structure: Structure) -> dict[str, Tensor]:
    """
    Choose which draws are kept, at random, of indices that have more draws than particles.

    The proposal of a particle, averaged over the choice, is then the mixture over all draws. The
    choice is another in each plate element: given what they are proposed from, elements must be
    independent, since the evidence is a product over them.

    :return: numbers of draws by symbol, ``(K, *plates)``.
    """
    result = {}
    for index in structure.indices:
        number = structure.num_draws[index.symbol]
        if number > index.num_samples:
            shape = [1] * structure.max_plate_nesting
            for symbol in index.plates:
                shape[structure.plates[symbol].dim] = structure.plates[symbol].size
            order = torch.rand((number, *shape)).argsort(0)
            result[index.symbol] = order[: index.num_samples]
    return result


def _strata(
    structure: Structure, name: str, num_samples: int, kept: Mapping[str, Tensor]
) -> Strata:
    """Return which draws of a site are its particles, and are to be spread evenly."""
    index = structure.index_of.get(name)
    if index is None:
        return Strata(num_samples, num_samples)
    if index.symbol not in kept:
        return Strata(num_samples, index.num_samples)
    dims = len(structure.proposal_site(name).batch_shape)
    return Strata(num_samples, index.num_samples, _of_batch(kept[index.symbol], dims))


def _of_batch(kept: Tensor, dims: int) -> Tensor:
    """Return numbers of draws in the batch dims of a site: ``(K, *dims)``."""
    return kept.reshape((len(kept), *kept.shape[kept.dim() - dims :]))


def _taken(draws: Tensor, numbers: Tensor) -> Tensor:
    """Take another draw for each element: ``(K, *shape)``."""
    shape = (len(numbers), *draws.shape[1:])
    return draws.gather(0, numbers.to(draws.device).expand(shape))


def _from_guide(structure: Structure) -> list[str]:
    """Return the random sites that the guide draws, those without an index of their own too."""
    return [
        name
        for name in structure.guide
        if name not in structure.guide_factors
        and name not in structure.carried
        and (name in structure.origins or name not in structure.model)
    ]


def _collecting(site: Site, supports: dict[str, Tensor | None]) -> Collect:
    """Return what to keep of a site: value, density, and ``reads`` if its proposal reads sites."""

    def collect(message: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fn, value = unmasked(message["fn"]), message["value"]
        if value.shape != site.shape:
            raise OtherSitesError(
                f"site '{site.name}' has shape {tuple(value.shape)}, and {tuple(site.shape)} in "
                "another run"
            )
        supports[site.name] = support_of(site, message)
        result = {"value": value, "log_prob": drawn_from(message, log_prob_of(fn, value))}
        if not isinstance(fn, torch.distributions.Distribution) or any(
            map(is_mapped, tensors_of(fn))
        ):
            result["reads"] = value.new_zeros(())
        return result

    return collect


def _of_particles(mapped: Mapped, shape: torch.Size, num_samples: int) -> Tensor:
    """Return ``(K, *shape)``."""
    tensor = mapped.along(0)
    missing = len(shape) - (tensor.dim() - 1)
    tensor = tensor.reshape((len(tensor), *(1,) * missing, *tensor.shape[1:]))
    return tensor.expand((num_samples, *shape))


def support_of(site: Site, message: SampleMessage) -> Tensor | None:
    """Return all values that a site can take, one of each for all plate elements."""
    fn = message["fn"]
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, RuntimeError):  # as of a Binomial of several totals
        return None
    if is_mapped(support):
        return None
    ones = (1,) * len(site.batch_shape)
    event = site.shape[len(ones) :]
    return support.reshape((len(support), *ones, *event)).expand((len(support), *site.shape))
