# SPDX-License-Identifier: Apache-2.0
r"""
Draw the particles and weigh each with its deterministic-mixture density.

A site drawn from a proposal that reads other sites, :math:`z_i^k \sim q(\cdot\mid z_{pa}^k)`, is
weighted by the mixture over its parents' particles,

.. math:: Q_i(z) = K^{-1} \sum_j q(z \mid z_{pa}^j),

all parents at the same particle :math:`j`. Given the parents' particles, a sum over the child's
particles of :math:`h(z_i^k) / Q_i(z_i^k)` has the expectation :math:`K \int h`, so that (18) of
[1] is exactly unbiased whatever the number of parents and whichever plates they sit in. Dividing by
:math:`q(z_i^{k} \mid z_{pa}^{k'})` for another :math:`k'` instead is biased.

The members of a group share :math:`k`; their joint density is mixed over parents outside the group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis._typing import Distribution
from pyro_mpis.dependencies import Index, Structure
from pyro_mpis.handlers import Draw, Programs, draw, is_delta, place, quoted, relayout, replay


@dataclass(frozen=True)
class Particles:
    """K particles of every random site, and the log density that each index was drawn from."""

    num_samples: int  # K
    sizes: Mapping[str, int]  # symbol of the index -> number of particles, or of values
    draws: Mapping[str, Draw]  # of the guide's latent sites and of those drawn from the prior
    log_proposals: Mapping[str, Tensor]  # symbol of the index -> (K, *plates), in nats

    def block(self, structure: Structure, ranges: Mapping[str, slice]) -> "Particles":
        """Return a part of the particles of some indices; K stays what it was."""
        draws = dict(self.draws)
        for symbol, part in ranges.items():
            for name in structure.by_symbol[symbol].sites:
                draws[name] = replace(draws[name], value=draws[name].value[part])
        log_proposals = {
            symbol: log_proposal[ranges.get(symbol, slice(None))]
            for symbol, log_proposal in self.log_proposals.items()
        }
        sizes = {
            symbol: len(range(size)[ranges.get(symbol, slice(None))])
            for symbol, size in self.sizes.items()
        }
        return Particles(self.num_samples, sizes, draws, log_proposals)


def draw_particles(structure: Structure, programs: Programs, num_samples: int) -> Particles:
    """
    Draw K particles of every random site and evaluate their proposal densities.

    One run of the guide and, if the guide lacks some latent, one of the model; both vectorised
    over the shared dim. Draws random numbers.
    """
    shared = structure.shared_dim
    origins = structure.origins
    latents = {
        name: site.event_dim
        for name, site in structure.guide.items()
        if name not in structure.guide_factors and (name in origins or name not in structure.model)
    }
    draws = draw(
        programs,
        "guide",
        num_samples=num_samples,
        dim=shared,
        given={},
        event_dims=latents,
    )
    from_prior = {
        name: structure.model[name].event_dim
        for name, origin in origins.items()
        if origin == "prior" or (origin == "enumerated" and name not in draws)
    }
    if "prior" in origins.values():
        given = {
            name: model_value(structure, name, drawn.value)
            for name, drawn in draws.items()
            if name in origins
        }
        draws |= draw(
            programs,
            "model",
            num_samples=num_samples,
            dim=shared,
            given=given,
            event_dims=from_prior,
        )
    for name, drawn in draws.items():
        _check_vectorised(structure, name, drawn, num_samples)
    log_proposals = {
        index.symbol: _log_proposal(structure, index, draws, programs)
        for index in structure.indices
        if not index.enumerated
    }
    sizes = {index.symbol: index.support or num_samples for index in structure.indices}
    return Particles(num_samples, sizes, draws, log_proposals)


def model_value(structure: Structure, name: str, value: Tensor) -> Tensor:
    """Give the guide's particles of a site the dims of the model's site."""
    num_dims = structure.max_plate_nesting + structure.model[name].event_dim
    return relayout(value, site=name, num_dims=num_dims)


def _check_vectorised(structure: Structure, name: str, drawn: Draw, num_samples: int) -> None:
    event_dim = drawn.fn.event_dim
    batch_shape = drawn.value.shape[: drawn.value.dim() - event_dim]
    if len(batch_shape) != -structure.shared_dim or batch_shape[0] != num_samples:
        raise ValueError(
            f"site '{name}': with {num_samples} particles its batch shape is "
            f"{tuple(batch_shape)}, but only the particles' dim and {structure.max_plate_nesting} "
            "dims of plates are expected. Index from the right, and keep batch dims when reshaping."
        )
    site = structure.guide.get(name, structure.model.get(name))
    assert site is not None
    if site.reads and num_samples > 1 and not drawn.reads_particles:
        raise ValueError(
            f"site '{name}': its proposal was computed from {quoted(site.reads)}, yet it is the "
            f"same for all {num_samples} particles of them. Particles are in a batch dim left of "
            "the plates: index from the right (x[..., 0], not x[0])."
        )


def _log_proposal(
    structure: Structure,
    index: Index,
    draws: Mapping[str, Draw],
    programs: Programs,
) -> Tensor:
    """Return log Q of one index at its particles: (K, *plates)."""
    members = {name: draws[name] for name in index.sites}
    outside = {
        name
        for member in index.sites
        for name in _reads(structure, member)
        if name not in index.sites
    }
    mixed = any(drawn.reads_particles for drawn in members.values())
    if len(members) > 1:
        _check_no_detour(structure, index, outside)
        mixed = mixed and bool(outside)
    if not mixed:
        return _joint(structure, index, {n: d.fn for n, d in members.items()}, members, 1)
    if len(members) > 1:
        fns = _fns_by_parent(structure, index, draws, programs)
    else:
        fns = {name: drawn.fn for name, drawn in members.items()}
    by_parent = _joint(structure, index, fns, members, 2)  # (K, parents' K or 1, *plates)
    num_parents = by_parent.shape[1]
    return by_parent.logsumexp(1) - torch.tensor(num_parents, dtype=by_parent.dtype).log()


def _reads(structure: Structure, name: str) -> frozenset[str]:
    """Return the random sites that a random site's proposal reads."""
    in_guide = structure.origins.get(name) != "prior"
    return structure.guide[name].reads if in_guide else structure.model[name].reads


