# SPDX-License-Identifier: Apache-2.0
r"""
Log likelihoods of single observations, summed over enumerated latents that are theirs alone.

For LOO and WAIC the log likelihood of observation i at a posterior draw :math:`\theta` is

.. math:: \log p(y_i \mid \theta) = \log \sum_{z_i} p(z_i \mid \theta) \, p(y_i \mid z_i, \theta),

if the model sums :math:`z_i` out: at a drawn :math:`z_i` it would be that of a point which was
drawn because it fits :math:`y_i`. An enumerated latent belongs to an observed site if both sit in
the same plates, and nothing else reads it but latents that belong to that site too. Latents that
several observations share (the states of a chain, a latent outside of the observations' plate) are
not summed: the log likelihood is given their joint draws, as it is given all other latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pyro
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.runs import Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Structure
from pyro_mpis.programs.tensors import Mapped
from pyro_mpis.replicate import Replicate

Level = tuple[int, int]  # place among a site's own latents, number of values


@dataclass(frozen=True)
class Own:
    """The enumerated latents that belong to observed sites, and their supports."""

    latents: Mapping[str, tuple[str, ...]]  # of each observed site that has any
    supports: Mapping[str, Tensor]  # (values, *shape) of each latent

    @property
    def combinations(self) -> int:
        """The largest number of values that one site is to be evaluated at for each draw."""
        sizes = [1]
        for names in self.latents.values():
            size = 1
            for name in names:
                size *= len(self.supports[name])
            sizes.append(size)
        return max(sizes)


NOTHING = Own({}, {})


def own_latents(replicate: Replicate) -> Own:
    """Find the enumerated latents that belong to one observed site each, element by element."""
    structure = replicate.structure
    by_index = {
        name
        for site in (replicate.reads or {}).values()
        for plates in site.elements
        for name, index in structure.index_of.items()
        if index.plates == plates
    }
    observed = [name for name in structure.model if name not in structure.origins]
    found = {name: _own(structure, name) for name in observed}
    latents = {
        name: tuple(own) for name, own in found.items() if own and not by_index.intersection(own)
    }
    names = {name for own in latents.values() for name in own}
    return Own(latents, {name: replicate.particles.values[name] for name in names})


def _own(structure: Structure, name: str) -> list[str]:
    """Return the enumerated latents that belong to an observed site, in the model's order."""
    site = structure.model[name]
    if site.silent or any(site.batch_shape[dim] > 1 for dim in site.undeclared):
        return []  # or else several observations in one element of the plates
    own, pending = set[str](), set(site.reads)
    while pending:
        latent = pending.pop()
        index = structure.index_of.get(latent)
        if latent in own or index is None or not index.enumerated:
            continue
        if structure.model[latent].plates == site.plates == index.plates:
            own.add(latent)
            pending |= structure.model[latent].reads
    while True:
        shared = {
            latent
            for latent in own
            for reader, other in structure.model.items()
            if latent in other.reads and reader not in own | {name, latent}
        }
        if not shared:
            return [latent for latent in structure.origins if latent in own]
        own -= shared


def summed_log_probs(
    structure: Structure, programs: Programs, own: Own, draws: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    Return the log likelihoods of the observed sites that have latents of their own.

    :param draws: of all latent sites, ``(draws, *shape)``.
    :return: ``(draws or 1, *batch shape)``.
    """
    by_level: dict[Level, dict[str, Tensor]] = {}
    for names in own.latents.values():
        for place, name in enumerate(names):
            support = own.supports[name]
            by_level.setdefault((place, len(support)), {})[name] = support
    others = {name: draw for name, draw in draws.items() if name not in own.supports}
    levels = ([others] if others else []) + list(by_level.values())
    first = len(levels) - len(by_level)
    collect = dict.fromkeys((*own.latents, *own.supports), _log_prob)
    with pyro.validation_enabled(False):
        _, said = evaluate(
            programs,
            levels,
            model=Wanted(collect, frozenset(structure.model)),
            shapes=structure.latent_shapes,
        )
    result = {}
    for name, latents in own.latents.items():
        keys = [(place, len(own.supports[latent])) for place, latent in enumerate(latents)]
        wanted = [first + list(by_level).index(key) for key in keys]
        parts = [said[site]["log_prob"] for site in (name, *latents)]
        num_batch = max(len(part.shape) for part in parts)
        aligned = [_aligned(part, [0, *wanted] if first else wanted, num_batch) for part in parts]
        total = sum(aligned[1:], aligned[0].double())
        total = total.logsumexp(tuple(range(first, first + len(wanted))))
        total = total if first else total.unsqueeze(0)
        result[name] = total.to(parts[0].tensor.dtype)
    return result


def _log_prob(site: SampleMessage, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a density without its scale; a mask counts for latents alone."""
    log_prob = density_of(site["fn"], site["value"], validate=True)
    if not site["is_observed"]:
        log_prob = scale_and_mask(log_prob, mask=site["mask"])
    return {"log_prob": log_prob}


def _aligned(mapped: Mapped, levels: list[int], num_batch: int) -> Tensor:
    """Return ``(*levels, *batch)`` with size one for levels that a result does not read."""
    tensor, shape = mapped.along(*levels), mapped.shape  # own latents: their site alone reads them
    return tensor.reshape((*tensor.shape[: len(levels)], *(1,) * (num_batch - len(shape)), *shape))
