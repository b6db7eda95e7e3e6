# SPDX-License-Identifier: Apache-2.0
"""
What would help where effective sample sizes are low.

Only what can be measured is said: the width and the centre of a site's particles against its
posterior, the size of supports and of factors, and what more particles would cost.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import pyro
import torch
from torch.distributions import constraints

from pyro_mpis._text import quoted
from pyro_mpis._typing import Distribution
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.particles.memory import largest_factor
from pyro_mpis.programs.messages import statements
from pyro_mpis.programs.runs import run_at
from pyro_mpis.programs.structure import Structure
from pyro_mpis.replicate import BlockSum
from pyro_mpis.results.site_diagnosis import SiteDiagnosis

# With an ESS below two, the weighted particles tell neither the posterior's width nor how many
# particles are needed.
TELLING_ESS = 2.0
# A proposal this many times wider than the posterior wastes most particles. One this much narrower
# has the weight on its outermost particles. One whose centre is this many of its sds off has few
# particles where the posterior is.
WIDE, NARROW, OFF_CENTRE = 3.0, 0.9, 1.5
# Factors of this many indices are where sharing one pays.
MANY_INDICES = 4
# By more than this weights do not tell how many times wider than its particles a posterior is.
MOST_TIMES = 4.0
# Sites that a text names.
MOST_NAMES = 4
# A discrete site of at most this many values is better summed over than drawn.
SMALL_SUPPORT = 100
# Where adapt has made the guide.
LEARNED = (
    "The guide that adapt found is not close to the posterior here. Call adapt again from another "
    "seed (pyro.set_rng_seed), or draw more particles. docs/adapting.md says which posteriors are "
    "hard for a guide of this kind."
)
# By what particles are drawn from.
BETTER = {
    "prior": "A guide puts the particles where they count: MPImportance(model).adapt(...) learns "
    "one, or train one by SVI (AutoNormal, or a guide of your own).",
    "guide": "Train the guide further, or let the site read in it those that it depends on.",
    "learned guide": LEARNED,
}
# Against a heavy tail of the weights, by the same.
LIGHTER_TAIL = {
    "prior": "The prior has few particles where the posterior is: use a guide for these sites, "
    "rather too wide than too narrow.",
    "guide": "Make the guide wider at these sites. Where it is narrower than the posterior, a rare "
    "particle gets a very large weight.",
    "learned guide": "See whether the answers stay if you call adapt and run again from another "
    "seed (pyro.set_rng_seed). docs/adapting.md says which posteriors are hard for a learned "
    "guide.",
}


def remedies(
    block_sum: BlockSum,
    marginals: Mapping[str, Marginal],
    sites: Sequence[SiteDiagnosis],
    enough: float,
) -> list[str]:
    """
    Say what would raise the effective sample sizes that are too low.

    Draws nothing. Runs the model once, at single values, if some weights are uneven.

    :param sites: all sites that have particles.
    :param enough: the effective sample size to reach.
    """
    poor = [site for site in sites if site.lowest_ess < enough]
    worst = min(poor, key=lambda site: site.lowest_ess)
    uneven = [site for site in poor if bool(site.uneven.any())]
    helps = _site_helps(block_sum, marginals, uneven, len(sites)) if uneven else []
    return [*helps, _more_particles(block_sum, worst, enough), *_grouping(block_sum, sites)]


def widening(times: Sequence[tuple[SiteDiagnosis, float]]) -> list[str]:
    """
    Say what helps sites whose particles are too narrow.

    :param times: how many times as wide as its particles the posterior of each is.
    """
    helps = []
    guided = sorted((f, site.name) for site, f in times if site.proposal == "guide")[::-1]
    if guided:
        factors = [f"'{name}' by {multiple(factor)}" for factor, name in guided[:MOST_NAMES]]
        if len(guided) > MOST_NAMES:
            factors.append(f"{len(guided) - MOST_NAMES} more")
        helps = [
            f"Widen the guide ({', '.join(factors)}): multiply its scales, and run again. If the "
            "log evidence rises by more than its error, it was too narrow; then widen it again.",
            "Train it until its ELBO no longer rises. A guide whose sites do not read each other, "
            "as AutoNormal, stays narrower than the posterior where they depend on each other: "
            "multiply its scales by 2 or so after training, or let sites read each other in it.",
            "Or leave these sites out of the guide. They are then drawn from the prior, which is "
            "rarely too narrow, but may need many particles.",
        ]
    if any(site.proposal == "learned guide" for site, _ in times):
        helps.append(LEARNED)
    drawn = [site.name for site, _ in times if site.proposal == "prior"]
    if drawn:
        helps.append(_in_tails(drawn))
    return helps


def dependence(sites: Sequence[SiteDiagnosis], times: float) -> list[str]:
    """
    Say what helps sites whose particles are too narrow in a direction across several scalars.

    :param times: how many times as wide as its particles the posterior is at most.
    """
    helps = []
    if any(site.proposal == "guide" for site in sites):
        helps = [
            "Let these scalars depend on each other in the guide: draw a vector from a "
            "MultivariateNormal whose scale_tril is a parameter, let a site read another, or use "
            "AutoMultivariateNormal. An AutoNormal, and any other guide in which they are "
            "independent, stays narrower than the posterior however long it is trained.",
            f"Or multiply the scales of the guide by up to {multiple(times)}, and run again with "
            "more particles. If the log evidence rises by more than its error, it was too narrow.",
        ]
    if any(site.proposal == "learned guide" for site in sites):
        helps.append(LEARNED)
    drawn = [site.name for site in sites if site.proposal == "prior"]
    if drawn:
        helps.append(_in_tails(drawn))
    return helps


def _in_tails(names: Sequence[str]) -> str:
    return (
        f"{quoted(names[:MOST_NAMES])}: drawn from the prior, but the posterior lies in the "
        "prior's tails. Use a guide that has more particles there."
    )


def multiple(times: float) -> str:
    """Write how many times, as far as it is known."""
    return f"{MOST_TIMES:g} times or more" if times >= MOST_TIMES else f"{times:.1f} times"


def _site_helps(
    block_sum: BlockSum,
    marginals: Mapping[str, Marginal],
    uneven: list[SiteDiagnosis],
    num_sites: int,
) -> list[str]:
    """
    Say what would help the sites with uneven weights, by what each of them is.

    :param num_sites: of all sites that have particles.
    """
    helps: list[str] = []
    fns = _distributions(block_sum, marginals)
    sizes = {site.name: _support_size(fns[site.name]) for site in uneven}
    small = {name: size for name, size in sizes.items() if size and size <= SMALL_SUPPORT}
    for name, size in small.items():
        helps.append(
            f"'{name}' has only {size} values: marked infer={{'enumerate': 'parallel'}}, it is "
            "summed over them exactly and needs no particles."
        )
    for site in uneven:
        fn = fns[site.name]
        if isinstance(fn, torch.distributions.Independent) and fn.event_shape.numel() > 1:
            helps.append(
                f"'{site.name}' is a vector of {fn.event_shape.numel()} elements with one particle "
                "index, and a particle must be good in all of them at once. If each of its "
                "readers reads one element, draw it in a pyro.plate in place of .to_event."
            )
    others = [site for site in uneven if site.name not in small]
    if others:
        worst = min(others, key=lambda site: site.lowest_ess)
        indices = [index for index in block_sum.replicate.structure.indices if not index.enumerated]
        helps.append(_better_guide(worst, marginals[worst.name], len(indices), num_sites))
    return helps


def _distributions(
    block_sum: BlockSum, marginals: Mapping[str, Marginal]
) -> dict[str, Distribution]:
    """Return the distribution that the model has at each site, from a run at single values."""
    values = {}
    for name, marginal in marginals.items():
        site, dim = block_sum.whole.values[name], len(marginal.batch_shape)
        heaviest = marginal.log_weights.argmax(-1, keepdim=True)
        heaviest = heaviest.reshape(heaviest.shape + (1,) * len(marginal.event_shape))
        value = torch.take_along_dim(marginal.samples, heaviest, dim).squeeze(dim)
        values[name] = site.ordinary(site.padded(value, left=0), left=0)
    with block_sum.replicate.environment.entered():
        with pyro.validation_enabled(False):
            sites = statements(run_at(block_sum.replicate.programs, "model", values))
    return {name: site["fn"] for name, site in sites.items()}


def _support_size(fn: Distribution) -> int | None:
    """Return the number of values that a distribution takes, if they can be enumerated."""
    support = fn.support
    if not fn.has_enumerate_support:
        return None
    if support is constraints.boolean:
        return 2
    if support is constraints.one_hot:
        return int(fn.event_shape[-1])
    if isinstance(support, constraints.integer_interval):
        lower, upper = (torch.as_tensor(b) for b in (support.lower_bound, support.upper_bound))
        return int(upper.max()) - int(lower.min()) + 1
    return None


def _better_guide(site: SiteDiagnosis, marginal: Marginal, num_indices: int, num_sites: int) -> str:
    """
    Compare the worst element's particles with its posterior.

    :param num_indices: of all sites that have particles, as is ``num_sites``.
    """
    name = site.worst
    source = f"the {site.proposal}"
    remedy = BETTER[site.proposal]
    wide, narrow, off = _mismatch(marginal, int(site.ess.reshape(-1).argmin()))
    if site.lowest_ess < TELLING_ESS or math.isinf(wide):
        return f"{name} is drawn from {source}, with most of the weight on one value. {remedy}"
    if wide >= WIDE:
        return f"{name} is drawn from {source}, {wide:.0f} times as wide as its posterior. {remedy}"
    if off >= OFF_CENTRE:
        return (
            f"{name} is drawn from {source}, whose centre is {off:.1f} of its sds off the "
            f"posterior mean. {remedy}"
        )
    if narrow <= NARROW:
        return (
            f"{name} is drawn from {source}, only {narrow:.1f} times as wide as its posterior. "
            + ("Make the guide wider." if site.proposal == "guide" else remedy)
        )
    if num_indices == 1 and num_sites > 1 and site.proposal != "learned guide":
        return (
            "The guide draws all sites as one, so that they share one particle index. With a "
            "distribution for each site (AutoNormal) all combinations of their particles count."
        )
    covered = (
        f"{name} is drawn from {source}, which covers its posterior ({wide:.1f} times as wide)"
    )
    if num_sites == 1:
        return f"{covered}: more particles are all it takes."
    what_helps = "More particles of all sites help"
    if site.proposal != "learned guide":
        what_helps += ", or a guide in which it reads the sites that it depends on"
    return (
        f"{covered}. Its weights are uneven because the sites that it is combined with have few "
        f"particles. {what_helps}."
    )


def _mismatch(marginal: Marginal, position: int) -> tuple[float, float, float]:
    """
    Compare the particles of an element without and with their weights.

    :return: the highest and the lowest ratio of their standard deviations over the scalars of an
        event, and the largest distance of their means in those of the particles.
    """
    num_batch = len(marginal.batch_shape)
    weights = marginal.weights.flatten(0, -2)[position] if num_batch else marginal.weights
    samples = marginal.samples
    samples = samples.flatten(0, num_batch - 1)[position] if num_batch else samples
    samples = samples.double().flatten(1) if samples.dim() > 1 else samples.double()[:, None]
    weights = weights.double()[:, None]
    mean, centre = (weights * samples).sum(0), samples.mean(0)
    sd = (weights * (samples - mean).square()).sum(0).sqrt()
    spread = samples.std(0, correction=0)
    ratios, distances = spread / sd, (mean - centre).abs() / spread
    ratios = torch.where(ratios.isnan(), 1.0, ratios)  # no spread at all: a fixed value
    return float(ratios.max()), float(ratios.min()), float(distances.nan_to_num(0.0).max())


def _more_particles(block_sum: BlockSum, worst: SiteDiagnosis, enough: float) -> str:
    """Say what more particles would cost."""
    structure = block_sum.replicate.structure
    counts = {index.num_samples for index in structure.indices if not index.enumerated}
    read = block_sum.whole.values[worst.name].indices
    own = [i for i in structure.indices if i.symbol in read and not i.enumerated]
    index = max(own, key=lambda index: len(index.plates))
    num_samples = index.num_samples
    telling = worst.lowest_ess >= TELLING_ESS
    factor = max(2.0, enough / worst.lowest_ess) if telling else 2.0
    larger = math.ceil(num_samples * factor)
    raised = {other.symbol for other in structure.indices} if len(counts) == 1 else {index.symbol}
    site, now = largest_factor(structure)
    _, then = largest_factor(_with_more(structure, raised, larger))
    promise = (
        f"would make the lowest about {worst.lowest_ess * larger / num_samples:.0f}."
        if telling
        else "may not be enough: an ESS this low does not tell how many are."
    )
    named = (
        index.sites[0] if index.sites[0] in structure.model else worst.name
    )  # not the guide's own
    of_site = "" if len(counts) == 1 else f" of '{named}'"
    return (
        f"Raise num_samples{of_site}: {larger} {promise} The largest factor, that of "
        f"'{site.name}', then takes {_size(then)} in place of {_size(now)}. More replicates "
        "(num_replicates) raise the ESS too, and take time, not memory."
    )


def _with_more(structure: Structure, symbols: Set[str], number: int) -> Structure:
    """Return a structure with another number of particles of some indices."""
    indices = [
        replace(index, num_samples=number) if index.symbol in symbols else index
        for index in structure.indices
    ]
    return replace(structure, indices=tuple(indices))


def _grouping(block_sum: BlockSum, sites: Sequence[SiteDiagnosis]) -> list[str]:
    """Say which sites could share an index, where one factor reads many."""
    structure = block_sum.replicate.structure
    largest, _ = largest_factor(structure)
    symbols = {s for s in structure.indices_read(largest) if not structure.by_symbol[s].enumerated}
    if len(symbols) < MANY_INDICES:
        return []
    values = block_sum.whole.values
    even: dict[str, str] = {}  # index -> a site of it
    for site in sites:
        indices = values[site.name].indices
        alone = len(indices) == 1 and indices in symbols
        if alone and not structure.by_symbol[indices].plates:
            if not bool(site.uneven.any()):
                even.setdefault(indices, site.name)
    text = (
        f"The factor of '{largest.name}' reads {len(symbols)} particle indices, so its size grows "
        f"as num_samples to the power of {len(symbols)}."
    )
    if len(even) < 2:
        return [f"{text} Sites that share an index (groups=) lower that power."]
    names = quoted(even.values())
    return [
        f"{text} With groups=[({names})], whose weights are even, it would grow as num_samples to "
        f"the power of {len(symbols) - len(even) + 1}, and leave memory for more particles."
    ]


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
