# SPDX-License-Identifier: Apache-2.0
r"""
Latents whose values the programs look at: these share one particle index, others keep their own.

Torch cannot map a branch on a latent's value. Its particles are then taken one by one, and each run
is mapped over the particles of all other latents. Which latents are looked at may depend on their
values: another branch may look at others. So all particles are tried, and the estimate is still
unbiased. Let :math:`L` be the latents found, and all that their proposals read. What is found
depends on no other values than those of :math:`L`. Given the particles of :math:`L`, the estimate
has the expectation :math:`K^{-1} \sum_k p(x, z_L^k) / q(z_L^k)`, whatever :math:`L` is: also if it
is all latents, as in ordinary importance sampling. So the choice changes no expectation, if the
same particles are used in either case.
"""

from collections.abc import Sequence
from dataclasses import replace

import pyro
import torch
from pyro.poutine.trace_struct import Trace

from pyro_mpis.particles.drawing import Draw, Drawn, support_of
from pyro_mpis.particles.evaluation import MAX_LEVELS, wanted_of_guide, wanted_of_model
from pyro_mpis.particles.sizing import number_of_densities
from pyro_mpis.programs.densities import density_of
from pyro_mpis.programs.masks import Masks, unmasked
from pyro_mpis.programs.messages import drawn_from, statements
from pyro_mpis.programs.not_mappable import NotMappableError, OtherSitesError
from pyro_mpis.programs.runs import Programs, Wanted, evaluate
from pyro_mpis.programs.structure import Origin, Site, Structure


def drawn_plainly(
    structure: Structure, masks: Masks, runs: Sequence[tuple[Trace, Trace]]
) -> Drawn | None:
    """
    Return the particles of ordinary runs of guide and model.

    :param masks: how those of the model's latents count; its traces have them as the user wrote.
    :return: None if the runs do not have the same sites.
    """
    guides = [statements(guide) for guide, _ in runs]
    models = [statements(model) for _, model in runs]
    if any(sites.keys() != set(structure.model) for sites in models):
        return None
    if any(not set(structure.guide) <= sites.keys() == guides[0].keys() for sites in guides):
        return None
    draws = {}
    for name in structure.index_of:
        site = structure.proposal_site(name)
        if site is structure.guide.get(name):
            messages = [run[name] for run in guides]
        else:
            messages = [masks.of_model(run[name]) for run in models]
        values, log_probs, supports = [], [], []
        for message in messages:
            if message["value"].shape != site.shape:
                return None
            fn = unmasked(message["fn"])
            with pyro.validation_enabled(False):
                density = density_of(fn, message["value"], validate=site.checked)
            log_prob = drawn_from(message, density)
            values.append(message["value"].detach())
            log_probs.append(log_prob.expand(site.batch_shape))
            supports.append(support_of(site, message))
        support = supports[0]
        for other in supports[1:]:
            if support is None or other is None or not torch.equal(support, other):
                support = None
        value, log_prob = torch.stack(values), torch.stack(log_probs)
        draws[name] = Draw(value, log_prob, bool(site.reads), support)
    return Drawn(draws, kept={})


def latents_looked_at(
    structure: Structure, programs: Programs, drawn: Drawn
) -> frozenset[str] | None:
    """
    Return the latents whose values the programs look at, and those that they are proposed from.

    :param drawn: particles of all latents, all of which are tried.
    :return: None if not to be found, or if these are all latents.
    """
    values = {name: drawn.draws[name].value for name in structure.index_of}
    guide = wanted_of_guide(structure, validate=False)
    if guide is None and structure.guide:
        guide = Wanted({}, frozenset(structure.guide))
    found = frozenset[str]()
    while True:
        others = [index.sites for index in structure.indices if not found.issuperset(index.sites)]
        if not others or len(others) >= MAX_LEVELS:
            return None
        levels = [{name: values[name][:2] for name in sites} for sites in others]
        if found:
            levels.append({name: values[name] for name in found})
        try:
            with pyro.validation_enabled(False):
                evaluate(
                    replace(programs, one_by_one=found),
                    levels,
                    guide=guide,
                    model=wanted_of_model(structure, validate=False),
                    shapes=structure.latent_shapes,
                )
        except OtherSitesError:
            return None
        except NotMappableError as error:
            more = {
                name
                for number in error.levels
                if number < len(others)  # not of a program's own transform
                for name in others[number]
            }
            if not more:
                return None
            closed = _with_parents(structure, found | more)
            if closed is None:
                return None
            found = closed
        else:
            return found or None


def _with_parents(structure: Structure, names: frozenset[str]) -> frozenset[str] | None:
    """Add what the proposals of some latents read, and who shares an index with them."""
    while True:
        read = {other for name in names for other in structure.proposal_site(name).reads}
        if not read <= structure.index_of.keys():
            return None
        more = {site for name in names | read for site in structure.index_of[name].sites}
        if more <= names:
            return names
        names |= more


def taken_one_by_one(structure: Structure, names: frozenset[str]) -> Structure:
    """
    Let some latents share one particle index, outside of all plates.

    All other sites may read it: what is computed from a number has lost its origin.
    """
    taken = [index for index in structure.indices if names.issuperset(index.sites)]
    sites = tuple(site for index in taken for site in index.sites)
    one = replace(taken[0], sites=sites, plates=frozenset(), support=None)
    indices = [one if index is taken[0] else index for index in structure.indices]
    origins: dict[str, Origin] = dict(structure.origins)
    shared = dict(structure.shared)
    for index in taken:
        for name in index.sites:
            if index.enumerated:
                origins[name] = "guide" if name in structure.guide else "prior"
            if index.plates:
                plates = {structure.plates[symbol].name for symbol in index.plates}
                shared[name] = tuple(sorted({*shared.get(name, ()), *plates}))

    def reading(sites: dict[str, Site]) -> dict[str, Site]:
        return {
            name: site if name in names else replace(site, reads=site.reads | names)
            for name, site in sites.items()
        }

    return replace(
        structure,
        indices=tuple(index for index in indices if index is one or index not in taken),
        origins=origins,
        shared=shared,
        guide=reading(dict(structure.guide)),
        model=reading(dict(structure.model)),
    )


def work_of_runs(structure: Structure, names: frozenset[str]) -> int:
    """
    Return how many densities are evaluated if some latents are taken one by one.

    Each run evaluates all densities, of those too that read none of these latents.

    :param structure: of :func:`taken_one_by_one`.
    """
    one = structure.index_of[min(names)]
    sizes = {**structure.num_particles, one.symbol: 1}
    return one.num_samples * number_of_densities(structure, sizes)
