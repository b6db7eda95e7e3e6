# SPDX-License-Identifier: Apache-2.0
"""A program written for ``pyro.infer.Importance`` runs with only the class's name changed."""

import logging
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from pyro import poutine
from pyro.contrib.oed import eig
from pyro.infer import CSIS, EmpiricalMarginal, Importance, Predictive
from pyro.infer.abstract_infer import TracePosterior, TracePredictive
from pyro.infer.mcmc.util import print_summary
from pyro.ops.stats import waic
from pyro.optim.pytorch_optimizers import Adam  # type: ignore[attr-defined]
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_mpis import MPImportance, MPISWarning

Program = Callable[..., object]

X = torch.linspace(-1.0, 2.0, 50).unsqueeze(-1)
DATA = 0.7 * X + 0.3


def single(y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a, 0.5), obs=torch.tensor(0.8) if y is None else y)
    return 2.0 * a


def chain() -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 0.5), obs=torch.tensor(0.8))
    return torch.stack([a, b], -1)


def plated() -> Tensor:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(4.0))
    return theta


def column() -> Tensor:
    """Batch dims that no plate declares."""
    w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0))
    pyro.sample("y", dist.Normal(w * X + b, 1.0), obs=DATA)
    return w


def nothing_observed() -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    return pyro.sample("b", dist.Poisson(a.exp()))


def enumerated() -> Tensor:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.8))
    return z


def no_latents() -> float:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.8))
    return 3.0


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (single, chain, plated, column, nothing_observed, enumerated)
}