def _check_no_detour(structure: Structure, index: Index, outside: set[str]) -> None:
    """Refuse a group whose members depend on each other through a site outside of it."""
    pending, seen = list(outside), set[str]()
    while pending:
        name = pending.pop()
        if name in seen or (name not in structure.guide and name not in structure.model):
            continue
        seen.add(name)
        through = _reads(structure, name)
        if through & set(index.sites):
            raise ValueError(
                f"groups: {index.sites} share one particle index, but one of them is proposed "
                f"given '{name}', which is itself proposed given {quoted(through)}. Add '{name}' "
                "to the group."
            )
        pending += through


def _joint(
    structure: Structure,
    index: Index,
    fns: Mapping[str, Distribution],
    members: Mapping[str, Draw],
    particle_dims: int,
) -> Tensor:
    """
    Add up the members' log densities and sum them to the plates of the index.

    :param particle_dims: 1 to pair particle k with component k, 2 for all pairs.
    """
    total: Tensor | None = None
    for name, drawn in members.items():
        value = drawn.value
        if particle_dims == 2:
            value = place(value, structure.shared_dim - 1, shared_dim=structure.shared_dim)
        log_prob = fns[name].log_prob(value)
        log_prob = scale_and_mask(log_prob, mask=drawn.mask)
        own = structure.guide if structure.origins.get(name) != "prior" else structure.model
        for symbol in sorted(own[name].plates - index.plates):
            log_prob = log_prob.sum(structure.plates[symbol].dim, keepdim=True)
        missing = particle_dims + structure.max_plate_nesting - log_prob.dim()
        log_prob = log_prob.reshape((1,) * missing + log_prob.shape)
        if missing:  # a log_prob that lost its particles' dim, for example a scalar zero
            log_prob = log_prob.expand(value.shape[:1] + log_prob.shape[1:])
        total = log_prob if total is None else total + log_prob
    assert total is not None
    return total


def _fns_by_parent(
    structure: Structure,
    index: Index,
    draws: Mapping[str, Draw],
    programs: Programs,
) -> dict[str, Distribution]:
    """Return the members' proposals given members at particle k and all others at particle j."""
    shared = structure.shared_dim
    num_samples = next(iter(draws.values())).value.shape[0]

    def placed(name: str, value: Tensor) -> Tensor:
        dim = shared - 1 if name in index.sites else shared
        return place(value, dim, shared_dim=shared)

    guide_values = {
        name: placed(name, drawn.value)
        for name, drawn in draws.items()
        if name in structure.guide and not is_delta(drawn.fn)
    }
    sites = replay(
        programs,
        "guide",
        values=guide_values,
        enumerated={},
        num_samples=num_samples,
    )
    fns: dict[str, Distribution] = {n: sites[n]["fn"] for n in index.sites if n in sites}
    if any(structure.origins.get(name) == "prior" for name in index.sites):
        model_values = {
            name: placed(name, model_value(structure, name, drawn.value))
            for name, drawn in draws.items()
            if name in structure.origins and not is_delta(drawn.fn)
        }
        for name, origin in structure.origins.items():
            if origin == "guide_delta":
                model_values[name] = sites[name]["value"]
        sites = replay(
            programs,
            "model",
            values=model_values,
            enumerated={},
            num_samples=num_samples,
        )
        fns |= {
            name: sites[name]["fn"]
            for name in index.sites
            if structure.origins.get(name) == "prior"
        }
    return fns
