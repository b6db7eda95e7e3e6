# SPDX-License-Identifier: Apache-2.0
"""What the user holds: its arguments, queries before a run and queries that make no sense."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from failing import chain, fails
from pyro import poutine

from pyro_mpis import MPImportance


@pytest.mark.parametrize("num_samples", [0, -1, 2.0, "3", True])
def test_number_of_samples(num_samples: int) -> None:
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        MPImportance(chain, num_samples=num_samples)


def test_programs_that_are_none() -> None:
    with pytest.raises(ValueError, match="model: expected a callable, but found int"):
        MPImportance(3, num_samples=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guide: expected a callable, but found dict"):
        MPImportance(chain, {}, num_samples=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "query",
    [
        lambda posterior: posterior.evidence(),
        lambda posterior: posterior.moments(),
        lambda posterior: posterior.marginals(),
        lambda posterior: posterior.sample(3),
        lambda posterior: posterior.summary(),
    ],
)
def test_query_before_run(query: Callable[[MPImportance], object]) -> None:
    with pytest.raises(RuntimeError, match=r"call \.run"):
        query(MPImportance(chain, num_samples=2))


def test_failed_run_keeps_the_last_posterior() -> None:
    """A run that fails changes nothing."""
    posterior = MPImportance(chain, num_samples=2).run()
    before = posterior.evidence()
    with pytest.raises(TypeError):
        posterior.run(1, 2, 3)
    assert torch.equal(posterior.evidence(), before)


def test_unknown_sites() -> None:
    posterior = MPImportance(chain, num_samples=2).run()
    for query in (
        lambda: posterior.marginals("c"),
        lambda: posterior.moments(torch.log, "c"),
        lambda: posterior.moments({"m": (torch.mul, "a", "c")}),
        lambda: posterior.marginals("y"),
    ):
        with pytest.raises(ValueError, match=r"no such latent site, only 'a', 'b'"):
            query()
    with pytest.raises(
        ValueError, match=r"expected the name of a site, but found list.*one by one"
    ):
        posterior.marginals(["a", "b"])  # type: ignore[call-overload]


def test_moments_that_make_no_sense() -> None:
    posterior = MPImportance(chain, num_samples=2).run()
    with pytest.raises(ValueError, match=r"moments: give the names of the function's sites"):
        posterior.moments(torch.log)
    with pytest.raises(ValueError, match=r"moment 'm': expected a function and the names"):
        posterior.moments({"m": "a"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"moment function of 'a' failed: it returned int, not"):
        posterior.moments(lambda a: 3, "a")  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"moment function of 'a' failed"):
        posterior.moments(lambda a: a.item(), "a")
    with pytest.raises(ValueError, match=r"moment function of 'a', 'b' failed"):
        posterior.moments(lambda a: a, "a", "b")
    with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
        posterior.sample(0)
    with pytest.raises(ValueError, match="q: expected probabilities"):
        posterior.marginals("a").quantile(1.5)


def test_sites_of_different_plates_have_no_joint() -> None:
    def model() -> None:
        with pyro.plate("p", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("q", 3):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    posterior = MPImportance(model, num_samples=2).run()
    with pytest.raises(ValueError, match=r"sites 'a' and 'b'.*different plates.*\.sample"):
        posterior.marginals("a", "b")


def test_evidence_of_zero() -> None:
    def impossible() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        with pyro.plate("p", 2):
            log_prob = torch.where(a > torch.tensor([-1.0, 2.0]), 0.0, -torch.inf)
            pyro.factor("limit", log_prob)

    def together() -> None:
        a = pyro.sample("a", dist.Bernoulli(0.5))
        pyro.factor("one", torch.where(a == 1.0, 0.0, -torch.inf))
        pyro.factor("zero", torch.where(a == 0.0, 0.0, -torch.inf))

    fails(ValueError, r"site 'limit': probability zero.* at 1 of 2 plate elements", impossible)
    fails(ValueError, r"no combination.*'one', 'zero'", together, K=30)


def test_runs_under_handlers() -> None:
    """Conditioning and scaling from outside act on the run."""
    conditioned = poutine.condition(lambda: chain(), {"a": torch.tensor(0.0)})
    posterior = MPImportance(conditioned, num_samples=2).run()
    assert set(posterior.moments()) == {"b"}
