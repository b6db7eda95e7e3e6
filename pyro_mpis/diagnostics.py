# SPDX-License-Identifier: Apache-2.0
r"""
How far to trust a posterior: what is poor, and what would help.

The effective sample size (ESS) of a site, :math:`1 / \sum_k w_k^2`, is the number of its particles
that carry its marginal; a moment's standard error is about the posterior sd over its root. Pareto
k-hat tells of weights whose tail is too heavy for that to hold; the spread of replicates, how sure
the log evidence is. None of them shows a part of the posterior that no particle is in.

Every threshold of the package stands here, and every sentence on what is below it.
"""

import math
import textwrap
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from pyro import settings
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._text import table
from pyro_mpis._typing import Distribution
from pyro_mpis.blocks import BlockSum, evidence_error
from pyro_mpis.dependencies import Structure
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.handlers import quoted, replay
from pyro_mpis.memory import largest_factor

# Of five even draws the mean is off by 0.45 posterior sds, and the 5 % and 95 % quantiles are the
# lowest and the highest of them.
LOW_ESS = 5.0
# From here on the weights' mean converges too slowly for any affordable number of particles
# (Vehtari et al., 2024, "Pareto smoothed importance sampling", JMLR 25).
HIGH_K_HAT = 0.7
# With nearly even weights, the tail that k-hat is fitted to is noise: it counts below this share.
UNEVEN_ESS = 0.5
# A standard error of the log evidence, in nats, of a factor of 1.6 either way.
LARGE_ERROR = 0.5
# Below two particles the weighted ones say nothing of the posterior's width, nor how many it takes.
TELLING_ESS = 2.0
# A proposal this many times wider than the posterior wastes most particles; one this much narrower
# has the weight on its outermost; one whose centre is this many of its sds off has few particles
# where the posterior is.
WIDE, NARROW, OFF_CENTRE = 3.0, 0.9, 1.5
# Factors of this many indices are where sharing one pays.
MANY_INDICES = 4
# Sites of the printed table: a chain of a thousand has its bottleneck in a few.
MOST_ROWS = 30
# Values of a discrete site, to sum over rather than draw.
SMALL_SUPPORT = 100


