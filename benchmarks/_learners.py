# SPDX-License-Identifier: Apache-2.0
"""Ways from a model and data to its evidence and moments: this package's, and Pyro's own."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import torch
from _learning import Moments, Problem, Program, error_of_moments, with_functions
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    autoguide,
)
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

from pyro_mpis import MPImportance

PARTICLES = 8  # of a step of Pyro's objectives
RATES = (0.03, 0.005)  # of Adam, in the first three fifths of the time and after
WARM_UP = 300  # iterations of NUTS
DRAWS = 2000  # of a guide, for importance sampling
PIECE = 500  # of these at a time


@dataclass(frozen=True)
class Row:
    """What a method found within some CPU seconds."""

    seconds: float
    evidence: float | None  # error of the log evidence, in nats
    means: float  # error in posterior sds
    sds: float  # error as a share
    error: float | None = None  # standard error of the log evidence, as reported
    note: str = ""


Method = Callable[[Problem, float], Iterator[Row]]


# --- this package


def adapt(problem: Problem, limit: float) -> Iterator[Row]:
    """``adapt`` and ``run`` as they are; the limit is not looked at."""
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        posterior = MPImportance(problem.model, disable_progbar=True).adapt(**problem.data)
        learned = time.process_time() - begin
        posterior.run(**problem.data)
        if problem.name == "occupancy":
            drawn = posterior.sample(1000)
            found = _of_draws(with_functions(problem.name, drawn), torch.ones(1000))
        else:
            means_of = posterior.moments()
            squares = posterior.moments({name: (torch.square, name) for name in problem.moments})
            found = {n: (means_of[n], _sd(means_of[n], square)) for n, square in squares.items()}
        log_evidence = float(posterior.evidence())
        seconds = time.process_time() - begin
        standard = _standard_error(posterior)
    means, sds = error_of_moments(problem, found)
    messages = {str(w.message).split(":")[0][:80] for w in told if "num_samples" not in str(w)}
    note = f"adapt {learned:.1f} s; R {posterior.num_replicates}; {'; '.join(sorted(messages))}"
    evidence = log_evidence - problem.log_evidence
    yield Row(seconds, evidence, means, sds, standard, note)


def _standard_error(posterior: MPImportance) -> float:
    """Return what ``evidence_error`` does, without its look at every marginal."""
    ratios = (posterior._replicates() - posterior.evidence().double()).exp()
    return float(ratios.std() / math.sqrt(len(ratios)))


def _sd(mean: Tensor, square: Tensor) -> Tensor:
    return (square.double() - mean.double() ** 2).clamp(min=0).sqrt()


# --- Pyro's guides


def fitted(kind: str, objective: str) -> Method:
    """Train an autoguide for about the time given; draws of it are weighed once, at the end."""

    def method(problem: Problem, limit: float) -> Iterator[Row]:
        begin = time.process_time()
        pyro.clear_param_store()
        model = problem.continuous
        guide = getattr(autoguide, kind)(model)
        loss = loss_of(objective, problem.nesting)
        optimiser = pyro.optim.Adam(lambda name: {"lr": rate[0]})
        rate = [RATES[0]]
        svi = SVI(model, guide, optimiser, loss)
        steps, reserve = 0, 0.15 * limit
        while (passed := time.process_time() - begin) < limit - reserve:
            if passed > 0.6 * limit and rate[0] != RATES[1]:
                rate[0] = RATES[1]
                optimiser = pyro.optim.Adam({"lr": RATES[1]})
                svi = SVI(model, guide, optimiser, loss)
            svi.step(**problem.data)
            steps += 1
        log_weights, draws = _weighed(problem, guide)
        log_p = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
        weights = log_weights.softmax(0)
        seconds = time.process_time() - begin
        of_guide = error_of_moments(problem, _of_draws(draws, torch.ones(len(weights))))
        weighted = error_of_moments(problem, _of_draws(draws, weights))
        elbo = float(log_weights.mean()) - problem.log_evidence
        yield Row(seconds, elbo, *of_guide, note=f"guide; {steps} steps")
        ess = float(1 / weights.square().sum())
        evidence = log_p - problem.log_evidence
        yield Row(seconds, evidence, *weighted, note=f"importance sampling; ESS {ess:.1f}")

    return method


def loss_of(name: str, nesting: int) -> object:
    settings = {
        "num_particles": PARTICLES,
        "vectorize_particles": True,
        "max_plate_nesting": nesting,
    }
    if name == "Trace_ELBO":
        return Trace_ELBO(**settings)
    if name == "RenyiELBO":
        return RenyiELBO(alpha=0.0, **settings)
    return ReweightedWakeSleep(insomnia=1.0, model_has_params=False, **settings)


def _weighed(problem: Problem, guide: Program) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw from a guide; return log weights, and draws ``(draws, *shape)``."""
    parts: list[tuple[Tensor, dict[str, Tensor]]] = []
    with torch.no_grad():
        for _ in range(DRAWS // PIECE):
            log_weights, model_trace, _ = vectorized_importance_weights(
                problem.continuous,
                guide,
                num_samples=PIECE,
                max_plate_nesting=problem.nesting,
                normalized=False,
                **problem.data,
            )
            draws = {
                name: site["value"].detach()
                for name, site in model_trace.nodes.items()
                if site["type"] == "sample" and not site["is_observed"]
                if name in problem.moments or name in ("beta", "bird_mean", "bird_year_mean")
            }
            parts.append((log_weights.double(), draws))
    names = parts[0][1]
    together = {name: torch.cat([draws[name] for _, draws in parts]) for name in names}
    return torch.cat([w for w, _ in parts]), with_functions(problem.name, together)


def _of_draws(draws: dict[str, Tensor], weights: Tensor) -> Moments:
    share = (weights / weights.sum()).double()
    result = {}
    for name, value in draws.items():
        flat = value.reshape((len(value), -1)).double()
        mean = share @ flat
        result[name] = mean, (share @ (flat - mean) ** 2).sqrt()
    return result


# --- NUTS


class _OverError(Exception):
    """The time is over."""


def nuts(problem: Problem, limit: float) -> Iterator[Row]:
    """One chain, compiled; moments at half of the time and at the end."""
    begin = time.process_time()
    kernel = NUTS(problem.continuous, jit_compile=True, ignore_jit_warnings=True)
    draws: list[dict[str, Tensor]] = []
    rows: list[Row] = []
    times = [limit / 2, limit]

    def note(_: object, params: dict[str, Tensor], stage: str, __: int) -> None:
        if stage == "Sample":
            draws.append({n: kernel.transforms[n].inv(z) for n, z in params.items()})
        passed = time.process_time() - begin
        while times and passed > times[0]:
            times.pop(0)
            if len(draws) < 10:
                rows.append(Row(passed, None, math.nan, math.nan, note="still warming up"))
                continue
            together = {name: torch.stack([d[name] for d in draws]) for name in draws[0]}
            together = with_functions(problem.name, together)
            means, sds = error_of_moments(problem, _of_draws(together, torch.ones(len(draws))))
            rows.append(Row(passed, None, means, sds, note=f"{len(draws)} draws"))
        if not times:
            raise _OverError

    chain = MCMC(kernel, 10**6, WARM_UP, hook_fn=note, disable_progbar=True)
    try:
        chain.run(**problem.data)
    except _OverError:
        pass
    yield from rows


METHODS: dict[str, Method] = {
    "adapt": adapt,
    "AutoNormal, Trace_ELBO": fitted("AutoNormal", "Trace_ELBO"),
    "AutoNormal, RenyiELBO": fitted("AutoNormal", "RenyiELBO"),
    "AutoNormal, ReweightedWakeSleep": fitted("AutoNormal", "ReweightedWakeSleep"),
    "AutoMultivariateNormal, Trace_ELBO": fitted("AutoMultivariateNormal", "Trace_ELBO"),
    "NUTS": nuts,
}
