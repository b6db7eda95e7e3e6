# SPDX-License-Identifier: Apache-2.0
r"""
Weigh the particles, each with its deterministic-mixture density.

A site drawn from a proposal that reads other sites, :math:`z_i^k \sim q(\cdot\mid z_{pa}^k)`, is
weighted by the mixture over its parents' particles, (14) of [1],

.. math:: Q_i(z) = K^{-1} \sum_j q(z \mid z_{pa}^j),

all parents at the same particle :math:`j`. Given the parents' particles, a sum over the child's
particles of :math:`h(z_i^k) / Q_i(z_i^k)` has the expectation :math:`K \int h`, so that (18) of
[1] is exactly unbiased whatever the number of parents and whichever plates they sit in. Dividing by
:math:`q(z_i^{k} \mid z_{pa}^{k'})` for another :math:`k'` instead is biased.

The members of a group share :math:`k`; their joint density is mixed over parents outside the group.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis._typing import Ordinal
from pyro_mpis.particles.drawing import Draw, Drawn
from pyro_mpis.particles.evaluation import Evaluated
from pyro_mpis.particles.pairs import log_probs_of_pairs, rows_at_once
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Index, Site, Structure
from pyro_mpis.programs.tensors import Mapped


@dataclass(frozen=True)
class Particles:
    """K particles of every random site, and the log density that each index was drawn from."""

    num_samples: Mapping[str, int]  # symbol of the index -> K, of all blocks together
    sizes: Mapping[str, int]  # symbol of the index -> number of particles, or of values
    values: Mapping[str, Tensor]  # (K, *shape), or (values, *shape) of a whole support
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

    def distinct(self, structure: Structure, symbol: str) -> tuple["Particles", Tensor]:
        """
        Return particles in which no two of an index are the same, and which one each was.

        They have no log proposals: the programs can run at them, and that is all.
        """
        names = structure.by_symbol[symbol].sites
        rows = [self.values[name].reshape(self.sizes[symbol], -1).double() for name in names]
        _, which = torch.cat(rows, 1).unique(dim=0, return_inverse=True)
        number = int(which.max()) + 1
        first = torch.empty(number, dtype=torch.long, device=which.device)
        first[which] = torch.arange(len(which), device=which.device)  # any one of them
        values = {**self.values, **{n: self.values[n][first] for n in names}}
        sizes = {**self.sizes, symbol: number}
        return replace(self, sizes=sizes, values=values, log_proposals={}), which


def weigh(
    structure: Structure,
    programs: Programs,
    drawn: Drawn,
    *,
    validate: bool,
    from_factors: bool,
    memory_limit: int | None = None,
) -> Particles:
    """
    Evaluate the density that each particle was drawn from, (14); draws nothing.

    :param validate: whether to look at supports and arguments.
    :param from_factors: whether to leave out sites drawn from the prior whose proposal is an entry
        of their own factor: :func:`weigh_from_factors` reads it off.
    :param memory_limit: in bytes, for densities at pairs of particles.
    """
    log_proposals: dict[str, Tensor] = {}
    pending: list[Index] = []
    for index in structure.indices:
        if index.enumerated:
            continue
        members = {name: drawn.particles(structure, name) for name in index.sites}
        reads = any(
            draw.reads_particles or structure.proposal_site(name).reads
            for name, draw in members.items()
        )
        if len(members) > 1:
            _check_no_detour(structure, index)
        if reads and from_factors and _is_own_factor(structure, index):
            continue
        if reads:
            pending.append(index)
        else:
            parts = {name: draw.log_prob for name, draw in members.items()}
            log_proposals[index.symbol] = _joint(structure, index, parts, particle_dims=1)
    log_proposals |= _mixtures(
        structure, programs, drawn, pending, memory_limit=memory_limit, validate=validate
    )
    _check_proposals(structure, log_proposals)
    values = {
        name: _support_of(name, drawn.draws[name])
        if index.enumerated
        else drawn.particles(structure, name).value
        for name, index in structure.index_of.items()
    }
    sizes = {index.symbol: len(values[index.sites[0]]) for index in structure.indices}
    numbers = {i.symbol: i.num_samples for i in structure.indices if not i.enumerated}
    return Particles(numbers, sizes, values, log_proposals)


def at_supports(structure: Structure, particles: Particles, drawn: Drawn) -> Particles | None:
    """
    Return particles that are not random where sites in plates are discrete: one of each value.

    What the programs read must be found in the same way whatever was drawn. If two particles of a
    discrete site have the same value, a read does not show. Should that decide how the evidence is
    estimated, it would be biased.

    :return: particles without weights, a few of each other site; None if no site in a plate that
        is drawn has a finite support.
    """
    supports = {
        name: support
        for name, index in structure.index_of.items()
        if index.plates and (support := drawn.draws[name].support) is not None
    }
    if all(structure.index_of[name].enumerated for name in supports):
        return None
    for index in structure.indices:
        discrete = [name for name in index.sites if name in supports]
        for number, name in enumerate(discrete):
            if len(discrete) > 1 or structure.shared.get(name):
                dims = len(structure.proposal_site(name).batch_shape)
                supports[name] = mixed_support(supports[name], dims, number)
    sizes = {}
    for index in structure.indices:
        values = [len(supports[name]) for name in index.sites if name in supports]
        sizes[index.symbol] = max(values, default=min(FEW, particles.sizes[index.symbol]))
    by_name = {}
    for name, index in structure.index_of.items():
        value = supports.get(name, particles.values[name])
        by_name[name] = value[torch.arange(sizes[index.symbol]) % len(value)]
    ones = (1,) * structure.max_plate_nesting
    nothing = {i.symbol: torch.zeros((sizes[i.symbol], *ones)) for i in structure.indices}
    return replace(particles, sizes=sizes, values=by_name, log_proposals=nothing)


def with_all_outside(structure: Structure, particles: Particles, drawn: Particles) -> Particles:
    """Return particles with all that were drawn of the indices outside of plates."""
    outside = [index for index in structure.indices if not index.plates]
    names = [name for index in outside for name in index.sites]
    sizes = {index.symbol: drawn.sizes[index.symbol] for index in outside}
    values = {name: drawn.values[name] for name in names}
    return replace(
        particles, sizes={**particles.sizes, **sizes}, values={**particles.values, **values}
    )


def mixed_support(support: Tensor, dims: int, number: int) -> Tensor:
    """
    Put values into particles whose elements and sites differ, behind those that are alike.

    Where elements or sites share an index, no choice of particles mixes these: what is zero if they
    are alike, as a difference, would not be seen.

    :param support: ``(values, *batch, *event)``.
    :param dims: how many batch dims it has.
    :param number: of the site, among those that share the index.
    """
    batch = support.shape[1 : 1 + dims]
    alike = torch.zeros(batch, dtype=torch.long, device="cpu")
    steps = alike + number
    for dim in range(dims):
        along = (-1,) + (1,) * (dims - 1 - dim)
        steps = steps + torch.arange(batch[dim], device="cpu").reshape(along)
    generator = torch.Generator("cpu").manual_seed(number)
    others = torch.randint(len(support), (2, *batch), generator=generator, device="cpu")
    shifts = torch.cat([torch.stack([alike, steps]), others])
    values = torch.arange(len(support), device="cpu").reshape((-1,) + (1,) * dims)
    at = ((shifts.unsqueeze(1) + values) % len(support)).flatten(0, 1)
    at = at.reshape(at.shape + (1,) * (support.dim() - 1 - dims)).to(support.device)
    return torch.take_along_dim(support, at, 0)


FEW = 3  # particles that at_supports takes of sites without a finite support


def _is_own_factor(structure: Structure, index: Index) -> bool:
    """
    Whether the proposals of an index are the model's own densities, at drawn particles.

    All indices must have as many particles: else not every draw is a particle.
    """
    reads = {name for site in index.sites for name in structure.proposal_site(site).reads}
    inside = (structure.index_of.get(name) for name in reads)
    return (
        len({other.num_samples for other in structure.indices}) == 1
        and all(structure.origins.get(site) == "prior" for site in index.sites)
        and all(parent is not None and not parent.enumerated for parent in inside)
    )


def weigh_from_factors(
    structure: Structure, particles: Particles, evaluated: Evaluated
) -> Particles:
    """
    Weigh the sites drawn from the prior that :func:`weigh` left out.

    Their density given all parents at particle j is the diagonal of their own factor.

    :param evaluated: what the programs say at all of the particles.
    """
    log_proposals = dict(particles.log_proposals)
    for index in structure.indices:
        if index.enumerated or index.symbol in log_proposals:
            continue
        pairs = {}
        for name in index.sites:
            said, site = evaluated.model[name], structure.model[name]
            log_prob = said.get("drawn_from", said["log_prob"])
            symbols = evaluated.symbols(name, log_prob, structure.indices_read(site))
            pairs[name] = _diagonal(log_prob, symbols, index.symbol, site)
        joint = _joint(structure, index, pairs, particle_dims=2)
        log_proposals[index.symbol] = _mixture(structure, index, joint)
    _check_proposals(structure, log_proposals)
    return replace(particles, log_proposals=log_proposals)


def _diagonal(log_prob: Mapped, symbols: str, symbol: str, site: Site) -> Tensor:
    """
    Return a density at particle k of its own index and particle j of all others.

    :return: ``(K, K or 1, *batch shape)``.
    """
    tensor = log_prob.tensor
    own = symbols.find(symbol)
    tensor = tensor.unsqueeze(0) if own < 0 else tensor.movedim(own, 0)
    others = len(symbols) - (own >= 0)
    if others == 0:
        tensor = tensor.unsqueeze(1)
    for _ in range(others - 1):
        tensor = tensor.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    batch = tensor.shape[2:]
    tensor = tensor.reshape(
        (*tensor.shape[:2], *(1,) * (len(site.batch_shape) - len(batch)), *batch)
    )
    return tensor


def _mixture(
    structure: Structure, index: Index, joint: Tensor, own: Tensor | None = None
) -> Tensor:
    """
    Return log Q of particles, from their densities given all other sites at draw j.

    The prior of a site may have invalid arguments at some values of its parents, where the density
    is nan. No particle that was drawn there counts, and no other one could have been drawn there.
    So (14) holds of all others. If nothing rules these values out, the site's own factor says so.

    :param joint: ``(K, draws or 1, *plates)``.
    :param own: which draw each particle is: ``(K, *plates or none)``; draw k is particle k if None.
    """
    number = joint.shape[1]
    result = joint.logsumexp(1) - math.log(number)
    is_prior = all(structure.origins.get(site) == "prior" for site in index.sites)
    if number == 1 or not is_prior or not bool(result.isnan().any()):
        return result
    own = torch.arange(len(joint)) if own is None else own
    own = own.to(joint.device).reshape((*own.shape, *(1,) * (joint.dim() - 1 - own.dim())))
    at_own = joint.gather(1, own.unsqueeze(1).expand((-1, -1, *joint.shape[2:]))).squeeze(1)
    result = joint.masked_fill(joint.isnan(), -math.inf).logsumexp(1) - math.log(number)
    return result.masked_fill(at_own.isnan(), math.inf)


def _check_proposals(structure: Structure, log_proposals: Mapping[str, Tensor]) -> None:
    """Refuse proposals without a density."""
    for symbol, log_proposal in log_proposals.items():
        if bool(log_proposal.isnan().any()):
            sites = quoted(structure.by_symbol[symbol].sites)
            raise ValueError(
                f"site {sites}: the density of its proposal is nan for "
                f"{int(log_proposal.isnan().sum())} of {log_proposal.numel()} particles. Check the "
                "arguments of its distribution, in the guide or, without one, in the model."
            )


def _support_of(name: str, draw: Draw) -> Tensor:
    if draw.support is None:
        raise NotImplementedError(
            f"site '{name}': marked infer={{'enumerate': 'parallel'}}, but its support depends on "
            "other latents. Remove the mark: the site is then sampled."
        )
    return draw.support


def _mixtures(
    structure: Structure,
    programs: Programs,
    drawn: Drawn,
    pending: list[Index],
    *,
    memory_limit: int | None,
    validate: bool,
) -> dict[str, Tensor]:
    """Return log Q of indices whose proposals read particles: (K, *plates)."""
    results: dict[str, Tensor] = {}
    for indices in _evaluated_together(structure, pending):
        num_samples, num_draws = indices[0].num_samples, structure.num_draws[indices[0].symbol]
        names = [name for index in indices for name in index.sites]
        together = names if len(indices[0].sites) > 1 else []
        numbers = num_samples, num_draws
        size = rows_at_once(
            structure, programs, drawn, names, together, numbers, memory_limit, validate=validate
        )
        parts: dict[str, list[Tensor]] = {index.symbol: [] for index in indices}
        for start in range(0, num_samples, size):
            rows = slice(start, start + size)
            log_probs = log_probs_of_pairs(
                structure, programs, drawn, names, together, rows, num_draws, validate=validate
            )
            for index in indices:
                members = {name: log_probs[name] for name in index.sites}
                joint = _joint(structure, index, members, particle_dims=2)
                own = drawn.kept.get(index.symbol, torch.arange(num_samples))[rows]
                parts[index.symbol].append(_mixture(structure, index, joint, own))
        results |= {symbol: torch.cat(tensors) for symbol, tensors in parts.items()}
    return results


def _evaluated_together(structure: Structure, pending: list[Index]) -> list[list[Index]]:
    """Split indices into those of one site and equal numbers of particles and draws, and groups."""
    together: dict[object, list[Index]] = {}
    for index in pending:
        numbers = index.num_samples, structure.num_draws[index.symbol]
        key = numbers if len(index.sites) == 1 else index.symbol
        together.setdefault(key, []).append(index)
    return list(together.values())


def _check_no_detour(structure: Structure, index: Index) -> None:
    """Refuse a group whose members depend on each other through a site outside of it."""
    detour = structure.detour(index.sites)
    if detour is not None:
        through = structure.proposal_site(detour).reads
        raise ValueError(
            f"groups: {index.sites} share one particle index, but one of them is proposed given "
            f"'{detour}', which is itself proposed given {quoted(through)}. Add '{detour}' to the "
            "group."
        )


def _joint(
    structure: Structure, index: Index, log_probs: Mapping[str, Tensor], *, particle_dims: int
) -> Tensor:
    """
    Add up the members' log densities and sum them to the plates of the index.

    :param log_probs: ``(*particle dims, *batch shape)``.
    :return: ``(*particle dims, *plates)``, plates padded to ``max_plate_nesting``.
    """
    total: Tensor | None = None
    for name, log_prob in log_probs.items():
        site = structure.proposal_site(name)
        for dim in _summed(structure, site, index.plates):
            log_prob = log_prob.sum(dim, keepdim=True)
        scale = structure.scale_of(site.plates - index.plates)
        if scale != 1.0:  # the product over a plate, of which there is a subsample
            log_prob = log_prob * scale
        lead, batch = log_prob.shape[:particle_dims], log_prob.shape[particle_dims:]
        missing = structure.max_plate_nesting - len(batch)
        log_prob = log_prob.reshape((*lead, *(1,) * missing, *batch))
        total = log_prob if total is None else total + log_prob
    assert total is not None
    return total


def _summed(structure: Structure, site: Site, plates: Ordinal) -> list[int]:
    """Return the batch dims of a site that are no plates of its index."""
    dims = {structure.plates[symbol].dim for symbol in site.plates - plates}
    return sorted(dims.union(site.undeclared))
