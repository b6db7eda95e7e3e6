# SPDX-License-Identifier: Apache-2.0
"""
A combination of particles, compared with a run of the programs at these values alone.

Code that mixes particles, such as ``x / x.norm()`` or ``torch.cumsum(x, 0)``, gives tensors of the
right shapes, of the wrong numbers: nothing else would show it.
"""

from collections.abc import Mapping

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_mpis.dependencies import Site, Structure
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.factor_graph.selection import sites_at
from pyro_mpis.factors import log_density
from pyro_mpis.handlers import Programs, check_same_sites, run_at, sample_sites
from pyro_mpis.proposals import Particles

# Combinations to compare if a program takes values of its latents out of torch, for what it does
# with them may well be right at half of all; or if the first differs by more than it mostly does.
COMBINATIONS = 16
# The power of the machine epsilon that a difference is compared with, relative to one plus the
# largest: what is refused, since the rounding of solvers explains no more; and what is usual.
REFUSED, USUAL = 1 / 3, 2 / 3


def check_combinations(
    graph: FactorGraph, structure: Structure, particles: Particles, programs: Programs
) -> None:
    """
    Check that factors and values at some combinations of particles are those of single values.

    :param graph: as the programs made it, not regrouped.
    :param particles: those of the graph.
    :raises ValueError: if not; names the site.
    """
    for trial in range(COMBINATIONS):
        chosen = {
            symbol: (number + trial * (number + 1)) % graph.sizes[symbol]
            for number, symbol in enumerate(graph.index_plates)
        }
        usual = _check(graph, structure, particles, programs, chosen)
        if trial == 0 and usual and not programs.leaves_torch:
            break


def _check(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    chosen: Mapping[str, int],
) -> bool:
    """
    Check one combination: the number of the particle of each index.

    :return: whether all differences are as small as they mostly are.
    """
    usual = True
    drawn = {}
    for symbol, plates in graph.index_plates.items():
        shape = [graph.sizes[plate] for plate in graph.tensor_plates(plates)]
        drawn[symbol] = torch.full((1, *shape), chosen[symbol], device=graph.device)
    values = {name: value[0] for name, value in sites_at(graph, drawn, 1).items()}
    factors = {factor.name: factor for factor in graph.factors}
    with pyro.validation_enabled(False):  # arguments are checked elsewhere, at more particles
        carried = [name for name, o in structure.origins.items() if o == "guide_delta"]
        if carried or structure.guide_factors:
            own = _guide_values(structure, particles, values, chosen)
            sites = sample_sites(run_at(programs, "guide", own))
            for name in (*carried, *structure.guide_factors):
                factor = factors[f"{name} (guide)"]
                log_prob = -log_density(sites[name])
                usual &= _compare(graph, structure, factor, chosen, structure.guide[name], log_prob)
                if name in carried:
                    expected = sites[name]["value"]
                    found = values[name].reshape(expected.shape)
                    usual &= _check_close(name, "value", found, expected)
        sites = sample_sites(run_at(programs, "model", values))
        check_same_sites("model", set(structure.model), set(sites))
        for name, site in sites.items():
            if name in factors:
                log_prob = site["fn"].log_prob(site["value"])
                log_prob = scale_and_mask(log_prob, site["scale"], site["mask"])
                usual &= _compare(
                    graph, structure, factors[name], chosen, structure.model[name], log_prob
                )
    return usual


def _guide_values(
    structure: Structure,
    particles: Particles,
    values: Mapping[str, Tensor],
    chosen: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the chosen particles of the guide's random sites, in the shapes of ordinary runs."""
    result = {}
    for name, site in structure.guide.items():
        index = structure.index_of.get(name)
        if index is None:
            continue
        value = values[name] if index.enumerated else particles.values[name][chosen[index.symbol]]
        left = value.dim() - len(site.batch_shape) - site.event_dim
        result[name] = value.reshape(value.shape[max(left, 0) :])
    return result


def _compare(
    graph: FactorGraph,
    structure: Structure,
    factor: LogFactor,
    chosen: Mapping[str, int],
    site: Site,
    log_prob: Tensor,
) -> bool:
    """
    Compare a factor with the density of a site in a run at single values.

    :param log_prob: in the batch shape of an ordinary run.
    """
    for dim in structure.summed_dims(site):
        if -dim <= log_prob.dim():
            log_prob = log_prob.sum(dim, keepdim=True)
    log_prob = log_prob.reshape((1,) * (graph.max_plate_nesting - log_prob.dim()) + log_prob.shape)
    plates = "".join(symbol for symbol in factor.dims if symbol not in chosen)
    everything = slice(None)
    found = factor.tensor[tuple(chosen.get(symbol, everything) for symbol in factor.dims)]
    return _check_close(site.name, "log_prob", found, graph.to_plates(log_prob, plates, left=0))


def _check_close(name: str, what: str, found: Tensor, expected: Tensor) -> bool:
    """
    Refuse a difference that rounding does not explain; infinities are equal to themselves.

    :return: whether it is one as usual.
    """
    if not expected.is_floating_point():
        expected = expected.double()
    difference = torch.where(found == expected, 0.0, (found - expected).abs())
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    worst = float(difference.max()) if difference.numel() else 0.0
    eps = torch.finfo(expected.dtype).eps
    if not worst <= eps**REFUSED * (1.0 + largest):
        raise ValueError(
            f"site '{name}': its {what} with all particles at once differs, by up to {worst:.3g}, "
            "from that of a run at single values. Particles are in batch dims left of the plates, "
            "and code must not mix them: name dims from the right, as in x.mean(-1, keepdim=True), "
            "x.norm(dim=-1, keepdim=True), torch.softmax(x, -1) and torch.cumsum(x, -1), and draw "
            "random numbers in sample statements only. pyro.infer.Importance, which runs a program "
            "once for each sample, allows all this."
        )
    return bool(worst <= eps**USUAL * (1.0 + largest))
