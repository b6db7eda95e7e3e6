# SPDX-License-Identifier: Apache-2.0
"""Run the package, and hold what comes out against the sum over all choices."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import pyro
import pytest
from checks import check_evidence, check_samples, check_weights
from oracles import BruteForce, Problem, brute_force
from pyro import poutine
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

Program = Callable[..., object]


def compare(
    model: Program,
    guide: Program | None = None,
    *,
    args: tuple[object, ...] = (),
    num_samples: int = 3,
    groups: Sequence[Sequence[str]] = (),
    together: Sequence[Sequence[str]] = (),
    shared: Mapping[str, Sequence[str]] | None = None,
    shared_plates: Sequence[str] = (),
    single_values: bool = True,
    warning: str | None = None,
    seed: int = 0,
) -> tuple[MPImportance, BruteForce]:
    """
    Check evidence, marginals and joint samples of a run against brute force.

    :param together: sites that are to share a particle index though no group was asked for.
    :param shared: by site, the plates whose elements are to share its particle index.
    :param single_values: whether the model takes single values only.
    :param warning: what the run is to warn of, a regular expression.
    """
    pyro.set_rng_seed(seed)
    posterior = MPImportance(
        model, guide, num_samples=num_samples, groups=groups, shared_plates=shared_plates
    )
    with pytest.warns(MPISWarning, match=warning) if warning else nullcontext():
        posterior.run(*args)
    marginals = posterior.marginals()
    particles = {name: marginal.samples for name, marginal in marginals.items()}
    problem = Problem(
        model, guide, particles, args, groups or together, shared or {}, single_values
    )
    exact = brute_force(problem)
    check_evidence(posterior.evidence(), exact)
    for name, marginal in marginals.items():
        check_weights(marginal.log_weights, exact, name)
    if marginals:
        check_samples(posterior.sample(2000), exact)
    return posterior, exact


def log_joint(program: Program, values: Mapping[str, Tensor], *args: object) -> Tensor:
    """Log of a program's joint density at single values, by a plain run."""
    conditioned = poutine.condition(program, data=dict(values))
    total: Tensor = poutine.trace(conditioned).get_trace(*args).log_prob_sum()  # type: ignore[assignment]
    return total
