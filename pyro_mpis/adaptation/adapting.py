# SPDX-License-Identifier: Apache-2.0
"""
From a model and its data to a proposal: the stages of :meth:`MPImportance.adapt`.

1. Discrete latents of finite support are marked for an exact sum.
2. A plate-structured Gaussian is fitted (:mod:`~pyro_mpis.adaptation.learner`), and moved to the
   moments that trial runs find (:mod:`~pyro_mpis.adaptation.trials`).
3. Where that cannot be done or does badly, a Gaussian for each latent is matched to the moments of
   trial runs alone (:mod:`~pyro_mpis.adaptation.moments`). Trial runs of both are compared: the
   evidence is unbiased whatever the proposal, and its log biased low, so the larger is the better.

Particles of trial runs are never used again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyro_mpis._typing import Program
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import MOST_IMAGES
from pyro_mpis.adaptation.layout import by_site, trees
from pyro_mpis.adaptation.learner import learnt, refitted
from pyro_mpis.adaptation.matching import matched
from pyro_mpis.adaptation.modes import Place, Spread, at_other_orders, told_of_orders
from pyro_mpis.adaptation.moments import ANEW, matched_by_moments
from pyro_mpis.adaptation.natural import Settings
from pyro_mpis.adaptation.numbers import by_latent
from pyro_mpis.adaptation.prepared import (
    Drawable,
    is_improper,
    left_to_prior,
    prepared,
    summable,
)
from pyro_mpis.adaptation.progress import Progress
from pyro_mpis.adaptation.start import Start, is_discrete, start_of
from pyro_mpis.adaptation.symmetries import Symmetries
from pyro_mpis.adaptation.trials import (
    MOST_TRIALS,
    OTHERS,
    TRIALS,
    Runs,
    Trial,
    fitting,
    replicates_for,
    shared_out,
    tried,
    with_numbers,
)
from pyro_mpis.blocks import run_plan
from pyro_mpis.options import Options
from pyro_mpis.planning import plan_of, programs_of
from pyro_mpis.programs.agreement import refuse_subsampling
from pyro_mpis.programs.masks import is_masked
from pyro_mpis.programs.messages import is_latent, statements
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.workers import Workers

FEW_REPLICATES, TREE_REPLICATES = 6, 12
FEWER_REPLICATES = 4  # where each has several images
SURE = 0.1  # sd of the log evidences of trial runs: all that have weight is found
LARGE = 0.2  # mass of a mode, relative to the largest, that is worth more trial runs
NEGLIGIBLE = 6.0  # nats below the mode of the most mass, from which on one is left out
LOW_ESS = 5.0  # of a trial's particles outside of plates
MOST_MOVES = 6  # of a guide towards the moments of trial runs
POINTS = (8, 4)  # at which derivatives are averaged; fewer where they take long
MUCH_WORK = 5e6  # densities times rows of the Hessian, of an iteration
MANY_NUMBERS = 400  # rows of the Hessian, above which the Gaussian is not fitted by gradients


@dataclass(frozen=True)
class Adapted:
    """A learned proposal, and how to run with it."""

    model: Program  # with marks of what is to be summed
    guide: AutoPlateNormal
    num_samples: dict[str | None, int]
    num_replicates: int
    log_evidence: float  # of the last trial
    ess: float  # smallest of its particles
    problems: list[str] = field(default_factory=list)  # what the user is to be told


@dataclass(frozen=True)
class _Candidate:
    guide: AutoPlateNormal
    trial: Trial
    settled: bool
    numbers: dict[str, int]  # of particles
    replicates: int
    told: Sequence[str] = ()  # what the user is to be told of its modes

    @property
    def is_good(self) -> bool:
        """Whether its trial runs agree, and rest on more than a few particles."""
        return self.settled and self.trial.is_good(LOW_ESS)


def adapted(
    model: Program,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    options: Options,
    *,
    show_progress: bool,
) -> Adapted:
    """
    Learn a proposal; draws random numbers.

    :raises ValueError: if the model has no continuous latent, or does not fit the data.
    """
    with Progress(show_progress) as progress:
        start = started(model, args, kwargs, options)
        problems: list[str] = []
        learners = [_by_gradients, _by_moments]
        if trees(start.structure, start.priors):
            learners.insert(0, _by_trees)
        if start.supports and POINTS[0] * start.work > MUCH_WORK:
            learners = [_by_moments]  # gradients of large sums are dear, and often lead nowhere
        symmetries = Symmetries(start)
        candidates: list[_Candidate] = []
        for learner in learners:
            try:
                candidates.append(learner(start, symmetries, options, progress))
            except (NotMappableError, NotImplementedError, ValueError) as error:
                problems.append(str(error))
            if candidates and candidates[-1].is_good:
                break
        if not candidates:
            raise ValueError(f"adapt: {'; '.join(problems)}")
        best = _best(candidates)
        is_sure = best.is_good and float(best.trial.log_evidences.std()) < SURE
        missed = symmetries.told(best.guide, is_sure=is_sure)
    told = [] if best.is_good else [_poor(best, problems)]
    discrete = {name: site for name, site in start.sites.items() if is_discrete(site)}
    told += missed + list(best.told) + left_to_prior(discrete, start.supports)
    numbers: dict[str | None, int] = {None: OTHERS}
    numbers.update(best.numbers)
    return Adapted(
        start.model,
        best.guide,
        by_latent(best.guide, numbers),
        best.replicates,
        best.trial.log_evidence,
        float(best.trial.ess.median()),
        told,
    )


def _best(candidates: Sequence[_Candidate]) -> _Candidate:
    """Return the candidate of the highest evidence; of those that may be it, the least spread."""

    def variance(trial: Trial) -> float:
        return trial.spread**2 / len(trial.log_evidences)

    top = max((candidate.trial for candidate in candidates), key=lambda trial: trial.log_evidence)
    near = [
        candidate
        for candidate in candidates
        if top.log_evidence - candidate.trial.log_evidence
        <= 2 * math.sqrt(variance(top) + variance(candidate.trial))
    ]
    if not near:  # where a spread is nan
        return next(candidate for candidate in candidates if candidate.trial is top)
    return min(near, key=lambda candidate: candidate.trial.spread)


def _poor(best: _Candidate, reasons: Sequence[str]) -> str:
    """Say that no good proposal was found."""
    log_evidences = best.trial.log_evidences
    found = ", ".join(f"{float(log_p):.1f}" for log_p in log_evidences)
    why = "".join(f" What failed: {reason.rstrip('.')}." for reason in reasons)
    return (
        "adapt found no good proposal: trial runs have log evidences "
        f"{found}, and an ESS of {float(best.trial.ess.median()):.1f} outside of plates.{why} The "
        "evidence of .run is unbiased all the same, but mostly too low. The posterior may have "
        "several modes, or a shape far from a Gaussian: write the model in other coordinates, "
        "raise num_samples and num_replicates, or give a guide of your own."
    )


def started(
    model: Program, args: tuple[object, ...], kwargs: Mapping[str, object], options: Options
) -> Start:
    """Run the model plainly, and find its structure and its prior."""
    few = replace(options, num_samples=2, numbers={}, groups=(), memory_limit=None)
    plan, _, trace = plan_of(programs_of(Drawable()(model), None, args, kwargs), few)
    refuse_subsampling([trace], "To learn from minibatches, train a guide of your own by SVI.")
    sites = statements(trace)
    summed = summable(sites)
    masked = any(is_latent(site) and is_masked(site) for site in sites.values())
    if any(is_latent(site) and is_improper(site["fn"]) for site in sites.values()):
        model = Drawable()(model)
    if summed or masked:
        model = prepared(model, summed, masked=masked)
        plan, _, trace = plan_of(programs_of(model, None, args, kwargs), few)
    plan = replace(plan, programs=replace(plan.programs, model=model))
    if not any(is_latent(site) and not is_discrete(site) for site in sites.values()):
        raise ValueError(
            "the model has no continuous latent, so there is no proposal to learn. Call .run(...) "
            "without adapt: it sums or samples the discrete latents."
        )
    with plan.environment.entered():
        found = run_plan(plan, Workers(None, show_progress=False)).replicate
        programs = replace(plan.programs, patched=found.programs.patched)
        return start_of(replace(plan, programs=programs), found.structure, trace)


def _by_gradients(
    start: Start, symmetries: Symmetries, options: Options, progress: Progress
) -> _Candidate:
    """Fit by natural gradients, then match to trial runs."""
    rows = sum(block.size for block in start.blocks)
    if rows > MANY_NUMBERS:
        raise NotImplementedError(f"{rows} rows of the Hessian are too many")
    points = next((n for n in POINTS if n * start.work <= MUCH_WORK), POINTS[-1])
    with start.environment.entered():
        fitted, non_centred = learnt(start, Settings(points=points), progress.fitting)
        guide = start.guide(fitted.gaussian, non_centred, tails=True)
    guide = symmetries.spread(guide)
    coupled = list(fitted.gaussian.couplings)

    def refit(places: Sequence[Place]) -> Gaussian | None:
        return refitted(start, places, non_centred, coupled, POINTS[-1], progress.fitting)

    spread = at_other_orders(start, guide, refit)
    return _corrected(start, spread, options, progress, settled=fitted.settled)


def _by_trees(
    start: Start, symmetries: Symmetries, options: Options, progress: Progress
) -> _Candidate:
    """Match to trial runs, with an index for each latent of chains and trees."""
    linked = trees(start.structure, start.priors)
    names = sorted(start.priors, key=lambda name: name in linked)  # those around them first
    start = replace(start, priors={name: start.priors[name] for name in names})
    start = replace(
        start, blocks=start.blocks_by(lambda name, plates: name if name in linked else plates)
    )
    guide, _ = matched_by_moments(start, options, lambda trial: _tell(progress, trial))
    with start.environment.entered():
        guide = start.guide(guide.gaussian(), frozenset(), tails=True)
    guide = symmetries.spread(guide)
    found = _corrected(start, Spread(guide), options, progress, settled=True)
    # sums over many indices take longer than their densities
    return replace(found, replicates=min(TREE_REPLICATES, found.replicates))


def _tell(progress: Progress, trial: Trial) -> None:
    progress.trying("matching", trial.log_evidence, trial.ess)


def _corrected(
    start: Start, spread: Spread, options: Options, progress: Progress, *, settled: bool
) -> _Candidate:
    """Move a fitted guide to the moments of trial runs, each of its modes by itself."""
    guide = spread.guide
    plan, numbers = fitting(start.programs, options, guide.at_mode(0), share=0.5)
    runs = Runs(plan)
    modes = [guide.at_mode(mode) for mode in range(guide.num_modes)]
    of_each, most = (TRIALS, MOST_TRIALS) if len(modes) <= MOST_IMAGES else (1, 1)
    first = [tried(runs, of_mode, of_each, most) for of_mode in modes]
    large = math.log(LARGE) + max(trial.log_evidence for trial in first)
    moved = [
        _moved_to_trials(runs, of_mode, trial, progress)
        if len(modes) == 1 or (of_each == TRIALS and trial.log_evidence > large)
        else (of_mode, trial)
        for of_mode, trial in zip(modes, first, strict=True)
    ]
    ((guide, trial), *others) = moved
    if others:
        guide = _together(spread.guide, moved)
        plan, numbers = fitting(start.programs, options, guide, share=0.5)
        trial = tried(Runs(plan), guide, TRIALS)
    own = shared_out(guide, numbers, trial)
    plan, numbers = fitting(start.programs, options, guide, own=own)
    replicates = replicates_for(plan, numbers, trial, guide.num_modes)
    return _Candidate(guide, trial, settled, numbers, replicates, told_of_orders(spread))


def _together(
    guide: AutoPlateNormal, tried_modes: Sequence[tuple[AutoPlateNormal, Trial]]
) -> AutoPlateNormal:
    """Return the guide of all modes that matter, that of the most mass first."""
    ranked = sorted(tried_modes, key=lambda of_mode: -of_mode[1].log_evidence)
    least = ranked[0][1].log_evidence - NEGLIGIBLE
    kept = [mode for mode, trial in ranked if trial.log_evidence >= least] or [ranked[0][0]]
    assert guide.modes is not None
    gaussians = tuple(mode.gaussian() for mode in kept)
    return guide.with_modes(replace(guide.modes, gaussians=gaussians))


def _moved_to_trials(
    runs: Runs, guide: AutoPlateNormal, trial: Trial, progress: Progress
) -> tuple[AutoPlateNormal, Trial]:
    """
    Move a guide of one mode to the moments of trial runs.

    First the block outside of plates, again while its ESS is low; at last all blocks.
    """
    for move in range(MOST_MOVES):
        _tell(progress, trial)
        if not trial.noise:
            break
        is_last = move == MOST_MOVES - 1 or (move > 0 and trial.wanted_runs(guide) <= 1)
        blocks = range(len(guide.blocks)) if is_last else [0]
        moved = matched(guide, {number: trial.noise[number] for number in blocks})
        again = tried(runs, moved, len(trial.log_evidences))
        if not again.is_better(trial):
            break
        guide, trial = moved, again
        if is_last:
            break
    return guide, trial


def _by_moments(
    start: Start, symmetries: Symmetries, options: Options, progress: Progress
) -> _Candidate:
    """Match the moments of trial runs."""
    guide, plan = matched_by_moments(
        replace(start, blocks=start.blocks_by(by_site)),
        options,
        lambda trial: _tell(progress, trial),
    )
    numbers = dict(plan.options.numbers)
    guide = symmetries.spread(guide)
    blocked = replace(start, blocks=guide.blocks)

    def refit(places: Sequence[Place]) -> Gaussian:
        anew, _ = matched_by_moments(
            blocked, options, lambda trial: _tell(progress, trial), ANEW, places
        )
        return anew.gaussian()

    spread = at_other_orders(blocked, guide, refit)
    guide = spread.guide
    if guide.num_modes > 1:
        modes = [guide.at_mode(mode) for mode in range(guide.num_modes)]
        alone = with_numbers(options, numbers | modes[0].choices(is_final=False))
        runs = Runs(plan_of(replace(start.programs, guide=modes[0]), alone)[0])
        guide = _together(guide, [(mode, tried(runs, mode, TRIALS)) for mode in modes])
    programs = replace(start.programs, guide=guide)
    choices = guide.choices(is_final=False)
    if choices:
        plan, _, _ = plan_of(programs, with_numbers(options, numbers | choices))
    trial = tried(Runs(plan), guide, TRIALS)
    if choices:
        numbers |= guide.choices(is_final=True)
        plan, _, _ = plan_of(programs, with_numbers(options, numbers))
    # sums over many indices take longer than their densities; images are as good as replicates
    most = FEWER_REPLICATES if choices else FEW_REPLICATES
    replicates = min(most, replicates_for(plan, numbers, trial))
    return _Candidate(guide, trial, True, numbers, replicates, told_of_orders(spread))
