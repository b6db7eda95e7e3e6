# SPDX-License-Identifier: Apache-2.0
"""
Train a guide of the user's own, and choose numbers of particles for it.

Its parameters climb the bound that :class:`~pyro_mpis.TraceMP_ELBO` estimates; where no gradient
can go through its draws, those of :class:`~pyro_mpis.MPReweightedWakeSleep` are followed. Rates
fall where the bound rises no more. Trial runs then tell how many replicates are worth it.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis.adaptation.progress import Progress
from pyro_mpis.adaptation.trials import LARGEST_RUN, TRIALS, Trial, replicates_for, work_of
from pyro_mpis.blocks import run_plan
from pyro_mpis.objectives import MPReweightedWakeSleep, TraceMP_ELBO
from pyro_mpis.options import Options
from pyro_mpis.planning import Plan, plan_of
from pyro_mpis.programs.runs import Programs
from pyro_mpis.queries import joint_weights_of
from pyro_mpis.workers import Workers

PARTICLES = 5  # of a step
RATES = (0.05, 0.015, 0.005)  # of Adam, in unconstrained parameters
WINDOW = 50  # steps whose mean bounds are compared
MOST_WINDOWS = 20  # at one rate
FALL = 10.0  # nats below the best window, at which a rate was too high
NUMBERS = (100, 60, 30, 20, 10, 6, 4)  # of particles, of which the first that is not dear is taken
LOW_ESS = 3.0  # of a trial's particles, at its worst


@dataclass(frozen=True)
class Trained:
    """How to run with a trained guide."""

    num_samples: int
    num_replicates: int
    problems: list[str] = field(default_factory=list)  # what the user is to be told


def trained(programs: Programs, options: Options, *, show_progress: bool) -> Trained:
    """
    Train a guide's parameters in place; draws random numbers.

    Parameters of the model stay as they are.

    :param options: with ``num_samples`` if the user has given one: it is kept.
    :raises ValueError: if the guide has no parameters, or the bound is nan or never finite.
    """
    parameters = parameters_of(programs)
    bound = _Bound(programs, options, frozenset(parameters))
    with Progress(show_progress) as progress:
        _climb(bound, list(parameters.values()), progress.fitting)
        plan, numbers = _planned(programs, options)
        trial = _tried(plan)
    return Trained(
        max(numbers.values()),
        replicates_for(plan, numbers, trial),
        [] if trial.is_good(LOW_ESS) else [_poor(trial)],
    )


def parameters_of(programs: Programs) -> dict[str, Tensor]:
    """
    Return a guide's unconstrained parameters.

    :raises ValueError: if it has none.
    """
    with torch.no_grad():
        programs.guide(*programs.args, **programs.kwargs)  # makes an autoguide, in its first run
        with poutine.block(), poutine.trace(param_only=True) as tracer:
            programs.guide(*programs.args, **programs.kwargs)
    found = _unconstrained(tracer.trace)
    if not found:
        raise ValueError(
            "guide: it has no parameters that adapt could learn (pyro.param, or those of a module "
            "such as AutoNormal). Give none to have a guide learned: MPImportance(model).adapt(...)"
            "; or run with this one as it is: MPImportance(model, guide).run(...)."
        )
    return found


def _unconstrained(trace: Trace) -> dict[str, Tensor]:
    """Return the unconstrained parameters of a trace."""
    sites: Mapping[str, Any] = trace.nodes
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    return {name: value.unconstrained() for name, value in params.items()}


def _climb(
    step: Callable[[], float], parameters: Sequence[Tensor], tell: Callable[[float], None]
) -> None:
    """
    Follow the gradient of a bound until it rises no more, at rates that fall.

    :param step: sets the gradients, and returns the bound.
    :raises ValueError: if the bound is not finite.
    """
    optimiser = torch.optim.Adam(parameters)
    best, kept = -math.inf, [parameter.detach().clone() for parameter in parameters]
    for rate in RATES:
        for group in optimiser.param_groups:
            group["lr"] = rate
        before: list[float] = []
        for _ in range(MOST_WINDOWS):
            now: list[float] = []
            for _ in range(WINDOW):
                now.append(step())
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                tell(now[-1])
            mean = statistics.fmean(now)
            if not math.isfinite(mean):
                _restore(parameters, kept)
                raise ValueError(
                    "adapt: the log evidence of a step of training is not finite. The guide starts "
                    "where the model has no density, or its parameters ran away: start it nearer "
                    "to the posterior."
                )
            if mean >= best:
                best, kept = mean, [parameter.detach().clone() for parameter in parameters]
            elif mean < best - FALL:
                _restore(parameters, kept)  # ran away
                break
            if before and not _rises(now, before):
                break
            before = now


def _restore(parameters: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


def _rises(now: Sequence[float], before: Sequence[float]) -> bool:
    """Whether bounds of a window are above those of the one before, by more than their noise."""
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in (now, before)]
    return statistics.fmean(now) > statistics.fmean(before) + math.hypot(*errors)


class _Bound:
    """
    A bound on the log evidence, and its gradient in a guide's parameters.

    Where a gradient cannot go through draws, it is that of wake-sleep from then on.
    """

    def __init__(self, programs: Programs, options: Options, names: frozenset[str]) -> None:
        self._programs = programs
        self._names = names
        nesting = options.max_plate_nesting
        self._settings: dict[str, Any] = {
            "groups": options.groups,
            "shared_plates": options.shared_plates,
            "max_plate_nesting": math.inf if nesting is None else nesting,
            "memory_limit": options.memory_limit,
        }
        self._objective: TraceMP_ELBO | MPReweightedWakeSleep = TraceMP_ELBO(
            PARTICLES, **self._settings
        )

    def __call__(self) -> float:
        """Set the gradients; draws random numbers."""
        try:
            return self._step()
        except NotImplementedError:
            if isinstance(self._objective, MPReweightedWakeSleep):
                raise
        self._objective = MPReweightedWakeSleep(PARTICLES, **self._settings)
        return self._step()

    def _step(self) -> float:
        of = self._programs
        with poutine.trace(param_only=True) as tracer:
            loss = self._objective.loss_and_grads(of.model, of.guide, *of.args, **of.kwargs)
        for name, parameter in _unconstrained(tracer.trace).items():
            if name not in self._names:
                parameter.grad = None
        return -float(loss[0] if isinstance(loss, tuple) else loss)


def _planned(programs: Programs, options: Options) -> tuple[Plan, dict[str, int]]:
    """Plan runs, with as many particles as a run is worth where no number was given."""
    given = options.num_samples is not None or options.numbers
    for number in NUMBERS:
        tried = options if given else replace(options, num_samples=number)
        plan, _, _ = plan_of(programs, tried)
        numbers = {site: i.num_samples for i in plan.structure.indices for site in i.sites}
        if given or number == NUMBERS[-1] or work_of(plan.structure, numbers) < LARGEST_RUN / 3:
            break
    return plan, numbers


def _tried(plan: Plan) -> Trial:
    """Run with a guide several times; draws random numbers."""
    alone = Workers(None, show_progress=False)
    log_evidences, smallest = [], []
    for _ in range(TRIALS):
        total = run_plan(plan, alone)
        log_evidences.append(total.log_evidence.double())
        if total.is_one_by_one or not bool(torch.isfinite(log_evidences[-1])):
            continue
        symbols = [i.symbol for i in total.replicate.structure.indices if not i.enumerated]
        (weights,) = joint_weights_of([total], symbols, alone)
        of_each = [1 / weight.square().sum(0) for weight in weights.values()]
        smallest.append(torch.stack([part.min().double() for part in of_each]).min())
    ess = torch.stack(smallest) if smallest else torch.zeros(1)
    return Trial(torch.stack(log_evidences), {}, ess)


def _poor(trial: Trial) -> str:
    found = ", ".join(f"{float(log_p):.1f}" for log_p in trial.log_evidences)
    return (
        f"adapt trained the guide, but trial runs with it have log evidences {found}, and an ESS "
        f"of {float(trial.ess.median()):.1f} at its smallest. The evidence of .run is unbiased all "
        "the same, but mostly too low. A guide of a richer family may come nearer to the posterior:"
        " MPImportance(model).adapt(...) learns one by itself."
    )