def quietly(inference: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        return inference.run()


@pytest.mark.parametrize("name", PROGRAMS)
def test_types_and_shapes(name: str) -> None:
    """Every member of ``Importance`` has its type and shape."""
    program, num_samples = PROGRAMS[name], 7
    pyro.set_rng_seed(0)
    theirs: Any = Importance(program, num_samples=num_samples).run()
    ours: Any = quietly(MPImportance(program, num_samples=num_samples))
    assert issubclass(MPImportance, TracePosterior)
    assert ours.num_chains == theirs.num_chains
    assert ours.chain_ids == theirs.chain_ids
    for attribute in ("exec_traces", "log_weights", "chain_ids"):
        assert type(getattr(ours, attribute)) is type(getattr(theirs, attribute))
        assert len(getattr(ours, attribute)) == num_samples
    assert {weight.shape for weight in ours.log_weights} == {torch.Size([])}
    for our_trace, their_trace in zip(ours.exec_traces, theirs.exec_traces, strict=True):
        check_trace(our_trace, their_trace)
    check_trace(ours(), theirs())
    for method, kwargs in [
        ("get_log_normalizer", {}),
        ("get_normalized_weights", {}),
        ("get_normalized_weights", {"log_scale": True}),
        ("get_ESS", {}),
    ]:
        ours_of, theirs_of = (getattr(p, method)(**kwargs) for p in (ours, theirs))
        assert ours_of.shape == theirs_of.shape
        assert ours_of.dtype == theirs_of.dtype
        assert bool(ours_of.isfinite().all())
    assert float(ours.get_normalized_weights().sum()) == pytest.approx(1.0, abs=1e-4)
    for sites in (None, *latents(theirs)):
        check_empirical(EmpiricalMarginal(ours, sites), EmpiricalMarginal(theirs, sites))
    found, expected = (p.marginal(latents(theirs)) for p in (ours, theirs))
    assert found.empirical.keys() == expected.empirical.keys()
    assert found.support().keys() == expected.support().keys()
    for site in expected.empirical:
        check_empirical(found.empirical[site], expected.empirical[site])
        assert found.support()[site].shape == expected.support()[site].shape
    if name != "nothing_observed":
        for pointwise in (False, True):
            criterion = ours.information_criterion(pointwise)
            reference = theirs.information_criterion(pointwise)
            assert type(criterion) is type(reference)
            assert criterion.keys() == reference.keys()
            for key in reference:
                assert criterion[key].shape == reference[key].shape


def latents(posterior: Any) -> list[str]:
    nodes = posterior.exec_traces[0].nodes.items()
    return [n for n, site in nodes if site["type"] == "sample" and not site["is_observed"]][-2:]


def check_trace(ours: Any, theirs: Any) -> None:
    assert {type(ours), type(theirs)} == {Trace}
    assert ours.nodes.keys() == theirs.nodes.keys()
    for name, site in theirs.nodes.items():
        own = ours.nodes[name]
        assert own.keys() == site.keys(), name
        if site["type"] == "sample":
            assert own["is_observed"] == site["is_observed"]
            if hasattr(site["fn"], "batch_shape"):  # not of a plate's own site
                assert own["fn"].batch_shape == site["fn"].batch_shape
            assert own["value"].shape == site["value"].shape
            assert own["value"].dtype == site["value"].dtype
        if name == "_RETURN":
            assert own["value"].shape == site["value"].shape


def check_empirical(ours: Any, theirs: Any) -> None:
    assert ours.batch_shape == theirs.batch_shape
    assert ours.event_shape == theirs.event_shape
    assert ours.sample().shape == theirs.sample().shape
    if theirs.sample().is_floating_point():
        assert ours.mean.shape == ours.variance.shape == theirs.mean.shape
    assert ours.enumerate_support().shape == theirs.enumerate_support().shape


def test_one_index_is_importance_sampling(float64: None) -> None:
    """With one particle index the traces are the particles, and the weights theirs."""

    def guide() -> None:
        pyro.sample("a", dist.Normal(0.5, 0.8))

    posterior: Any = MPImportance(single, guide, num_samples=20).run()
    proposal = dist.Normal(0.5, 0.8)
    for trace, log_weight in zip(posterior.exec_traces, posterior.log_weights, strict=True):
        value = cast(Tensor, trace.nodes["a"]["value"])
        expected = trace.log_prob_sum() - proposal.log_prob(value)
        torch.testing.assert_close(log_weight, expected)
        torch.testing.assert_close(trace.nodes["_RETURN"]["value"], 2.0 * value)
    log_weights = torch.stack(posterior.log_weights)
    expected = log_weights.logsumexp(0) - math.log(20)
    torch.testing.assert_close(posterior.get_log_normalizer(), expected)
    torch.testing.assert_close(posterior.evidence(), expected)
    weights = posterior.get_normalized_weights()
    torch.testing.assert_close(posterior.get_ESS(), 1.0 / weights.square().sum())
    marginal = EmpiricalMarginal(posterior, "a")
    torch.testing.assert_close(marginal.mean, posterior.moments()["a"])
    torch.testing.assert_close(marginal.variance, posterior.marginals("a").variance)
    assert not torch.allclose(weights, torch.full((20,), 0.05), rtol=0.1)


def test_several_indices_give_joint_draws(float64: None) -> None:
    """Traces are draws from the MP posterior; return values belong to them."""
    pyro.set_rng_seed(0)
    number = 1000
    posterior: Any = MPImportance(chain, num_samples=number).run()
    assert {float(weight) for weight in posterior.log_weights} == {float(posterior.evidence())}
    torch.testing.assert_close(posterior.get_log_normalizer(), posterior.evidence())
    b, returned = EmpiricalMarginal(posterior, "b"), EmpiricalMarginal(posterior)
    for site, column in (("a", 0), ("b", 1)):
        draws = EmpiricalMarginal(posterior, site).enumerate_support()
        torch.testing.assert_close(returned.enumerate_support()[:, column], draws)
        marginal = posterior.marginals(site)
        z = (draws.mean() - marginal.mean) / (marginal.variance / number).sqrt()
        assert abs(float(z)) < 5.0  # given the particles; false alarm below 1e-6
        prior = (draws.mean() - 0.0) / (marginal.variance / number).sqrt()
        assert abs(float(prior)) > 5.0  # the prior's mean is rejected
    both = EmpiricalMarginal(posterior, ["a", "b"])
    assert both.event_shape == (2,)
    assert b.sample((3,)).shape == (3,)
    product = posterior.moments(torch.mul, "a", "b")
    draws = returned.enumerate_support().prod(-1)
    square = posterior.moments(lambda a, b: (a * b).square(), "a", "b")
    z = (draws.mean() - product) / ((square - product.square()) / number).sqrt()
    assert abs(float(z)) < 5.0
    ess = min(float(posterior.marginals(site).ess) for site in ("a", "b"))
    assert float(posterior.get_ESS()) == pytest.approx(ess)


def test_draws_are_made_once_a_run() -> None:
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(chain, num_samples=5).run()
    first = EmpiricalMarginal(posterior, "a").enumerate_support()
    assert torch.equal(first, EmpiricalMarginal(posterior, "a").enumerate_support())
    assert posterior.exec_traces is posterior.exec_traces
    posterior.run()
    assert not torch.equal(first, EmpiricalMarginal(posterior, "a").enumerate_support())


def test_call_draws_by_weight(float64: None) -> None:
    """A trace without observations, as often as its weight says."""
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(single, num_samples=4).run()
    particles = torch.stack([trace.nodes["a"]["value"] for trace in posterior.exec_traces])
    drawn = torch.stack([posterior().nodes["a"]["value"] for _ in range(2000)])
    counts = (drawn.unsqueeze(-1) == particles).sum(0).double()
    expected = 2000 * posterior.get_normalized_weights()
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 31.0  # chi-square, 3 degrees of freedom: false alarm below 1e-6
    even = torch.full((4,), 500.0)
    assert float(((counts - even).square() / even).sum()) > 31.0
    assert "y" not in posterior().nodes


def test_information_criterion(float64: None) -> None:
    posterior: Any = MPImportance(column, num_samples=300)
    pyro.set_rng_seed(0)
    posterior = quietly(posterior)
    weights = torch.stack(posterior.log_weights)
    likelihoods = torch.stack(
        [
            dist.Normal(trace.nodes["w"]["value"] * X + trace.nodes["b"]["value"], 1.0).log_prob(
                DATA
            )
            for trace in posterior.exec_traces
        ]
    )
    expected = waic(likelihoods, weights, pointwise=True)
    found = posterior.information_criterion(pointwise=True)
    torch.testing.assert_close(found["waic"], expected[0])
    torch.testing.assert_close(found["p_waic"], expected[1])


def test_no_latents() -> None:
    posterior = MPImportance(no_latents, num_samples=3).run()
    assert len(posterior.exec_traces) == 3
    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.8))
    torch.testing.assert_close(posterior.get_log_normalizer(), expected)
    assert posterior.exec_traces[0].nodes["_RETURN"]["value"] == 3.0
    assert float(posterior.get_ESS()) == 3.0


