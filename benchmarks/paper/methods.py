# SPDX-License-Identifier: Apache-2.0
"""
What is measured: ELBO, predictive log-likelihood and seconds of one method at one seed.

``mpis``: massively parallel importance sampling with independent draws, as in the paper;
``mpis_even``: with particles spread evenly, as is the package's default; ``mpis_grouped``: with the
groups below; ``global``: importance sampling, all latents sharing one index; ``adapt``: a proposal
that the package learns; ``vi``, ``iwae``, ``rws``: a guide trained by Pyro's ``Trace_ELBO``,
``RenyiELBO`` with ``alpha=0``, ``ReweightedWakeSleep``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Predictive, RenyiELBO, ReweightedWakeSleep, Trace_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import MPImportance, log_predictive
from pyro_mpis.programs.messages import is_latent, statements

from .experiment import Experiment, Program

ITERATIVE = ("vi", "iwae", "rws")
METHODS = ("mpis", "mpis_even", "mpis_grouped", "global", "adapt", *ITERATIVE)
CHOSEN = 0  # the K of ``adapt``, which chooses a number for each index
POSTERIOR_SAMPLES = 100
ENTRIES = 5 * 10**7  # samples of all observations that are evaluated together

# Latents that one likelihood reads and that are few enough to share an index.
GROUPS: Mapping[str, Sequence[Sequence[str]]] = {"chimpanzees": [("beta_P", "beta_PC")]}


@dataclass(frozen=True)
class Cell:
    """One measurement of one experiment. Finished cells are told apart by these fields."""

    variant: str
    experiment: str
    method: str
    k: int
    seed: int
    lr: float | None = None  # of iterative methods
    iterations: int | None = None


@dataclass(frozen=True)
class Point:
    """What is measured; seconds are those from the start up to each of the two figures."""

    elbo: float
    p_ll: float
    elbo_seconds: float
    p_ll_seconds: float
    iteration: int | None = None


def run(experiment: Experiment, cell: Cell, memory_limit: int) -> list[Point]:
    """Run a cell: one point; several, after more and more iterations, of iterative methods."""
    pyro.clear_param_store()
    latents = _latents(experiment.guide, experiment)
    guide = trainable(experiment.guide, experiment)
    pyro.set_rng_seed(cell.seed)  # what was drawn so far told the structure only
    if cell.method in ITERATIVE:
        return _train(experiment, guide, cell)
    if cell.method == "adapt":
        return [_adapted(experiment)]
    groups: Sequence[Sequence[str]] = ()
    if cell.method == "mpis_grouped":
        groups = GROUPS[cell.experiment]
    elif cell.method == "global":
        groups = [latents]
    parts = _parts(experiment, cell.k) if cell.method == "global" else 1
    even = cell.method == "mpis_even"
    return [_importance(experiment, cell.k, parts, groups, memory_limit, even=even)]


def _parts(experiment: Experiment, k: int) -> int:
    """
    Return into how many equal parts to divide the samples of global importance sampling.

    As replicates of fewer samples they have the same estimates, and take less memory.
    """
    data = max(array.numel() for array in experiment.train.values())
    enough = -(-k * data // ENTRIES)
    return next(parts for parts in range(enough, k + 1) if k % parts == 0)


def _importance(
    experiment: Experiment,
    k: int,
    parts: int,
    groups: Sequence[Sequence[str]],
    memory_limit: int,
    *,
    even: bool,
) -> Point:
    clock = Clock()
    posterior = MPImportance(
        experiment.model,
        experiment.guide,
        k // parts,
        groups=groups,
        num_replicates=parts,
        max_plate_nesting=experiment.max_plate_nesting,
        memory_limit=memory_limit,
        stratified=even,
        disable_progbar=True,
    ).run(**experiment.train)
    elbo = posterior.evidence().item()
    elbo_seconds = clock.seconds()
    p_ll = _predictive(experiment, posterior.sample(POSTERIOR_SAMPLES))
    return Point(elbo, p_ll, elbo_seconds, clock.seconds())


def _adapted(experiment: Experiment) -> Point:
    """Learn a proposal from the model alone; the paper's proposal is not looked at."""
    clock = Clock()
    posterior = MPImportance(experiment.model, disable_progbar=True)
    posterior.adapt(**experiment.train).run(**experiment.train)
    elbo = posterior.evidence().item()
    elbo_seconds = clock.seconds()
    p_ll = _predictive(experiment, posterior.sample(POSTERIOR_SAMPLES))
    return Point(elbo, p_ll, elbo_seconds, clock.seconds())


def _predictive(experiment: Experiment, samples: Mapping[str, Tensor]) -> float:
    known = {name: x for name, x in samples.items() if name not in experiment.new_latents}
    return log_predictive(
        experiment.model, known, experiment.test, num_local_samples=experiment.local_samples
    ).item()


