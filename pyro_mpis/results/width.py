# SPDX-License-Identifier: Apache-2.0
"""What is said where a posterior is wider than its particles."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_mpis._text import quoted
from pyro_mpis.factor_graph.graph import SiteValue
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.programs.structure import Structure
from pyro_mpis.results.directions import MOST_SCALARS, Direction, widest_direction
from pyro_mpis.results.narrowness import times_as_wide
from pyro_mpis.results.remedies import dependence, multiple, widening
from pyro_mpis.results.site_diagnosis import SiteDiagnosis

# A posterior 1.15 times as wide as its particles bends their log weights by this.
NARROW_CURVATURE = 0.125
# One that is 1.3 times as wide in a direction across several scalars. The product of the marginals
# of a posterior is narrower than it in some direction, and harmless until there.
NARROW_DIRECTION = 0.2
# Probability that a run is called narrow where no posterior is that wide, if log weights differ
# from a parabola by normal noise.
FALSE_ALARM = 0.01
CONSEQUENCE = (
    "The log evidence is too low, by an unknown amount. Its standard error and all intervals are "
    "too small. A high effective sample size does not show this."
)


def directions_of(
    structure: Structure,
    values: Mapping[str, SiteValue],
    marginals: Mapping[str, Marginal],
    sites: Sequence[SiteDiagnosis],
    num_replicates: int,
) -> tuple[Direction, ...]:
    """
    Look across all scalars that one index draws: those of a vector, of a group, of a joint latent.

    Integers are left out, and so are sites whose values are computed from several indices.
    """
    by_index: dict[str, list[SiteDiagnosis]] = defaultdict(list)
    for site in sites:
        if len(values[site.name].indices) == 1:
            by_index[values[site.name].indices].append(site)
    directions = []
    for symbol, members in by_index.items():
        index = structure.by_symbol[symbol]
        plates = frozenset(structure.plates[plate].name for plate in index.plates)
        flat = [_flat(marginals[site.name], site, plates) for site in members]
        scalars = torch.cat([scalars for scalars, _ in flat], -1)
        varied = (scalars != scalars.round()).flatten(0, -2).any(0)
        if int(varied.sum()) > 1:
            names = tuple(site.name for site in members)
            scalars, log_weights = scalars[..., varied], flat[0][1]
            directions.append(widest_direction(names, scalars, log_weights, num_replicates))
    return tuple(directions)


def too_narrow(
    sites: Sequence[SiteDiagnosis], directions: Sequence[Direction]
) -> list[tuple[str, tuple[str, ...]]]:
    """
    Say which posteriors are wider than their particles.

    :return: what is found, and what helps.
    """
    tests = sum(site.curvature.number for site in sites)
    tests += sum(direction.number for direction in directions)
    probability = FALSE_ALARM / max(1, tests)
    number, times = 0, {}
    for site in sites:
        narrow = site.curvature.at_least(probability) > NARROW_CURVATURE
        if bool(narrow.any()):
            number += int(narrow.any(-1).sum())
            times[site.name] = times_as_wide(site.curvature.value.where(narrow, 0.0)).amax(-1)
    found = [_of_scalars(sites, number, times)] if times else []
    seen = times.keys()
    across = [d for d in directions if not seen & set(d.sites)]
    return found + _of_directions(sites, across, probability)


def unknown_directions(sites: Sequence[SiteDiagnosis], directions: Sequence[Direction]) -> str:
    """Say of which vectors too few particles are there to look across them; "" if of none."""
    by_name = {site.name: site for site in sites}
    seen = [d for d in directions if d.num_scalars <= MOST_SCALARS]
    few = [d for d in seen if by_name[d.sites[0]].num_particles < d.num_particles]
    if not few:
        return ""
    worst = max(few, key=lambda direction: direction.num_particles)
    return (
        f" Whether the posterior of {quoted(worst.sites)} is wider than its particles in a "
        f"direction across its {worst.num_scalars} scalars is not known: that takes "
        f"{worst.num_particles} particles or more, over all replicates."
    )


def _flat(marginal: Marginal, site: SiteDiagnosis, plates: frozenset[str]) -> tuple[Tensor, Tensor]:
    """
    Make batch dims that the index has not part of the event.

    :param plates: names of the plates of the index.
    :return: ``(*index plates, K, scalars)`` and ``(*index plates, K)``.
    """
    num_batch = len(marginal.batch_shape)
    kept = [dim for dim in range(num_batch) if site.plates[dim] in plates]
    others = [dim for dim in range(num_batch) if dim not in kept]
    samples = (
        marginal.samples.flatten(num_batch + 1)
        if marginal.event_shape
        else (marginal.samples.unsqueeze(-1))
    )
    samples = samples.permute(*kept, num_batch, *others, num_batch + 1)
    log_weights = marginal.log_weights.permute(*kept, num_batch, *others)
    first = log_weights.flatten(len(kept) + 1)[..., 0] if others else log_weights
    return samples.flatten(len(kept) + 1), first


def _of_scalars(
    sites: Sequence[SiteDiagnosis], number: int, times: Mapping[str, Tensor]
) -> tuple[str, tuple[str, ...]]:
    """
    Say which marginals are wider than their particles.

    :param number: of marginals.
    :param times: site -> how many times as wide each of its elements is.
    """
    by_name = {site.name: site for site in sites}
    most = {name: float(found.max()) for name, found in times.items()}
    worst = max(most, key=lambda name: most[name])
    element = by_name[worst].element(int(times[worst].reshape(-1).argmax()))
    finding = (
        f"{number} of {sum(site.ess.numel() for site in sites)} marginals have weights that rise "
        "towards their outermost particles: the particles are narrower than the posterior (most: "
        f"{element}, whose posterior is {multiple(most[worst])} as wide as its particles). "
        f"{CONSEQUENCE}"
    )
    return finding, tuple(widening([(by_name[name], times) for name, times in most.items()]))


def _of_directions(
    sites: Sequence[SiteDiagnosis], directions: Sequence[Direction], probability: float
) -> list[tuple[str, tuple[str, ...]]]:
    times = {}
    for direction in directions:
        narrow = direction.is_narrow(NARROW_DIRECTION, probability)
        if bool(narrow.any()):
            curvature = direction.of_all.value.where(narrow, 0.0)
            times[direction.sites] = (float(times_as_wide(curvature).max()), direction)
    if not times:
        return []
    most, worst = max(times.values(), key=lambda pair: pair[0])
    finding = (
        "Weights rise towards the outermost particles in a direction across the "
        f"{worst.num_scalars} scalars of {quoted(worst.sites)}: in this direction, the posterior "
        f"is {multiple(most)} as wide as the particles, though each scalar by itself may be no "
        f"wider. {CONSEQUENCE}"
    )
    by_name = {site.name: site for site in sites}
    narrow_sites = [by_name[name] for names in times for name in names]
    return [(finding, tuple(dependence(narrow_sites, most)))]