def test_before_a_run() -> None:
    """As empty as ``Importance`` is."""
    posterior: Any = MPImportance(single, num_samples=3)
    assert posterior.exec_traces == posterior.log_weights == posterior.chain_ids == []
    assert posterior.information_criterion() == {}
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_ESS() == 0
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_normalized_weights() is None
    with pytest.warns(UserWarning, match="log_weights list is empty"):
        assert posterior.get_log_normalizer() is None


def test_trace_predictive(float64: None) -> None:
    """Pyro's older way to a predictive distribution."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(plated, num_samples=50).run()
    with pytest.warns(FutureWarning, match="deprecated"):
        predictive: Any = TracePredictive(plated, posterior, num_samples=5)
    assert EmpiricalMarginal(predictive.run(), "theta").sample().shape == (4,)
    assert len(list(posterior._traces())) == 50


# The rows of the conventions of Pyro's inference classes, one test each.


def test_constructor_and_default_number_of_samples() -> None:
    def guide() -> None:
        pyro.sample("a", dist.Normal(0.5, 0.8))

    assert MPImportance(single, guide, 5).num_samples == 5
    with pytest.warns(MPISWarning, match="num_samples not given"):
        assert MPImportance(single).num_samples == Importance_default()


def Importance_default() -> int:
    with pytest.warns(UserWarning, match="num_samples not provided"):
        number: int = Importance(single).num_samples
    return number


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


def test_summary_has_a_probability() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(single, num_samples=500).run()
    for prob in (0.5, 0.9):
        (row,) = posterior.summary(prob=prob).rows
        lower, median, upper = posterior.marginals("a").quantile(
            [0.5 - prob / 2, 0.5, 0.5 + prob / 2]
        )
        assert (row.lower, row.median, row.upper) == (lower, median, upper)
    assert "25%" in str(posterior.summary(prob=0.5))
    assert "5%" in str(posterior.summary())
    assert "95%" in str(posterior.summary())
    for wrong in (0.0, 1.0, 90.0):
        with pytest.raises(ValueError, match="prob: expected a probability"):
            posterior.summary(prob=wrong)


def test_pickle(float64: None) -> None:
    """After a run, with the traces, if the model is a function of a module."""
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(chain, num_samples=5).run()
    before = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(before.moments(), posterior.moments())
    draws = EmpiricalMarginal(posterior, "a").enumerate_support()
    after = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(EmpiricalMarginal(after, "a").enumerate_support(), draws)
    assert len(EmpiricalMarginal(before, "a").enumerate_support()) == 5


def test_ten_thousand_samples_of_one_site() -> None:
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(single, num_samples=10_000).run(torch.tensor(0.3))
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.3))
    ess = float(posterior.get_ESS())
    assert ess > 3000
    assert abs(float(posterior.get_log_normalizer() - exact)) < 5 / ess**0.5
    assert posterior.get_normalized_weights().shape == (10_000,)
    assert len(posterior.log_weights) == 10_000
    mean = float(EmpiricalMarginal(posterior, "a").mean)  # makes 10,000 traces
    assert abs(mean - 0.3 / 1.25) < 5 * (0.2 / ess) ** 0.5


# Programs that call Importance.


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

    The mean of 30 estimates; false alarm 1e-6. Another prior is rejected.
    """
    pyro.set_rng_seed(0)
    heads = torch.arange(6.0)
    exact = float(dist.Beta(1.0 + heads, 6.0 - heads).entropy().mean())
    estimates = [
        average_posterior_entropy(MPImportance(coin, num_samples=100), 5) for _ in range(30)
    ]
    check_mean(torch.stack(estimates), exact)
    skewed = [
        average_posterior_entropy(
            MPImportance(lambda tosses: coin(tosses, 3.0), num_samples=100), 5
        )
        for _ in range(30)
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
    """The error shows the site and the line, and names the way back."""
    message = r"after site 'friction', in test_drop_in\.py:\d+, `if acceleration\.item\(\) <= 0:`"
    with pytest.raises(ValueError, match=message + r".*torch\.where.*pyro\.infer\.Importance"):
        MPImportance(slope, num_samples=5).run(sliding_time)


def test_sites_that_depend_on_a_latent() -> None:
    def model() -> None:
        number = pyro.sample("number", dist.Poisson(2.0))
        for i in range(int(number.sum())):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(1)
    with pytest.raises(ValueError, match=r"site 'x_\d'.*pyro\.infer\.Importance"):
        MPImportance(model, num_samples=5).run()


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
