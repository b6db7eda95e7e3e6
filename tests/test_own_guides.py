# SPDX-License-Identifier: Apache-2.0
"""``adapt`` with a guide of the user's own: it is trained in place."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.adaptation import training

DATA = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])
COVARIANCE = 1.25 * torch.eye(5) + torch.ones(5, 5)
LOG_EVIDENCE = float(dist.MultivariateNormal(torch.zeros(5), COVARIANCE).log_prob(DATA))
MEAN = float(torch.ones(5) @ torch.linalg.solve(COVARIANCE, DATA))


def model(y: Tensor = DATA) -> None:
    """Normal means of a plate, with a parameter of its own."""
    width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 5):
        x = pyro.sample("x", dist.Normal(m, width))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def positive(name: str, value: Tensor) -> Tensor:
    result: Tensor = pyro.param(name, value, constraint=constraints.positive)
    return result


def guide(y: Tensor = DATA) -> None:
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(-2.0)), positive("sd", 0.3 * ONE)))
    with pyro.plate("rows", 5):
        loc = pyro.param("locs", torch.zeros(5))
        pyro.sample("x", dist.Normal(loc, positive("sds", torch.full((5,), 0.3))))


ONE = torch.ones(())


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    monkeypatch.setattr(training, "RATES", (0.05, 0.01))
    monkeypatch.setattr(training, "MOST_WINDOWS", 6)


def test_parameters_go_to_the_posterior() -> None:
    """
    From 2.6 away; the bound is flat within a posterior sd, 0.45, as particles are weighed.

    Numbers are chosen, and those of the model stay.
    """
    posterior = MPImportance(model, guide).adapt().run()
    assert isinstance(posterior.num_samples, int)
    assert posterior.num_samples in training.NUMBERS
    assert posterior.num_replicates >= 4
    width = pyro.param("width")
    assert float(width.detach()) == 1.0
    assert width.unconstrained().grad is None  # type: ignore[attr-defined]
    assert posterior.guide is guide
    assert float(posterior.evidence()) == pytest.approx(LOG_EVIDENCE, abs=0.1)
    assert float(posterior.moments()["m"]) == pytest.approx(MEAN, abs=0.1)
    assert float(pyro.param("loc").detach()) == pytest.approx(MEAN, abs=1.0)


@pytest.mark.filterwarnings("ignore:adapt trained the guide, but:pyro_mpis.MPISWarning")
def test_given_numbers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_WINDOWS", 1)
    kept = MPImportance(model, guide, num_samples=7, num_replicates=200).adapt()
    assert kept.num_samples == 7
    assert kept.num_replicates == 200


def test_an_autoguide_is_trained() -> None:
    auto = AutoNormal(model)
    posterior = MPImportance(model, auto).adapt().run()
    assert posterior.guide is auto
    assert float(posterior.evidence()) == pytest.approx(LOG_EVIDENCE, abs=0.3)


def counts(y: Tensor | None = None) -> None:
    rate = pyro.sample("rate", dist.Gamma(3.0, 0.5))
    n = pyro.sample("n", dist.Poisson(rate))
    pyro.sample("y", dist.Normal(n, 1.0), obs=torch.tensor(7.0))


def counts_guide(y: Tensor | None = None) -> None:
    a, b = positive("a", torch.tensor(3.0)), positive("b", torch.tensor(0.5))
    pyro.sample("rate", dist.Gamma(a, b))
    pyro.sample("n", dist.Poisson(positive("mean", torch.tensor(2.0))))


def test_draws_without_a_gradient_are_learned_by_wake_sleep() -> None:
    """Against the sum over counts: a Gamma mixture of Poissons is negative binomial."""
    n = torch.arange(200.0)
    log_prior = dist.GammaPoisson(torch.tensor(3.0), torch.tensor(0.5)).log_prob(n)
    log_joint = log_prior + dist.Normal(n, 1.0).log_prob(torch.tensor(7.0))
    expected = float(log_joint.logsumexp(0))
    mean = float((log_joint.softmax(0) * n).sum())
    posterior = MPImportance(counts, counts_guide).adapt().run()
    assert float(posterior.evidence()) == pytest.approx(expected, abs=0.1)
    assert float(pyro.param("mean").detach()) == pytest.approx(mean, abs=1.0)


def test_a_guide_without_parameters_is_refused() -> None:
    def fixed() -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide: it has no parameters that adapt could learn"):
        MPImportance(model, fixed).adapt()


def test_groups_are_kept_with_a_guide_and_refused_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_WINDOWS", 1)
    pair = [("m", "x")]
    posterior = MPImportance(model, guide, num_samples=20, groups=pair, shared_plates=["rows"])
    assert posterior.adapt().groups == (("m", "x"),)
    with pytest.raises(ValueError, match="groups: the guide that adapt learns has one particle"):
        MPImportance(model, groups=pair).adapt()


def test_a_bound_that_is_not_finite_leaves_the_parameters() -> None:
    def impossible() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(m < 1e9, -math.inf, 0.0))

    def of_m() -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    with pytest.raises(ValueError, match="adapt: the log evidence of a step of training"):
        MPImportance(impossible, of_m).adapt()
    assert float(pyro.param("loc").detach()) == 0.5


def test_a_poor_guide_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOW_ESS", 1e6)
    monkeypatch.setattr(training, "MOST_WINDOWS", 1)
    with pytest.warns(MPISWarning, match="adapt trained the guide, but trial runs with it have"):
        MPImportance(model, guide).adapt()