def _latents(program: Program, experiment: Experiment) -> list[str]:
    sites = statements(poutine.trace(program).get_trace(**experiment.train))
    return [name for name, site in sites.items() if is_latent(site)]


class Clock:
    """
    Seconds that have passed while it was not stopped.

    CPU seconds of all threads, which do not depend on what else the machine does; of a GPU, the
    time until it has finished.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.begin = self._now()

    def seconds(self) -> float:
        return self.total + self._now() - self.begin

    def stop(self) -> None:
        self.total = self.seconds()

    def start(self) -> None:
        self.begin = self._now()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


# --- iterative methods ----------------------------------------------------------------------

OBJECTIVES: Mapping[str, Callable[[int, int], ELBO]] = {
    "vi": lambda k, nesting: Trace_ELBO(max_plate_nesting=nesting),
    "iwae": lambda k, nesting: RenyiELBO(
        alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=nesting
    ),
    "rws": lambda k, nesting: ReweightedWakeSleep(
        num_particles=k,
        vectorize_particles=True,
        model_has_params=False,
        max_plate_nesting=nesting,
    ),
}


def checkpoints(iterations: int) -> list[int]:
    """Return after which iterations to measure: ten, evenly on a logarithmic scale."""
    return sorted({round(iterations ** (i / 9)) for i in range(10)})


def _train(experiment: Experiment, guide: Program, cell: Cell) -> list[Point]:
    """
    Train a guide of the proposal's form, and measure it on the way.

    The ELBO is the objective's bound with its K particles (of RWS: the bound of IWAE); posterior
    samples are draws from the guide. The clock stands still while this is measured.
    """
    assert cell.lr is not None
    assert cell.iterations is not None
    nesting = experiment.max_plate_nesting
    objective = OBJECTIVES[cell.method](cell.k, nesting)
    bound = OBJECTIVES["vi" if cell.method == "vi" else "iwae"](cell.k, nesting)
    svi = SVI(experiment.model, guide, PyroOptim(torch.optim.Adam, {"lr": cell.lr}), objective)
    points, clock = [], Clock()
    for iteration in range(1, cell.iterations + 1):
        svi.step(**experiment.train)
        if iteration in checkpoints(cell.iterations):
            clock.stop()
            points.append(_measure(experiment, guide, bound, clock.total, iteration))
            clock.start()
    return points


def _measure(
    experiment: Experiment, guide: Program, bound: Any, seconds: float, iteration: int
) -> Point:
    clock = Clock()
    with torch.no_grad():
        elbo = -bound.loss(experiment.model, guide, **experiment.train)
        elbo_seconds = seconds + clock.seconds()
        samples = Predictive(guide, num_samples=POSTERIOR_SAMPLES, parallel=True)(
            **experiment.train
        )
        latents = _latents(experiment.guide, experiment)
        p_ll = _predictive(experiment, {name: samples[name] for name in latents})
    return Point(elbo, p_ll, elbo_seconds, elbo_seconds + clock.seconds(), iteration)


class _Trainable(Messenger):
    """Put params in the place of the arguments of the normal and half-Cauchy proposals."""

    def __init__(self, initial: Mapping[str, dist.TorchDistribution]) -> None:
        super().__init__()
        self.initial = initial

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.initial:
            return
        fn = self.initial[name]
        positive = constraints.positive
        if isinstance(_base(fn), dist.HalfCauchy):
            scale = pyro.param(f"{name}.scale", torch.ones_like(fn.sample()), positive)
            msg["fn"] = dist.HalfCauchy(scale).to_event(fn.event_dim)
        else:
            loc = pyro.param(f"{name}.loc", fn.mean.clone())
            scale = pyro.param(f"{name}.scale", fn.stddev.clone(), positive)
            msg["fn"] = dist.Normal(loc, scale).to_event(fn.event_dim)


def _base(fn: Any) -> dist.TorchDistribution:
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.HalfCauchy):
        fn = fn.base_dist
    base: dist.TorchDistribution = fn
    return base


def trainable(guide: Program, experiment: Experiment) -> Program:
    """
    Return the proposal with arguments to train, one of each latent and plate element.

    They start at the proposal's own. Proposals that read other latents stay as they are.
    """
    sites = poutine.trace(guide).get_trace(**experiment.train).nodes
    initial: dict[str, Any] = {
        name: sites[name]["fn"]
        for name in _latents(guide, experiment)
        if isinstance(_base(sites[name]["fn"]), (dist.Normal, dist.HalfCauchy))
    }
    return _Trainable(initial)(guide)


# --------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error (nan of one)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
