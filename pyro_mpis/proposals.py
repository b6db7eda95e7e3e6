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

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.dependencies import Index, Structure
from pyro_mpis.handlers import (
    Draw,
    Name,
    Programs,
    check_same_sites,
    draw,
    first_line,
    is_delta,
    place,
    quoted,
    replay,
)

CHECKED_ELEMENTS = 2**22  # of a tensor whose arguments are checked
SINGLE_RUNS = 100  # of a program that fails after its last site
MIXTURE_ELEMENTS = 2**24  # densities of pairs of particles that are held at once


@dataclass(frozen=True)
class Particles:
    """K particles of every random site, and the log density that each index was drawn from."""

    num_samples: int  # K
    sizes: Mapping[str, int]  # symbol of the index -> number of particles, or of values
    values: Mapping[str, Tensor]  # (K, *plates, *event), of the guide's sites and the prior's
    deltas: frozenset[str]  # sites of the guide among them that draw nothing
    log_proposals: Mapping[str, Tensor]  # symbol of the index -> (K, *plates), in nats

    def block(self, structure: Structure, ranges: Mapping[str, slice]) -> "Particles":
        """Return a part of the particles of some indices; K stays what it was."""
        values = dict(self.values)
        for symbol, part in ranges.items():
            for name in structure.by_symbol[symbol].sites:
                values[name] = values[name][part]
        log_proposals = {
            symbol: log_proposal[ranges.get(symbol, slice(None))]
            for symbol, log_proposal in self.log_proposals.items()
        }
        sizes = {
            symbol: len(range(size)[ranges.get(symbol, slice(None))])
            for symbol, size in self.sizes.items()
        }
        return replace(self, sizes=sizes, values=values, log_proposals=log_proposals)


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
        values = {name: drawn.value for name, drawn in draws.items()}
        given = model_inputs(structure, values, values)
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
    sizes = structure.num_particles(num_samples)
    values = {name: drawn.value for name, drawn in draws.items()}
    deltas = frozenset(name for name, drawn in draws.items() if is_delta(drawn.fn))
    return Particles(num_samples, sizes, values, deltas, log_proposals)


def check_arguments(structure: Structure, programs: Programs, particles: Particles) -> None:
    """
    Let distributions check their arguments and values, at each particle k of all sites together.

    All combinations are not checked: their tensors are large; and of very many particles only some.

    :raises ValueError: if an argument or a value is invalid; names the site.
    """
    largest = max((structure.elements(site) for site in structure.model.values()), default=1)
    step = max(1, math.ceil(particles.num_samples * largest / CHECKED_ELEMENTS))
    values = {
        name: value[::step] if len(value) == particles.num_samples else value
        for name, value in particles.values.items()
    }
    num_samples = len(range(0, particles.num_samples, step))
    inputs = model_inputs(structure, values, values)
    own = {name: value for name, value in values.items() if name in structure.guide}
    if own:
        _run_to_the_end(structure, programs, "guide", own, num_samples)
    sites = _run_to_the_end(structure, programs, "model", inputs, num_samples)
    check_same_sites("model", set(structure.model), set(sites))
    for name, site in sites.items():
        if structure.model[name].silent:
            continue
        try:
            site["fn"].log_prob(site["value"])
        except ValueError as error:
            raise ValueError(
                f"site '{name}': with {num_samples} particles, {first_line(error)}. A guide must "
                "draw inside of the model's support, and an observation lie in it."
            ) from error


def _run_to_the_end(
    structure: Structure,
    programs: Programs,
    name: Name,
    values: Mapping[str, Tensor],
    num_samples: int,
) -> dict[str, SampleMessage]:
    """
    Run a program at its particles, and check that it has no sites beyond the last one it met.

    Where it fails after its last site, nothing tells a return value that is not vectorised from a
    branch that leads to more sites; then it is run at single particles, one after the other.

    :param values: ``(K, *plates, *event)``; of other lengths, a whole support, are left out.
    """
    values = {site: value for site, value in values.items() if len(value) == num_samples}

    def run(programs: Programs) -> dict[str, SampleMessage]:
        return replay(
            programs, name, values=values, enumerated={}, num_samples=num_samples, validate=True
        )

    to_the_end = replace(programs, sites={})
    try:
        return run(to_the_end)
    except ValueError:
        known = structure.guide if name == "guide" else structure.model
        for k in range(0, num_samples, math.ceil(num_samples / SINGLE_RUNS)):
            single = {site: value[k] for site, value in values.items()}
            sites = replay(to_the_end, name, values=single, enumerated={}, num_samples=1)
            check_same_sites(name, set(known), set(sites))
        return run(programs)


