# SPDX-License-Identifier: Apache-2.0
r"""
How far to trust a posterior: what is poor.

The effective sample size (ESS) of a site, :math:`1 / \sum_k w_k^2`, is the number of its particles
that carry its marginal. A moment's standard error is about the posterior sd over the ESS's root.
Pareto k-hat tells of weights whose tail is too heavy for that to hold, and the spread of replicates
tells how sure the log evidence is. All of them are good where particles are much too narrow; that
shows in how the weights bend (``narrowness``). Nothing shows a mode that no particle is in.

What counts as poor is decided here, for ``diagnose``, ``summary`` and the plots alike.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro import settings
from torch import Tensor

from pyro_mpis._text import data_frame, html_table, table
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.programs.structure import Structure
from pyro_mpis.replicate import BlockSum
from pyro_mpis.results.directions import Direction
from pyro_mpis.results.remedies import LIGHTER_TAIL, remedies
from pyro_mpis.results.site_diagnosis import SiteDiagnosis, diagnose_site
from pyro_mpis.results.width import directions_of, too_narrow, unknown_directions

if TYPE_CHECKING:
    from pandas import DataFrame

# Of five even draws the mean is off by 0.45 posterior sds, and the 5 % and 95 % quantiles are the
# lowest and the highest of them.
LOW_ESS = 5.0
# From here on the weights' mean converges too slowly for any affordable number of particles
# (Vehtari et al., 2024, "Pareto smoothed importance sampling", JMLR 25).
HIGH_K_HAT = 0.7
# From here on it may not converge at all: the weights have no mean.
INFINITE_K_HAT = 1.0
# A standard error of the log evidence, in nats: a factor of 1.6 either way.
LARGE_ERROR = 0.5
# Of fewer replicates, the spread is known to a quarter or worse, and usually too small.
FEW_REPLICATES = 8
# With a replicate that has this share of the evidence, the spread is that of a single number.
HEAVY_REPLICATE = 0.5
# Sites of the printed table: a chain of a thousand has its bottleneck in a few.
MOST_ROWS = 30
COLUMNS = ("site", "from", "particles", "ESS, lowest", "of", "median", "heaviest", "k-hat")


def _check_threshold(value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected a positive threshold, but found {value!r}.")


settings.register("mpis_low_ess", __name__, "LOW_ESS", _check_threshold)
settings.register("mpis_high_k_hat", __name__, "HIGH_K_HAT", _check_threshold)


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
    What :meth:`~pyro_mpis.MPImportance.diagnose` finds.

    ``print`` it in a terminal; in a notebook it shows itself.

    :param sites: the weights of every site that has particles, in the model's order.
    :param problems: what is poor, and what would help; empty if nothing is poor.
    :param log_evidences: the log evidence of each replicate, ``(replicates,)``; -inf for zero.
    :param log_evidence: the log evidence of all replicates together.
    :param evidence_error: its standard error; None if there is a single replicate.
    :param directions: across the scalars that each particle index draws, whether the posterior is
        wider than the particles.
    """

    sites: tuple[SiteDiagnosis, ...]
    problems: tuple[Problem, ...]
    log_evidences: Tensor
    log_evidence: float
    evidence_error: float | None
    directions: tuple[Direction, ...] = ()

    @property
    def bottleneck(self) -> SiteDiagnosis | None:
        """The site of the lowest effective sample size; None if no site has particles."""
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

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table and the sentences as a notebook shows them."""
        rows, rest = _rows(self.sites)
        parts = [f"<p>{html.escape(_evidence_line(self))}</p>"]
        if self.sites:
            parts.append(html_table([COLUMNS, *rows], rest))
        for problem in self.problems:
            helps = "".join(f"<li>{html.escape(text)}</li>" for text in problem.helps)
            parts.append(f"<p>Poor: {html.escape(problem.found)}</p><ul>{helps}</ul>")
        if not self.problems:
            parts.append(f"<p>{html.escape(_good(self))}</p>")
        return "".join(parts)

    def to_dataframe(self) -> "DataFrame":
        """
        Return the weights of the sites as a pandas ``DataFrame``, indexed by the sites' names.

        ``worst`` is the plate element of ``lowest_ess``, ``heaviest`` the largest single weight.

        :raises ImportError: without pandas.
        """
        columns: dict[str, list[object]] = {
            "site": [site.name for site in self.sites],
            "proposal": [site.proposal for site in self.sites],
            "particles": [site.num_particles for site in self.sites],
            "lowest_ess": [site.lowest_ess for site in self.sites],
            "worst": [site.worst for site in self.sites],
            "median_ess": [float(site.ess.median()) for site in self.sites],
            "heaviest": [float(site.heaviest.max()) for site in self.sites],
            "k_hat": [site.highest_k for site in self.sites],
        }
        return data_frame(columns).set_index("site")


def diagnose(
    block_sum: BlockSum, marginals: Mapping[str, Marginal], sampled: Set[str], log_evidences: Tensor
) -> Diagnosis:
    """
    Judge the weights of every site, and the evidence.

    Draws nothing. Runs the model once, at single values, if the weights of a site are poor.

    :param block_sum: any replicate.
    :param marginals: of every site, over all replicates.
    :param sampled: the sites that have particles, not their whole support or a fixed value.
    :param log_evidences: of every replicate, -inf for an evidence of zero.
    """
    structure = block_sum.replicate.structure
    guide = "learned guide" if block_sum.replicate.programs.is_learned else "guide"
    possible = int((log_evidences > -math.inf).sum())
    sites = tuple(
        diagnose_site(structure, name, marginals[name], possible, guide)
        for name, origin in structure.origins.items()
        if name in sampled and origin != "model_delta"
    )
    directions = directions_of(structure, block_sum.whole.values, marginals, sites, possible)
    problems = [
        *_no_observation(structure),
        *_low_ess(block_sum, marginals, sites),
        *_heavy_tails(sites),
        *_too_narrow(sites, directions),
        *_unsure_evidence(log_evidences),
    ]
    number = len(log_evidences)
    return Diagnosis(
        sites=sites,
        problems=tuple(problems),
        log_evidences=log_evidences,
        log_evidence=float(log_evidences.logsumexp(0)) - math.log(number),
        evidence_error=evidence_error(log_evidences) if number > 1 else None,
        directions=directions,
    )


def evidence_error(log_evidences: Tensor) -> float:
    """
    Return the standard error of the log of the mean evidence of several replicates.

    By the delta method: that of the mean evidence, relative to it.

    :param log_evidences: ``(replicates,)``; -inf is an evidence of zero.
    """
    number = len(log_evidences)
    ratios = (log_evidences - log_evidences.logsumexp(0)).exp() * number  # of mean one
    return float(ratios.std()) / math.sqrt(number)


def doubts_of_error(diagnosis: Diagnosis) -> list[str]:
    """Say why the standard error of the log evidence is not to be trusted, if it is not."""
    log_evidences, doubts = diagnosis.log_evidences, []
    number = len(log_evidences)
    if number < FEW_REPLICATES:
        doubts.append(
            f"Evidences are skewed, and {number} replicates rarely have a high one among them: an "
            f"error from so few is itself off by {50 * math.sqrt(2 / (number - 1)):.0f} % or more, "
            f"and usually too small. Ask for {FEW_REPLICATES} or more (num_replicates)."
        )
    share = float(log_evidences.softmax(0).max())
    if share > HEAVY_REPLICATE and number > 2:
        doubts.append(
            f"One replicate has {100 * share:.0f} % of the evidence of all {number}, so the spread "
            "is that of one number. More particles, or particles nearer to the posterior, make "
            "replicates alike."
        )
    problems = _too_narrow(diagnosis.sites, diagnosis.directions) + _heavy_tails(diagnosis.sites)
    if problems:
        doubts += [problem.found for problem in problems]
        doubts.append("diagnose() says what would help.")
    return doubts


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
    block_sum: BlockSum, marginals: Mapping[str, Marginal], sites: tuple[SiteDiagnosis, ...]
) -> list[Problem]:
    poor = [site for site in sites if site.lowest_ess < LOW_ESS]
    if not poor:
        return []
    worst = min(poor, key=lambda site: site.lowest_ess)
    number = sum(int((site.ess < LOW_ESS).sum()) for site in poor)
    finding = (
        f"{number} of {sum(site.ess.numel() for site in sites)} marginals have an effective sample "
        f"size below {LOW_ESS:g} (lowest: {worst.worst}, {worst.lowest_ess:.1f} of "
        f"{worst.num_particles} particles): their moments and quantiles rest on a handful of "
        "particles."
    )
    return [Problem(finding, tuple(remedies(block_sum, marginals, sites, LOW_ESS)))]


def _heavy_tails(sites: tuple[SiteDiagnosis, ...]) -> list[Problem]:
    heavy = [site for site in sites if site.highest_k > HIGH_K_HAT]
    if not heavy:
        return []
    worst = max(heavy, key=lambda site: site.highest_k)
    highest = worst.pareto_k.masked_fill(~worst.uneven | worst.pareto_k.isnan(), -math.inf)
    number = sum(int(((site.pareto_k > HIGH_K_HAT) & site.uneven).sum()) for site in heavy)
    consequence = (
        "their weights have a heavy tail. Answers are less exact than the ESS says, and more "
        "particles help less than usual."
        if worst.highest_k < INFINITE_K_HAT
        else "the tail of their weights is so heavy that averages may not settle, however many "
        "particles there are."
    )
    finding = (
        f"{number} of {sum(site.ess.numel() for site in sites)} marginals have a Pareto k-hat "
        f"above {HIGH_K_HAT} (highest: {worst.element(int(highest.reshape(-1).argmax()))}, "
        f"{worst.highest_k:.2f}): {consequence}"
    )
    return [Problem(finding, (LIGHTER_TAIL[worst.proposal],))]


def _too_narrow(
    sites: tuple[SiteDiagnosis, ...], directions: tuple[Direction, ...]
) -> list[Problem]:
    return [Problem(*found) for found in too_narrow(sites, directions)]


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
    if diagnosis.evidence_error is not None and doubts_of_error(diagnosis):
        error += ", not to be trusted"
    return f"log evidence {diagnosis.log_evidence:.2f} ({error})"


def _table(sites: tuple[SiteDiagnosis, ...]) -> str:
    rows, rest = _rows(sites)
    text = table([COLUMNS, *rows], left=(0, 1, 4))
    return f"{text}\n{rest}" if rest else text


def _rows(sites: tuple[SiteDiagnosis, ...]) -> tuple[list[tuple[str, ...]], str]:
    """Return the lines of the table, and what to say of the sites that it has no line for."""
    by_ess = sorted(sites, key=lambda site: site.lowest_ess)
    shown = {site.name for site in by_ess[:MOST_ROWS]}
    rows: list[tuple[str, ...]] = [
        (
            site.name,
            site.proposal,
            str(site.num_particles),
            f"{site.lowest_ess:.1f}",
            site.worst,
            f"{float(site.ess.median()):.1f}",
            f"{float(site.heaviest.max()):.2f}",
            "-" if math.isnan(site.highest_k) else f"{site.highest_k:.2f}",
        )
        for site in sites
        if site.name in shown
    ]
    left_out = len(sites) - len(shown)
    return rows, f"and {left_out} sites of higher ESS" if left_out else ""


def _good(diagnosis: Diagnosis) -> str:
    worst = diagnosis.bottleneck
    if worst is None:
        return (
            "No site has particles: each is summed over its whole support, or fixed by the guide."
        )
    return (
        f"Nothing is poor. The lowest ESS is that of {worst.worst}: {worst.lowest_ess:.1f} of "
        f"{worst.num_particles} particles. None of these numbers shows a mode of the posterior "
        "that no particle is in. If there may be one, compare with a wider proposal."
        f"{unknown_directions(diagnosis.sites, diagnosis.directions)}"
    )


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 88, subsequent_indent=indent, break_on_hyphens=False)