def _check_threshold(value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected a positive threshold, but found {value!r}.")


settings.register("mpis_low_ess", __name__, "LOW_ESS", _check_threshold)
settings.register("mpis_high_k_hat", __name__, "HIGH_K_HAT", _check_threshold)


@dataclass(frozen=True)
class SiteDiagnosis:
    """
    The weights of one site's particles, by plate element.

    :param name: the site.
    :param proposal: what its particles were drawn from: ``"guide"`` or ``"prior"``.
    :param num_particles: number of weights of each element.
    :param ess: effective sample size: ``batch_shape``.
    :param heaviest: share of the weight that the heaviest particle has: ``batch_shape``.
    :param pareto_k: Pareto k-hat, nan with fewer than about 50 particles: ``batch_shape``.
    :param plates: name of the plate of each batch dim, ``""`` for none.
    """

    name: str
    proposal: str
    num_particles: int
    ess: Tensor
    heaviest: Tensor
    pareto_k: Tensor
    plates: tuple[str, ...]

    @property
    def lowest_ess(self) -> float:
        """The effective sample size of the worst element."""
        return float(self.ess.min())

    @property
    def worst(self) -> str:
        """The element of the lowest effective sample size, as in ``theta[school=3]``."""
        return self.element(int(self.ess.reshape(-1).argmin()))

    @property
    def highest_k(self) -> float:
        """The highest k-hat of elements with uneven weights; nan where there is none."""
        uneven = self.ess < UNEVEN_ESS * self.num_particles
        known = self.pareto_k[uneven & ~self.pareto_k.isnan()]
        return float(known.max()) if known.numel() else math.nan

    def element(self, position: int) -> str:
        """Name the element at a position of the flattened batch shape."""
        parts = []
        for size, plate in zip(reversed(self.ess.shape), reversed(self.plates), strict=True):
            position, number = divmod(position, size)
            if plate or size > 1:
                parts.append(f"{plate}={number}" if plate else str(number))
        return f"{self.name}[{', '.join(reversed(parts))}]" if parts else self.name


@dataclass(frozen=True)
class Problem:
    """What is poor, and what would help."""

    found: str
    helps: tuple[str, ...]

    def __str__(self) -> str:
        """Return both as one paragraph."""
        return " ".join((self.found, *self.helps))


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """
    What :meth:`~pyro_mpis.MPImportance.diagnose` finds; ``str()`` says it in words.

    :param sites: of every site that has particles, in the model's order.
    :param problems: what is poor; empty if nothing is.
    :param log_evidences: of each replicate, -inf for an evidence of zero: ``(replicates,)``.
    :param log_evidence: of all replicates together.
    :param evidence_error: its standard error, None of a single replicate.
    """

    sites: tuple[SiteDiagnosis, ...]
    problems: tuple[Problem, ...]
    log_evidences: Tensor
    log_evidence: float
    evidence_error: float | None

    @property
    def bottleneck(self) -> SiteDiagnosis | None:
        """The site of the lowest effective sample size; None of a model without particles."""
        return min(self.sites, key=lambda site: site.lowest_ess, default=None)

    def __str__(self) -> str:
        """Return the table and the sentences."""
        parts = [_evidence_line(self), *([_table(self.sites)] if self.sites else [])]
        if self.problems:
            for problem in self.problems:
                lines = ["Poor: " + problem.found, *(f"- {text}" for text in problem.helps)]
                parts.append("\n".join(_wrapped(line) for line in lines))
        else:
            parts.append(_wrapped(_good(self)))
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        """Return a line: the whole is printed."""
        return f"<Diagnosis: problems {len(self.problems)}, sites {len(self.sites)}>"


def diagnose(
    total: BlockSum, marginals: Mapping[str, Marginal], sampled: Set[str], log_evidences: Tensor
) -> Diagnosis:
    """
    Judge the weights of every site, and the evidence.

    Draws nothing. Runs the model once, at single values, if something is poor.

    :param total: any replicate.
    :param marginals: of every site, over all replicates.
    :param sampled: the sites that have particles, not their whole support or a fixed value.
    :param log_evidences: of every replicate, -inf for an evidence of zero.
    """
    structure = total.builder.structure
    sites = tuple(
        _site(structure, name, marginals[name])
        for name, origin in structure.origins.items()
        if name in sampled and origin != "model_delta"
    )
    problems = [
        *_no_observation(structure),
        *_low_ess(total, marginals, sites),
        *_heavy_tails(sites),
        *_unsure_evidence(log_evidences),
    ]
    number = len(log_evidences)
    return Diagnosis(
        sites=sites,
        problems=tuple(problems),
        log_evidences=log_evidences,
        log_evidence=float(log_evidences.logsumexp(0)) - math.log(number),
        evidence_error=evidence_error(log_evidences) if number > 1 else None,
    )


def _site(structure: Structure, name: str, marginal: Marginal) -> SiteDiagnosis:
    own = structure.model[name]
    dims = {plate.dim: plate.name for plate in map(structure.plates.__getitem__, own.plates)}
    batch_dims = [d for d in range(-len(own.batch_shape), 0) if d not in own.undeclared]
    return SiteDiagnosis(
        name=name,
        proposal="prior" if structure.origins[name] == "prior" else "guide",
        num_particles=marginal.log_weights.shape[-1],
        ess=marginal.ess.double().cpu(),
        heaviest=marginal.weights.amax(-1).double().cpu(),
        pareto_k=marginal.pareto_k.double().cpu(),
        plates=tuple(dims.get(dim, "") for dim in batch_dims),
    )


def _no_observation(structure: Structure) -> list[Problem]:
    if structure.model.keys() - structure.origins.keys():
        return []
    return [
        Problem(
            "The model observes nothing, so that the posterior is the prior.",
            (
                "Give it the data: pyro.sample(..., obs=data) where data is not None, or "
                "pyro.condition with the names of the model's sites.",
            ),
        )
    ]


def _low_ess(
    total: BlockSum, marginals: Mapping[str, Marginal], sites: tuple[SiteDiagnosis, ...]
) -> list[Problem]:
    poor = [site for site in sites if site.lowest_ess < LOW_ESS]
    if not poor:
        return []
    worst = min(poor, key=lambda site: site.lowest_ess)
    number = sum(int((site.ess < LOW_ESS).sum()) for site in poor)
    found = (
        f"{number} of {sum(site.ess.numel() for site in sites)} marginals have an effective sample "
        f"size below {LOW_ESS:g} (lowest: {worst.worst}, {worst.lowest_ess:.1f} of "
        f"{worst.num_particles} particles): their moments and quantiles rest on a handful of "
        "particles."
    )
    uneven = [site for site in poor if site.lowest_ess < UNEVEN_ESS * site.num_particles]
    helps = _site_helps(total, marginals, uneven, len(sites)) if uneven else []
    helps.append(_more_particles(total, worst))
    helps += _grouping(total, sites)
    return [Problem(found, tuple(helps))]


def _site_helps(
    total: BlockSum,
    marginals: Mapping[str, Marginal],
    uneven: list[SiteDiagnosis],
    num_sites: int,
) -> list[str]:
    """
    Say what would help the sites with uneven weights, by what each of them is.

    :param num_sites: of all sites that have particles.
    """
    helps: list[str] = []
    fns = _distributions(total, marginals)
    sizes = {site.name: _support_size(fns[site.name]) for site in uneven}
    small = {name: size for name, size in sizes.items() if size and size <= SMALL_SUPPORT}
    for name, size in small.items():
        helps.append(
            f"'{name}' has only {size} values: marked infer={{'enumerate': 'parallel'}}, it is "
            "summed over them exactly and needs no particles."
        )
    for site in uneven:
        length = fns[site.name].event_shape.numel()
        if isinstance(fns[site.name], torch.distributions.Independent) and length > 1:
            helps.append(
                f"'{site.name}' is a vector of {length} elements with one particle index, and a "
                "particle must be good in all of them at once. If each of its readers reads one "
                "element, draw it in a pyro.plate in place of .to_event."
            )
    others = [site for site in uneven if site.name not in small]
    if others:
        worst = min(others, key=lambda site: site.lowest_ess)
        indices = [index for index in total.builder.structure.indices if not index.enumerated]
        helps.append(_better_guide(worst, marginals[worst.name], len(indices), num_sites))
    return helps


def _distributions(total: BlockSum, marginals: Mapping[str, Marginal]) -> dict[str, Distribution]:
    """Return the distribution that the model has at each site, from a run at single values."""
    values = {}
    for name, marginal in marginals.items():
        site, dim = total.whole.values[name], len(marginal.batch_shape)
        heaviest = marginal.log_weights.argmax(-1, keepdim=True)
        heaviest = heaviest.reshape(heaviest.shape + (1,) * len(marginal.event_shape))
        value = torch.take_along_dim(marginal.samples, heaviest, dim).squeeze(dim)
        values[name] = site.ordinary(site.padded(value, left=0), left=0)
    with total.builder.environment.entered():
        sites = replay(total.builder.programs, "model", values=values, enumerated={}, num_samples=1)
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
    source = "the prior" if site.proposal == "prior" else "the guide"
    remedy = (
        "A guide for it (AutoNormal trained by SVI, or a pyro.sample in a guide of your own) puts "
        "the particles where they count."
        if site.proposal == "prior"
        else "Train the guide further, or let the site read in it those that it depends on."
    )
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
            f"{name} is drawn from {source}, only {narrow:.1f} times as wide as its posterior: "
            "make the guide wider."
        )
    if num_indices == 1 and num_sites > 1:
        return (
            "The guide draws all sites as one, so that they share one particle index. With a "
            "distribution for each site (AutoNormal) all combinations of their particles count."
        )
    covered = (
        f"{name} is drawn from {source}, which covers its posterior ({wide:.1f} times as wide)"
    )
    if num_sites == 1:
        return f"{covered}: more particles are all it takes."
    return (
        f"{covered}. What makes its weights uneven besides is how few particles there are of the "
        "sites that it is combined with: more of all help, or a guide in which it reads the sites "
        "it depends on."
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


def _more_particles(total: BlockSum, worst: SiteDiagnosis) -> str:
    """Say what more particles would cost."""
    structure, num_samples = total.builder.structure, total.builder.particles.num_samples
    telling = worst.lowest_ess >= TELLING_ESS
    factor = max(2.0, LOW_ESS / worst.lowest_ess) if telling else 2.0
    larger = math.ceil(num_samples * factor)
    site, now = largest_factor(structure, num_samples)
    _, then = largest_factor(structure, larger)
    promise = (
        f"would make the lowest about {worst.lowest_ess * larger / num_samples:.0f}."
        if telling
        else "may not be enough: an ESS this low does not tell how many are."
    )
    return (
        f"Raise num_samples: {larger} {promise} The largest factor, that of '{site.name}', then "
        f"takes {_size(then)} in place of {_size(now)}. More replicates (num_replicates) raise the "
        "ESS too, and take time, not memory."
    )


def _grouping(total: BlockSum, sites: tuple[SiteDiagnosis, ...]) -> list[str]:
    """Say which sites could share an index, where one factor reads many."""
    structure = total.builder.structure
    largest, _ = largest_factor(structure, total.builder.particles.num_samples)
    symbols = {s for s in structure.reads(largest) if not structure.by_symbol[s].enumerated}
    if len(symbols) < MANY_INDICES:
        return []
    values = total.whole.values
    even: dict[str, str] = {}  # index -> a site of it
    for site in sites:
        indices = values[site.name].indices
        alone = len(indices) == 1 and indices in symbols
        if alone and not structure.by_symbol[indices].plates:
            if site.lowest_ess >= UNEVEN_ESS * site.num_particles:
                even.setdefault(indices, site.name)
    text = (
        f"The factor of '{largest.name}' reads {len(symbols)} particle indices, so that its size "
        f"grows as the power of {len(symbols)} of num_samples."
    )
    if len(even) < 2:
        return [f"{text} Sites that share an index (groups=) lower that power."]
    names = quoted(even.values())
    return [
        f"{text} With groups=[({names})], whose weights are even, it would grow as the power of "
        f"{len(symbols) - len(even) + 1}, and leave memory for more particles."
    ]


def _heavy_tails(sites: tuple[SiteDiagnosis, ...]) -> list[Problem]:
    heavy = [site for site in sites if site.highest_k > HIGH_K_HAT]
    if not heavy:
        return []
    worst = max(heavy, key=lambda site: site.highest_k)
    uneven = worst.ess < UNEVEN_ESS * worst.num_particles
    highest = worst.pareto_k.masked_fill(~uneven | worst.pareto_k.isnan(), -math.inf)
    number = sum(
        int(((s.pareto_k > HIGH_K_HAT) & (s.ess < UNEVEN_ESS * s.num_particles)).sum())
        for s in heavy
    )
    found = (
        f"{number} of {sum(site.ess.numel() for site in sites)} marginals have a Pareto k-hat "
        f"above {HIGH_K_HAT} (highest: {worst.element(int(highest.reshape(-1).argmax()))}, "
        f"{worst.highest_k:.2f}): the tail of their weights is too heavy, and more particles help "
        "only slowly."
    )
    remedy = (
        "Use a wider guide for these sites: one that is narrower than the posterior gives rare "
        "particles enormous weights."
        if worst.proposal == "guide"
        else "The prior has few particles where the posterior is: use a guide for these sites, "
        "rather too wide than too narrow."
    )
    return [Problem(found, (remedy,))]


def _unsure_evidence(log_evidences: Tensor) -> list[Problem]:
    problems = []
    number = len(log_evidences)
    lost = int((log_evidences == -math.inf).sum())
    if lost:
        problems.append(
            Problem(
                f"{lost} of {number} replicates have an evidence of zero: all their particles are "
                "impossible.",
                ("Raise num_samples, or use a guide nearer to the posterior.",),
            )
        )
    error = evidence_error(log_evidences) if number > 1 else 0.0
    if error > LARGE_ERROR:
        problems.append(
            Problem(
                f"The log evidence has a standard error of {error:.1f} nats over {number} "
                f"replicates, a factor of {math.exp(error):.1f} either way.",
                (
                    f"Four times the replicates halve it (num_replicates={4 * number}); particles "
                    "nearer to the posterior lower it at once.",
                ),
            )
        )
    return problems


def _evidence_line(diagnosis: Diagnosis) -> str:
    number = len(diagnosis.log_evidences)
    error = (
        "one set of particles: num_replicates=8 would tell how sure it is"
        if diagnosis.evidence_error is None
        else f"standard error {diagnosis.evidence_error:.2g} over {number} replicates"
    )
    return f"log evidence {diagnosis.log_evidence:.2f} ({error})"


def _table(sites: tuple[SiteDiagnosis, ...]) -> str:
    header = ("site", "from", "particles", "ESS, lowest", "of", "median", "heaviest", "k-hat")
    lines: list[tuple[str, ...]] = [header]
    by_ess = sorted(sites, key=lambda site: site.lowest_ess)
    shown = {site.name for site in by_ess[:MOST_ROWS]}
    for site in sites:
        if site.name not in shown:
            continue
        k_hat = "-" if math.isnan(site.highest_k) else f"{site.highest_k:.2f}"
        lines.append(
            (
                site.name,
                site.proposal,
                str(site.num_particles),
                f"{site.lowest_ess:.1f}",
                site.worst,
                f"{float(site.ess.median()):.1f}",
                f"{float(site.heaviest.max()):.2f}",
                k_hat,
            )
        )
    text = table(lines, left=(0, 1, 4))
    if len(sites) > len(shown):
        text += f"\nand {len(sites) - len(shown)} sites of higher ESS"
    return text


def _good(diagnosis: Diagnosis) -> str:
    worst = diagnosis.bottleneck
    if worst is None:
        return (
            "No site has particles: each is summed over its whole support, or fixed by the guide."
        )
    return (
        f"Nothing is poor. The lowest ESS is that of {worst.worst}: {worst.lowest_ess:.1f} of "
        f"{worst.num_particles} particles. None of these numbers shows a part of the posterior "
        "that no particle is in: where that is to be feared, compare with a wider proposal."
    )


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 88, subsequent_indent=indent, break_on_hyphens=False)
