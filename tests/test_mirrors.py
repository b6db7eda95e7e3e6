# SPDX-License-Identifier: Apache-2.0
"""Exact mirror images of a posterior: which signs can be turned together; both are proposed."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.adaptation.adapting import started
from pyro_mpis.adaptation.mirrors import mirrors
from pyro_mpis.options import Options

DATA = torch.tensor([[1.0, 2.1], [1.9, 4.2], [-3.0, -5.8]])


def factors(skew: float = 0.0) -> None:
    """Loadings times factors: both may turn, with the loadings' mean."""
    m = pyro.sample("m", dist.Normal(skew, 1.0))
    log_width = pyro.sample("log_width", dist.Normal(0.0, 1.0))
    pyro.sample("alone", dist.Normal(0.0, 1.0))
    with pyro.plate("column", 2, dim=-1):
        w = pyro.sample("w", dist.Normal(m, log_width.exp()))
    with pyro.plate("row", 3, dim=-2):
        f = pyro.sample("f", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-1), pyro.plate("rows", 3, dim=-2):
        pyro.sample("y", dist.Normal(w * f, 0.3), obs=DATA)


def skewed() -> None:
    factors(0.5)


def scales() -> None:
    """A latent that is a scale where it is positive, and no distribution where it is not."""
    a = pyro.sample("a", dist.Normal(5.0, 0.1))
    b = pyro.sample("b", dist.Normal(0.0, a))
    pyro.sample("y", dist.Normal(b.abs(), 1.0), obs=torch.tensor(2.0))


def by_trial(model: Callable[[], None], names: list[str]) -> set[frozenset[str]]:
    """Turn every set of latents at an ordinary draw, and compare the joint density."""
    pyro.set_rng_seed(3)
    trace = poutine.trace(model).get_trace()
    values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in names}

    def log_joint(turned: frozenset[str]) -> float:
        data = {n: -v if n in turned else v for n, v in values.items()}
        with pyro.validation_enabled(False):
            conditioned = poutine.condition(model, data=data)
            return float(poutine.trace(conditioned).get_trace().log_prob_sum())

    sets = [frozenset(c) for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
    expected = log_joint(frozenset())
    return {s for s in sets if math.isclose(log_joint(s), expected, rel_tol=1e-4)}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (factors, ["m", "log_width", "alone", "w", "f"]),
        (skewed, ["m", "log_width", "alone", "w", "f"]),
        (scales, ["a", "b"]),
    ],
)
def test_signs_turn_as_the_joint_density_allows(
    model: Callable[[], None], names: list[str]
) -> None:
    pyro.set_rng_seed(0)
    basis = mirrors(started(model, (), {}, Options(num_samples=2)))
    spanned = {frozenset[str]()}
    for chosen in basis:
        spanned |= {chosen ^ other for other in spanned}
    assert len(spanned) == 2 ** len(basis)
    assert spanned == by_trial(model, names)


def two_signs(latents: int = 12) -> None:
    """Too many numbers for some particles to be drawn from all of the prior."""
    x = pyro.sample("x", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
    with pyro.plate("group", 3):
        t = pyro.sample("t", dist.Normal(4 * x[0], 0.3))
        pyro.sample("y", dist.Normal(t.abs(), 0.1), obs=torch.tensor([4.0, 4.3, 4.1]))


def test_a_proposal_is_spread_over_both_images() -> None:
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MPISWarning)
        posterior = MPImportance(two_signs).adapt().run()
    grid = torch.linspace(-4, 4, 1001, dtype=torch.double)
    t = torch.linspace(-12, 12, 1201, dtype=torch.double).unsqueeze(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(grid)
    for datum in (4.0, 4.3, 4.1):
        of_t = dist.Normal(4 * grid, 0.3).log_prob(t)
        of_t = of_t + dist.Normal(t.abs(), 0.1).log_prob(torch.tensor(datum))
        log_p = log_p + of_t.logsumexp(0) + math.log(0.02)
    expected = float(log_p.logsumexp(0)) + math.log(0.008)
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.1)
    moments = posterior.moments()
    assert float(moments["x"][0].abs()) < 0.05
    assert float(moments["t"].abs().max()) < 0.2


def test_nothing_is_told_where_both_images_are_reached() -> None:
    """Of few numbers a tenth of the particles is drawn as wide as the prior."""

    def square() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(x.square(), 0.5), obs=torch.tensor(4.0))

    pyro.set_rng_seed(0)
    posterior = MPImportance(square).adapt().run()
    grid = torch.linspace(-12, 12, 24001, dtype=torch.double)
    log_p = dist.Normal(0.0, 2.0).log_prob(grid)
    log_p = log_p + dist.Normal(grid.square(), 0.5).log_prob(torch.tensor(4.0))
    expected = float(log_p.logsumexp(0)) + math.log(0.001)
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.05)