def model_value(structure: Structure, name: str, value: Tensor) -> Tensor:
    """
    Give the guide's value of a site the dims of the model's site.

    A guide may draw as one event what the model draws in a plate, or the reverse: the same tensor
    but for dims of size one between the particles' dims and the site's own.

    :param value: ``(*particles, *plates, *event)`` with the guide's event dims.
    :return: the same with the model's.
    """
    nesting = structure.max_plate_nesting
    wanted = nesting + structure.model[name].event_dim
    own = nesting + structure.guide[name].event_dim if name in structure.guide else wanted
    if own == wanted:
        return value
    value = value.reshape((1,) * (own - value.dim()) + value.shape)
    left, right = value.shape[: value.dim() - own], value.shape[value.dim() - own :]
    while len(right) > wanted and right[0] == 1:
        right = right[1:]
    if len(right) > wanted:
        raise ValueError(
            f"site '{name}': the guide's value has shape {tuple(right)} for each particle, but the "
            f"model's site has only {wanted} dims (plates and event). Give both the same shape."
        )
    return value.reshape((*left, *(1,) * (wanted - len(right)), *right))


def model_inputs(
    structure: Structure, random: Mapping[str, Tensor], carried: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    Return the values that the model's latent sites are to have.

    :param random: of the random sites, wherever their particles are, with the event dims of the
        program that draws them.
    :param carried: of the guide's ``Delta`` sites.
    """
    result = {}
    for name, origin in structure.origins.items():
        if origin == "guide_delta":
            result[name] = model_value(structure, name, carried[name])
        elif name in random:
            result[name] = model_value(structure, name, random[name])
    return result


def _check_vectorised(structure: Structure, name: str, drawn: Draw, num_samples: int) -> None:
    event_dim = drawn.fn.event_dim
    batch_shape = drawn.value.shape[: drawn.value.dim() - event_dim]
    site = structure.proposal_site(name)
    nesting = structure.max_plate_nesting
    expected = (num_samples, *(1,) * (nesting - len(site.batch_shape)), *site.batch_shape)
    if tuple(batch_shape) != expected:
        raise ValueError(
            f"site '{name}': with {num_samples} particles its batch shape is "
            f"{tuple(batch_shape)}, but without them {tuple(site.batch_shape)}, so that {expected} "
            "is expected: the particles' dim left of all dims that plates and sites have. Index "
            "from the right, and keep batch dims when reshaping."
        )
    if (
        drawn.reads_particles
        and is_delta(drawn.fn)
        and not site.reads
        and bool((drawn.value != drawn.value[:1]).any())  # else a point, expanded
    ):
        raise ValueError(
            f"site '{name}': its value differs between particles, but from which sites it was "
            "computed could not be followed. Compute it by torch operations, without writing into "
            "a tensor in place."
        )
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
        for name in structure.proposal_site(member).reads
        if name not in index.sites
    }
    mixed = any(drawn.reads_particles for drawn in members.values())
    if len(members) > 1:
        _check_no_detour(structure, index, outside)
    if not mixed:
        return _joint(structure, index, {n: d.fn for n, d in members.items()}, members, 1)
    if len(members) > 1:  # their proposals at particle k differ with k: all k at once
        return _mixed(
            _joint(structure, index, _fns_by_parent(structure, index, draws, programs), members, 2)
        )
    ((name, drawn),) = members.items()
    size = max(1, MIXTURE_ELEMENTS // drawn.value.numel())  # particles k that are mixed at once
    parts = [replace(drawn, value=value) for value in drawn.value.split(size)]
    return torch.cat(
        [_mixed(_joint(structure, index, {name: drawn.fn}, {name: part}, 2)) for part in parts]
    )


def _mixed(by_parent: Tensor) -> Tensor:
    """Average densities over the parents' particles: (K, parents' K or 1, *plates), log scale."""
    return by_parent.logsumexp(1) - math.log(by_parent.shape[1])


def _check_no_detour(structure: Structure, index: Index, outside: set[str]) -> None:
    """Refuse a group whose members depend on each other through a site outside of it."""
    pending, seen = list(outside), set[str]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        through = structure.proposal_site(name).reads
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
        site = structure.proposal_site(name)
        summed = [structure.plates[symbol].dim for symbol in sorted(site.plates - index.plates)]
        for dim in (*summed, *site.undeclared):
            if -dim <= log_prob.dim():
                log_prob = log_prob.sum(dim, keepdim=True)
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

    random = {name: placed(name, d.value) for name, d in draws.items() if not is_delta(d.fn)}
    guide_values = {name: value for name, value in random.items() if name in structure.guide}
    sites = replay(programs, "guide", values=guide_values, enumerated={}, num_samples=num_samples)
    fns = {name: sites[name]["fn"] for name in index.sites if name in sites}
    from_prior = [name for name in index.sites if structure.origins.get(name) == "prior"]
    if from_prior:
        carried = {name: site["value"] for name, site in sites.items()}
        values = model_inputs(structure, random, carried)
        sites = replay(programs, "model", values=values, enumerated={}, num_samples=num_samples)
        fns |= {name: sites[name]["fn"] for name in from_prior}
    return fns
