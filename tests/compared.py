# SPDX-License-Identifier: Apache-2.0
"""Run a program and hold every number that comes out against brute force at single values."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from checks import RELATIVE_ERROR, check_frequencies
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from singles import Exact, Program, Singles, Values, exact, is_delta, is_latent
from torch import Tensor

from pyro_mpis import MPImportance, blocks
from pyro_mpis._typing import NumSamples
from pyro_mpis.particles import ordinary
from pyro_mpis.particles.drawing import Drawn
from pyro_mpis.programs.runs import Programs

ABSOLUTE_ERROR = 1e-9


def run_recorded(
    model: Program, guide: Program | None, **options: Any
) -> tuple[MPImportance, Values]:
    """Run, and note the particles that were drawn, of sites without an index too."""
    noted: list[Drawn] = []
    rows: list[Values] = []  # of ordinary importance sampling
    weigh: Any = vars(blocks)["weigh"]
    one_run = ordinary._one_run

    def noting(structure: Any, programs: Any, drawn: Drawn, **options: Any) -> Any:
        noted.append(drawn)
        return weigh(structure, programs, drawn, **options)

    def tracing(programs: Programs) -> Any:
        """Run once, and note what guide and model draw."""
        sites: dict[str, Any] = {}

        def traced(*args: object, **kwargs: object) -> object:
            with poutine.trace() as tracer:
                result = programs.guide(*args, **kwargs)
            sites.update(tracer.trace.nodes)
            return result

        result = one_run(replace(programs, guide=traced))
        sites = {**result.model.nodes, **sites}  # the guide's first
        latent = {n: site for n, site in sites.items() if site["type"] == "sample"}
        latent = {n: s for n, s in latent.items() if is_latent(s) and not site_is_subsample(s)}
        rows.append({n: s["value"] for n, s in latent.items() if not is_delta(s["fn"])})
        return result

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(blocks, "weigh", noting)
        patch.setattr(ordinary, "_one_run", tracing)
        warnings.simplefilter("ignore")
        posterior = MPImportance(model, guide, **options).run()
    if posterior._sums[0].traces:
        return posterior, {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return posterior, {name: draw.value for name, draw in noted[-1].draws.items()}


def problem_of(
    posterior: MPImportance,
    drawn: Values,
    model: Program,
    guide: Program | None,
    groups: Sequence[Sequence[str]] = (),
    num_draws: Mapping[str, int] | None = None,
) -> Singles:
    """
    Return the brute-force problem of a run: its particles, and which indices are shared.

    :param num_draws: the number of draws that particles are chosen from, of sites where there are
        more than particles; the mixtures are over these.
    """
    total = posterior._sums[0]
    structure, particles = total.replicate.structure, total.replicate.particles
    if total.traces:  # one particle index for all
        plates = [plate.name for plate in structure.plates.values()]
        shared = dict.fromkeys(drawn, plates)
        return Singles(model, guide, drawn, {}, shared, [list(drawn)])
    together = total.replicate.programs.one_by_one  # whose values the programs look at
    if together:
        groups = [*(group for group in groups if not together.issuperset(group)), sorted(together)]
    supports = {
        name: particles.values[name]
        for name, index in structure.index_of.items()
        if index.enumerated
    }
    found = {name: particles.values[name] for name in particles.values.keys() - supports.keys()}
    for name, value in found.items():
        if name not in (num_draws or {}):
            torch.testing.assert_close(value, drawn[name][: len(value)], rtol=0, atol=0)
        check_are_draws(value, drawn[name])
    return Singles(
        model,
        guide,
        drawn,
        supports,
        structure.shared,
        groups,
        particles=found,
        num_draws=num_draws or {},
    )


def check_are_draws(particles: Tensor, draws: Tensor) -> None:
    """Each element of a particle is one of its draws, and no draw is taken twice."""
    flat, among = particles.reshape(len(particles), -1).T, draws.reshape(len(draws), -1).T
    counts = (flat.unsqueeze(-1) == among.unsqueeze(-2)).sum(-1)
    assert bool((counts >= 1).all())
    if particles.is_floating_point() and not bool((among == among.round()).all()):
        assert bool((counts == 1).all())
        assert all(len(row.unique()) == len(row) for row in flat)


def check_posterior(posterior: MPImportance, truth: Exact) -> None:
    """Evidence, marginals, means, moments of pairs: all as brute force has them."""
    difference = float((posterior.evidence() - truth.log_evidence).abs())
    assert difference < RELATIVE_ERROR, f"evidence: {difference:.1g}"  # NaN is an error too
    problem = truth.problem
    marginals = posterior.marginals()
    means = posterior.moments()
    for name in problem.latents:
        if name not in means:  # a Delta of the model
            continue
        values = truth.values[name]
        _close(means[name], truth.mean(values), f"mean of {name}")
        second = posterior.moments(lambda x: x.to(torch.get_default_dtype()) ** 2, name)
        square = truth.mean(values.to(truth.probs.dtype) ** 2)
        _close(second.reshape(square.shape), square, f"second moment of {name}")
        if name in problem.index_of:
            index = problem.index_of[name]
            batch = marginals[name].log_weights.shape[:-1]
            cells = index.numbers(range(len(index.elements)), batch)
            _close(marginals[name].weights, truth.weights(name)[cells], f"weights of {name}")
    for one, other in itertools.combinations(means, 2):
        _check_pair(posterior, truth, one, other)


def _check_pair(posterior: MPImportance, truth: Exact, one: str, other: str) -> None:
    sites = truth.problem.model_sites
    plates = [
        {f.name for f in sites[name]["cond_indep_stack"] if f.vectorized} for name in (one, other)
    ]
    if not (plates[0] <= plates[1] or plates[1] <= plates[0]):
        return
    index_of = truth.problem.index_of
    held = [set(index_of[name].plates) for name in (one, other) if name in index_of]
    crossing = len(held) == 2 and not (held[0] <= held[1] or held[1] <= held[0])
    try:
        found = posterior.moments(
            lambda x, y: x.to(truth.probs.dtype).sum() * y.to(truth.probs.dtype).sum(), one, other
        )
    except NotImplementedError as error:  # each has an index in one of two plates that cross
        if crossing and "These plates cross" in str(error):
            return
        raise
    factors = []
    for name, inside in zip((one, other), plates, strict=True):
        values = truth.values[name].to(truth.probs.dtype)
        batch = len(sites[name]["fn"].batch_shape) if inside else 0
        factors.append(values.reshape((*values.shape[: 1 + batch], -1)).sum(-1))
    dims = max(factor.dim() for factor in factors)
    factors = [f.reshape((len(f), *(1,) * (dims - f.dim()), *f.shape[1:])) for f in factors]
    expected = truth.mean(factors[0] * factors[1])
    _close(found.reshape(expected.shape), expected, f"moment of {one} and {other}")


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found.to(expected.dtype),
        expected,
        rtol=RELATIVE_ERROR,
        atol=ABSOLUTE_ERROR,
        msg=lambda text: f"{what}: {text}",
    )


def check_draws(posterior: MPImportance, truth: Exact, num_draws: int = 1000) -> None:
    """Joint draws have the frequencies of the combinations: chi-square, alarm 1e-6."""
    draws = posterior.sample(num_draws)
    names = [name for name in truth.problem.latents if name in draws]
    if not names:
        return
    expected = torch.cat([truth.values[n].reshape(len(truth.probs), -1).double() for n in names], 1)
    found = torch.cat([draws[name].reshape(num_draws, -1).double() for name in names], 1)
    # a combination's value may differ from a draw's in the last digit
    points, index = (
        torch.cat([expected, found]).round(decimals=9).unique(dim=0, return_inverse=True)
    )
    probs = torch.zeros(len(points)).index_add(0, index[: len(expected)], truth.probs)
    counts = index[len(expected) :].bincount(minlength=len(points))
    check_frequencies(counts, probs)


def compare(
    model: Program,
    guide: Program | None,
    num_samples: NumSamples,
    groups: Sequence[Sequence[str]] = (),
    *,
    num_draws: Mapping[str, int] | None = None,
    seed: int = 0,
    wrong: Callable[[Singles], Exact] = exact,
    draws: bool = False,
    **options: Any,
) -> MPImportance:
    """Run a program and compare; ``wrong`` puts another oracle in the place of the right one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    posterior, drawn = run_recorded(model, guide, num_samples=num_samples, groups=groups, **options)
    problem = problem_of(posterior, drawn, model, guide, groups, num_draws)
    truth = wrong(problem)
    check_posterior(posterior, truth)
    if draws:
        check_draws(posterior, truth)
    assert all(is_latent(problem.model_sites[name]) for name in problem.latents)
    return posterior
