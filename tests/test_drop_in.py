# SPDX-License-Identifier: Apache-2.0
"""A program written for ``pyro.infer.Importance`` runs with only the class's name changed."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from posteriors import chain, plated, single
from pyro import poutine
from pyro.contrib.oed import eig
from pyro.infer import CSIS, EmpiricalMarginal, Predictive
from pyro.infer.mcmc.util import print_summary
from pyro.optim.pytorch_optimizers import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_mpis import MPImportance, MPISWarning

# --- the conventions of Pyro's inference classes


def test_constructor_and_number_of_samples() -> None:
    def guide() -> None:
        pyro.sample("a", dist.Normal(0.5, 0.8))

    assert MPImportance(single, guide, 5).num_samples == 5
    posterior = MPImportance(single).run()
    assert isinstance(posterior.num_samples, int)  # chosen, as Importance has a default
    assert posterior.marginals("a").log_weights.shape[-1] == posterior.num_samples


def test_the_prior_as_importance_passes_it() -> None:
    """``Importance`` makes a guide of the model by hiding its observations; so may a user."""
    pyro.set_rng_seed(0)
    expected = MPImportance(chain, num_samples=5).run().evidence()
    pyro.set_rng_seed(0)
    guide = poutine.block(chain, hide_types=["observe"])
    torch.testing.assert_close(MPImportance(chain, guide, num_samples=5).run().evidence(), expected)


def test_guessed_plate_nesting(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pyro_mpis"):
        MPImportance(plated, num_samples=3, max_plate_nesting=math.inf).run()
    assert [record.getMessage() for record in caplog.records] == ["Guessed max_plate_nesting = 1"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pyro_mpis"):
        MPImportance(plated, num_samples=3, max_plate_nesting=2).run()
    assert not caplog.records


@pytest.mark.parametrize("value", [-1, 1.5, "1", True, math.nan])
def test_nonsensical_plate_nesting(value: float) -> None:
    with pytest.raises(ValueError, match="max_plate_nesting: expected a number of dims"):
        MPImportance(plated, num_samples=3, max_plate_nesting=value)


def test_run_returns_itself_and_passes_arguments() -> None:
    """Also to runs of the model that come later."""

    def model(x: Tensor, *, y: Tensor) -> Tensor:
        a = pyro.sample("a", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)
        return a + x

    def guide(x: Tensor, *, y: Tensor) -> None:
        pyro.sample("a", dist.Normal((x + y) / 2, 1.0))

    inference = MPImportance(model, guide, num_samples=3)
    posterior = inference.run(torch.tensor(1.0), y=torch.tensor(2.0))
    assert posterior is inference
    difference = EmpiricalMarginal(posterior).mean - EmpiricalMarginal(posterior, "a").mean
    assert float(difference) == pytest.approx(1.0)


def test_samples_go_into_predictive_and_print_summary(capsys: pytest.CaptureFixture[str]) -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=50).run()
    samples = posterior.sample(20)
    assert {name: value.shape for name, value in samples.items()} == {"mu": (20,), "theta": (20, 4)}
    assert not any(value.requires_grad for value in samples.values())
    predictive = Predictive(poutine.uncondition(plated), samples, parallel=True)
    assert predictive()["y"].shape == (20, 4)
    print_summary(samples, group_by_chain=False)
    assert "theta[3]" in capsys.readouterr().out


# --- programs that call Importance


def coin(tosses: int, alpha: float = 1.0) -> Tensor:
    p = pyro.sample("p", dist.Beta(alpha, 1.0))
    return pyro.sample("heads", dist.Binomial(tosses, p))


def average_posterior_entropy(inference: Any, tosses: int) -> Any:
    """
    The entropy of the coin's bias to expect after an experiment of so many tosses.

    As ``pyro.contrib.oed`` has it: outcomes from the marginal distribution of what is to be
    observed, the posterior at each of them.
    """
    outcomes = EmpiricalMarginal(inference.run(tosses), sites=["heads"])
    heads = outcomes.enumerate_support().squeeze(-1)
    entropies = dist.Beta(1.0 + heads, 1.0 + tosses - heads).entropy()
    return torch.stack(inference.log_weights).softmax(0) @ entropies


def test_expected_information(float64: None) -> None:
    """
    All outcomes are equally probable under a flat prior.

    The mean of 15 estimates; false alarm 1e-6. Another prior is rejected.
    """
    pyro.set_rng_seed(0)
    heads = torch.arange(6.0)
    exact = float(dist.Beta(1.0 + heads, 6.0 - heads).entropy().mean())
    estimates = [
        average_posterior_entropy(MPImportance(coin, num_samples=100), 5) for _ in range(15)
    ]
    check_mean(torch.stack(estimates), exact)
    skewed = [
        average_posterior_entropy(
            MPImportance(lambda tosses: coin(tosses, 8.0), num_samples=100), 5
        )
        for _ in range(15)
    ]
    with pytest.raises(AssertionError):
        check_mean(torch.stack(skewed), exact)


@pytest.mark.filterwarnings("ignore:`vi_eig` is deprecated")
def test_optimal_experiment_design(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pyro's own estimator, with the class changed: half the log of one plus design squared."""

    def model(design: Tensor) -> Tensor:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(design * theta, 1.0))

    def guide(design: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
        pyro.sample("theta", dist.Normal(loc, scale))

    monkeypatch.setattr(eig, "Importance", MPImportance)
    pyro.set_rng_seed(0)
    elbo: Any = pyro.infer.TraceMeanField_ELBO()
    information = eig.vi_eig(
        model,
        torch.tensor(2.0),
        "y",
        "theta",
        vi_parameters={
            "guide": guide,
            "optim": Adam({"lr": 0.05}),
            "loss": elbo,
            "num_steps": 60,
        },
        is_parameters={"num_samples": 8},
    )
    assert float(information.detach()) == pytest.approx(0.5 * math.log(5.0), abs=0.15)


class Encoder(nn.Module):
    """A guide that reads what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(2, 2)

    def forward(self, observations: dict[str, Tensor]) -> None:
        pyro.module("encoder", self)
        loc, log_scale = self.layers(torch.stack([observations["x"], observations["y"]]))
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def test_compiled_guide(float64: None) -> None:
    """A guide that CSIS has trained."""

    def model(observations: dict[str, Tensor]) -> Tensor:
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=observations["x"])
        pyro.sample("y", dist.Normal(z, 1.5), obs=observations["y"])
        return z

    pyro.set_rng_seed(0)
    guide, data = Encoder(), {"x": torch.tensor(2.0), "y": torch.tensor(3.0)}
    csis: Any = CSIS(model, guide, Adam({"lr": 0.05}), num_inference_samples=100)
    for _ in range(80):
        csis.step(observations={"x": torch.tensor(0.0), "y": torch.tensor(0.0)})
    posterior = MPImportance(model, guide, num_samples=500).run(observations=data)
    covariance = 4.0 * torch.ones(2, 2) + torch.diag(torch.tensor([1.0, 2.25]))
    exact = dist.MultivariateNormal(torch.ones(2), covariance).log_prob(torch.tensor([2.0, 3.0]))
    ess = float(posterior.get_ESS())
    assert ess > 100  # the prior's is near 250; a guide that ignored the data would have less
    assert abs(float(posterior.get_log_normalizer() - exact)) < 5 * (1 / ess - 1 / 500) ** 0.5
    precision = 0.25 + 1.0 + 1 / 2.25
    mean = (0.25 + 2.0 + 3.0 / 2.25) / precision
    assert abs(float(EmpiricalMarginal(posterior).mean) - mean) < 5 / (precision * ess) ** 0.5
    assert all(parameter.requires_grad for parameter in guide.parameters())


def sliding_time(friction: Tensor) -> Tensor:
    """Time down a slope of two metres at thirty degrees, where it moves at all."""
    acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * friction)
    if acceleration.item() <= 0:
        return torch.tensor(1e5)
    return (4.0 / acceleration).sqrt()


def batched_sliding_time(friction: Tensor) -> Tensor:
    acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * friction)
    moving = (4.0 / acceleration.clamp(min=1e-6)).sqrt()
    return torch.where(acceleration > 0, moving, 1e5)


def slope(time: Callable[[Tensor], Tensor]) -> Tensor:
    friction = pyro.sample("friction", dist.Uniform(0.0, 1.0))
    seconds = time(friction)
    pyro.sample("seconds", dist.Normal(seconds, 0.1), obs=torch.tensor(1.1))
    return seconds


def test_program_that_branches_on_a_latent() -> None:
    """It runs as in Importance, with the numbers that the rewrite has; the line is named."""
    message = r"as in pyro\.infer\.Importance.*after site 'friction', in test_drop_in\.py:\d+, "
    message += r"`if acceleration\.item\(\) <= 0:`.*torch\.where"
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=message):
        posterior = MPImportance(slope, num_samples=50).run(sliding_time)
    friction = posterior.marginals("friction").samples
    times = batched_sliding_time(friction)
    assert bool((times == 1e5).any())
    log_prob = dist.Normal(times, 0.1).log_prob(torch.tensor(1.1))
    torch.testing.assert_close(posterior.get_normalized_weights(), log_prob.softmax(0))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(posterior.evidence(), log_prob.logsumexp(0) - math.log(50))
    mean = (log_prob.softmax(0) * times).sum()
    torch.testing.assert_close(EmpiricalMarginal(posterior).mean, mean)


def test_sites_that_depend_on_a_latent() -> None:
    def model() -> None:
        number = pyro.sample("number", dist.Poisson(2.0))
        total = torch.tensor(0.0)
        for i in range(int(number)):
            total = total + pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.5))

    pyro.set_rng_seed(1)
    with pytest.warns(MPISWarning, match=r"as in pyro\.infer\.Importance.*range\(int\(number"):
        posterior = MPImportance(model, num_samples=30).run()
    assert set(posterior.moments()) == {"number"}
    totals = []
    for trace in posterior.exec_traces:
        number: Any = trace.nodes["number"]["value"]
        names = [name for name in trace.nodes if name.startswith("x_")]
        assert len(names) == int(number)
        values: list[Any] = [trace.nodes[name]["value"] for name in names]
        totals.append(sum(float(value) for value in values))
    log_prob = dist.Normal(torch.tensor(totals), 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(torch.stack(posterior.log_weights), log_prob)


def test_batched_rewrite(float64: None) -> None:
    """Agrees with a sum over a fine grid."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(slope, num_samples=2000).run(batched_sliding_time)
    grid = torch.linspace(0.0, 1.0, 200_001)[:-1] + 2.5e-6
    times = batched_sliding_time(grid)
    likelihood = dist.Normal(times, 0.1).log_prob(torch.tensor(1.1))
    exact = likelihood.logsumexp(0) - math.log(len(grid))
    weights = likelihood.softmax(0)
    ess = float(posterior.get_ESS())
    assert abs(float(posterior.evidence() - exact)) < 5 * (1 / ess - 1 / 2000) ** 0.5
    mean = float((weights * times).sum())
    sd = float((weights * (times - mean).square()).sum().sqrt())
    assert abs(float(EmpiricalMarginal(posterior).mean) - mean) < 5 * sd / ess**0.5
