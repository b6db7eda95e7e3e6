# SPDX-License-Identifier: Apache-2.0
"""Posterior expectations of functions of sites."""

import pytest
import torch
from hierarchy import run_hierarchy

from pyro_mpis import MPImportance

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def posterior() -> MPImportance:
    return run_hierarchy()


def test_moments_agree_with_marginals(posterior: MPImportance) -> None:
    for name, mean in posterior.moments().items():
        torch.testing.assert_close(mean, posterior.marginals(name).mean)
    for site in ("mu", "v", "x"):
        marginal = posterior.marginals(site)
        second = posterior.moments(torch.square, site)
        torch.testing.assert_close(second - marginal.mean**2, marginal.variance)
    joint = posterior.marginals("mu", "x")
    product = (joint.weights * joint.samples.prod(-1)).sum(-1)
    torch.testing.assert_close(posterior.moments(torch.mul, "mu", "x"), product)


def test_moments_of_functions(posterior: MPImportance) -> None:
    """Event dims, vector results, several functions in one pass, linearity."""
    many = posterior.moments(
        {
            "outer product": (lambda v: v[:, None] * v, "v"),
            "first": (lambda v: v[0], "v"),
            "norm": (torch.linalg.vector_norm, "v"),
            "stack": (lambda mu, x: torch.stack([mu, x, mu * x]), "mu", "x"),
            "positive": (lambda x: x > 0, "x"),
            "constant": (lambda mu: torch.ones(2), "mu"),
            "sum": (lambda mu, x: 2.0 * mu + 3.0 * x, "mu", "x"),
        }
    )
    assert {name: tuple(value.shape) for name, value in many.items()} == {
        "outer product": (2, 1, 4, 4),
        "first": (2, 1),
        "norm": (2, 1),
        "stack": (2, 3, 3),
        "positive": (2, 3),
        "constant": (2,),
        "sum": (2, 3),
    }
    means = posterior.moments()
    torch.testing.assert_close(many["first"], means["v"][..., 0])
    torch.testing.assert_close(many["stack"][..., 1], means["x"])
    torch.testing.assert_close(many["constant"], torch.ones(2))
    torch.testing.assert_close(many["sum"], 2.0 * means["mu"] + 3.0 * means["x"])
    assert bool((many["positive"] >= 0).all())
    assert bool((many["positive"] <= 1).all())
