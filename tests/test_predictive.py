# SPDX-License-Identifier: Apache-2.0
"""Predictive log-likelihood: against closed forms, and against one run for each sample."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_mean
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_mpis.results.predictive
from pyro_mpis import MPImportance, log_predictive

pytestmark = pytest.mark.usefixtures("float64")

Samples = dict[str, Tensor]
TRAIN, TEST = torch.tensor([0.3, -1.2, 1.9]).double(), torch.tensor([2.0, -0.4]).double()
ALL = torch.cat([TRAIN, TEST])


# --- two conjugate models: log p(test | train) and exact posterior samples ------------------


def common_mean(y: Tensor | None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", 3 if y is None else len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def random_effects(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def log_marginal(y: Tensor, own_variance: float) -> float:
    covariance = torch.ones(len(y), len(y)) + own_variance * torch.eye(len(y))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance)
    return float(normal.log_prob(y))


def posterior_of_mean(own_variance: float, num_samples: int) -> Tensor:
    precision = 1 + len(TRAIN) / own_variance
    mean = TRAIN.sum() / own_variance / precision
    return mean + torch.randn(num_samples) / math.sqrt(precision)


def posterior_of_effects(num_samples: int) -> Samples:
    mu = posterior_of_mean(1.25, num_samples)
    precision = 1 + 1 / 0.25
    z = (mu.unsqueeze(-1) + TRAIN / 0.25) / precision
    return {"mu": mu, "z": z + torch.randn(z.shape) / math.sqrt(precision)}


def ratios(log_truth: float, draw: Callable[[], Tensor], repeats: int = 60) -> Tensor:
    """Ratios to the truth of independent estimates, whose mean is one."""
    return torch.stack([(draw() - log_truth).exp() for _ in range(repeats)])


def test_conjugate_mean_against_its_closed_form() -> None:
    """False-alarm probability 1e-6; samples of the prior in place of the posterior's fail."""
    pyro.set_rng_seed(0)
    truth = log_marginal(ALL, 1.0) - log_marginal(TRAIN, 1.0)
    check_mean(
        ratios(
            truth,
            lambda: log_predictive(common_mean, {"mu": posterior_of_mean(1.0, 2000)}, (TEST,)),
        ),
        1.0,
    )
    prior = ratios(
        truth, lambda: log_predictive(common_mean, {"mu": torch.randn(2000)}, {"y": TEST})
    )
    with pytest.raises(AssertionError):
        check_mean(prior, 1.0)


@pytest.mark.parametrize("way", ["held-out data alone", "all data"])
def test_new_plate_elements_against_the_closed_form(way: str) -> None:
    """
    New effects come from the prior given the sample's mean.

    False-alarm probability 1e-6; new effects of the sample's first elements in place of new
    draws fail.
    """
    pyro.set_rng_seed(0)
    truth = log_marginal(ALL, 1.25) - log_marginal(TRAIN, 1.25)

    def alone() -> Tensor:
        return log_predictive(random_effects, {"mu": posterior_of_effects(5000)["mu"]}, (TEST,))

    def together() -> Tensor:
        samples = posterior_of_effects(5000)
        return log_predictive(random_effects, samples, (ALL,), train=(TRAIN,))

    def reused() -> Tensor:
        samples = posterior_of_effects(5000)
        samples["z"] = samples["z"][:, :2]
        return log_predictive(random_effects, samples, (TEST,))

    check_mean(ratios(truth, alone if way == "held-out data alone" else together), 1.0)
    with pytest.raises(AssertionError):
        check_mean(ratios(truth, reused), 1.0)


def test_several_draws_are_averaged_in_each_element_of_the_plate() -> None:
    """
    Given one posterior sample, 40 new effects: unbiased, and far better than whole data sets.

    False-alarm probability 1e-6. Averages of whole data sets, here of the same number of draws,
    are unbiased too, but not one in 60 comes near.
    """
    pyro.set_rng_seed(0)
    y = torch.linspace(-2.0, 3.0, 40)
    mu = torch.tensor([0.3])
    truth = float(dist.Normal(mu, math.sqrt(1.25)).log_prob(y).sum())

    def elements() -> Tensor:
        return log_predictive(random_effects, {"mu": mu}, (y,), num_local_samples=400)

    def data_sets() -> Tensor:
        return log_predictive(random_effects, {"mu": mu.expand(400)}, (y,))

    found = ratios(truth, elements)
    check_mean(found, 1.0)
    assert float(found.std()) < 1.0
    assert float(ratios(truth, data_sets).max()) < 0.1


@pytest.mark.parametrize("way", ["held-out data alone", "all data"])
def test_several_draws_against_the_closed_form(way: str) -> None:
    """Over posterior samples too, one of each draw; false-alarm probability 1e-6."""
    pyro.set_rng_seed(0)
    truth = log_marginal(ALL, 1.25) - log_marginal(TRAIN, 1.25)

    def draw() -> Tensor:
        samples = posterior_of_effects(1000)
        if way == "all data":
            return log_predictive(
                random_effects, samples, (ALL,), train=(TRAIN,), num_local_samples=5
            )
        return log_predictive(random_effects, {"mu": samples["mu"]}, (TEST,), num_local_samples=5)

    check_mean(ratios(truth, draw), 1.0)


def test_several_draws_of_nested_new_latents() -> None:
    """
    A new effect of each group, and of each pair in it, and a site outside that reads neither.

    Elements of the outer plate are averaged, and in them both effects are integrated out:
    y is normal with covariance 1 + 1 + 0.25 in a pair, 1 in a group. False-alarm probability 1e-6.
    """

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("total", dist.Normal(mu, 1.0), obs=y.sum())
        with pyro.plate("group", len(y), dim=-2):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with pyro.plate("pair", 2, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 0.5), obs=y)

    y = torch.tensor([[0.5, 1.0], [-1.0, 0.2], [1.5, 0.0]])
    mu = torch.tensor([0.4, -0.2])
    covariance = torch.eye(2) * 1.25 + 1.0
    normal = torch.distributions.MultivariateNormal(mu.reshape(2, 1, 1).expand(2, 1, 2), covariance)
    each = normal.log_prob(y).sum(-1) + torch.distributions.Normal(mu, 1.0).log_prob(y.sum())
    truth = float(each.logsumexp(0)) - math.log(2)
    pyro.set_rng_seed(0)

    def draw() -> Tensor:
        return log_predictive(model, {"mu": mu}, (y,), num_local_samples=200)

    check_mean(ratios(truth, draw, repeats=200), 1.0)


def test_several_draws_of_latents_that_are_read_outside_of_their_plate() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=z.dim() > 1), 1.0), obs=y)

    samples, data = {"mu": torch.zeros(4)}, (torch.tensor(1.0),)
    assert bool(log_predictive(model, samples, data).isfinite())
    with pytest.raises(ValueError, match="site 'y': reads latents of new plate elements from out"):
        log_predictive(model, samples, data, num_local_samples=2)
    with pytest.raises(ValueError, match="num_local_samples: expected a positive integer, but fo"):
        log_predictive(model, samples, data, num_local_samples=0)


# --- against one run for each sample --------------------------------------------------------


def nested(x: Tensor, y: Tensor) -> None:
    """Vector and scalar latents, nested plates, a mask, two observed sites, a deterministic one."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.deterministic("scale", weights[..., 0].exp())
    with pyro.plate("group", len(y), dim=-2):
        effect = pyro.sample("effect", dist.Normal(0.0, scale))
        with pyro.plate("trial", y.shape[1], dim=-1):
            slope = (x * weights).sum(-1)
            with poutine.mask(mask=cast(torch.BoolTensor, x[..., 0] > -1.0)):
                pyro.sample("y", dist.Normal(effect + slope, 1.0), obs=y)
    pyro.sample("total", dist.Normal(weights[..., 1], 2.0), obs=y.sum())


def nested_data(groups: int, trials: int) -> dict[str, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(groups * 10 + trials)
    x = torch.randn(groups, trials, 2, generator=generator)
    return {"x": x, "y": torch.randn(groups, trials, generator=generator)}


def by_loop(model: Callable[..., None], samples: Samples, data: Mapping[str, Tensor]) -> Tensor:
    """Log-likelihoods of runs with one sample each."""
    result = []
    for s in range(len(next(iter(samples.values())))):
        conditioned = poutine.condition(model, {name: value[s] for name, value in samples.items()})
        trace = poutine.trace(conditioned).get_trace(**data)
        trace.compute_log_prob()
        observed = ("y", "total") if model is nested else ("y",)
        result.append(sum(trace.nodes[name]["log_prob"].sum() for name in observed))
    return torch.stack([torch.as_tensor(value) for value in result])


def nested_samples(num_samples: int, groups: int = 3) -> Samples:
    return {
        "weights": torch.randn(num_samples, 2),
        "effect": torch.randn(num_samples, groups, 1),
    }


@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize("elements", [1, 2**22])
@pytest.mark.parametrize("draws", [1, 3])
def test_equals_runs_with_one_sample_each(
    num_samples: int, elements: int, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger inner plate has no latents of its own; in chunks of one sample, and all at once."""
    monkeypatch.setattr(pyro_mpis.results.predictive, "ELEMENTS", elements)
    pyro.set_rng_seed(1)
    samples = nested_samples(num_samples)
    train, test = nested_data(3, 4), nested_data(3, 6)
    alone = by_loop(nested, samples, test)
    expected = alone.logsumexp(0) - math.log(num_samples)
    found = log_predictive(nested, samples, test, num_local_samples=draws)
    torch.testing.assert_close(found, expected)
    expected = (alone - by_loop(nested, samples, train)).logsumexp(0) - math.log(num_samples)
    torch.testing.assert_close(log_predictive(nested, samples, test, train=train), expected)


def test_elements_that_exist_keep_their_samples_and_the_others_read_globals() -> None:
    """The prior of new effects has no spread to speak of, so that the answer is known."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y), dim=-2):
            effect = pyro.sample("effect", dist.Normal(10 * mu, 1e-9))
            with pyro.plate("trial", y.shape[1], dim=-1):
                own = pyro.sample("own", dist.Normal(effect, 1e-9))
                pyro.sample("y", dist.Normal(own, 1.0), obs=y)

    pyro.set_rng_seed(2)
    samples = {
        "mu": torch.randn(5),
        "effect": torch.randn(5, 2, 1),
        "own": torch.randn(5, 2, 3),
    }
    y = torch.randn(4, 4)
    own = samples["effect"].expand(5, 2, 4).clone()
    own[:, :, :3] = samples["own"]
    own = torch.cat([own, (10 * samples["mu"])[:, None, None].expand(5, 2, 4)], 1)
    both = torch.distributions.Normal(own, 1.0).log_prob(y)
    expected = both.sum((1, 2)).logsumexp(0) - math.log(5)
    torch.testing.assert_close(log_predictive(model, samples, (y,)), expected)
    old = torch.zeros(4, 4, dtype=torch.bool)
    old[:2, :3] = True
    expected = (both * ~old).sum((1, 2)).logsumexp(0) - math.log(5)
    found = log_predictive(model, samples, (y,), train=(y[:2, :3],))
    torch.testing.assert_close(found, expected)


def test_samples_of_every_kind_of_inference() -> None:
    """NUTS, SVI with its auxiliary sites, and massively parallel importance sampling."""
    pyro.set_rng_seed(0)
    kernel = NUTS(random_effects)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(TRAIN)
    guide = AutoNormal(random_effects)
    svi = SVI(random_effects, guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(TRAIN)
    kinds = {
        "NUTS": mcmc.get_samples(),
        "SVI": Predictive(guide, num_samples=20)(TRAIN),
        "SVI, parallel": Predictive(guide, num_samples=20, parallel=True)(TRAIN),
        "MPIS": MPImportance(random_effects, num_samples=30).run(TRAIN).sample(20),
    }
    y = TRAIN + 0.5
    for kind, samples in kinds.items():
        latents = {name: samples[name].detach() for name in ("mu", "z")}
        expected = by_loop(random_effects, latents, {"y": y}).logsumexp(0) - math.log(20)
        found = log_predictive(random_effects, samples, (y,))
        torch.testing.assert_close(found, expected, msg=f"{kind}: {found}, expected {expected}")
        assert not found.requires_grad
        grown = log_predictive(random_effects, samples, (ALL,), train=(TRAIN,))
        assert bool(grown.isfinite()), kind


def test_impossible_data_give_minus_infinity() -> None:
    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Exponential(1.0))
        pyro.sample("y", dist.Uniform(0.0, top, validate_args=False), obs=y)

    samples = {"top": torch.tensor([1.0, 2.0])}
    assert float(log_predictive(model, samples, (torch.tensor(3.0),))) == -math.inf
    found = log_predictive(model, samples, (torch.tensor(1.5),))
    torch.testing.assert_close(found, torch.tensor(-math.log(4.0)))
    with pytest.raises(ValueError, match="some give the training data probability zero"):
        log_predictive(model, samples, (torch.tensor(3.0),), train=(torch.tensor(3.0),))


def test_leaves_no_trace() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.5))
        mu = pyro.sample("mu", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    samples = {"mu": torch.tensor([1.0, 2.0])}
    log_predictive(model, samples, (torch.tensor(3.0),))
    assert list(pyro.get_param_store().keys()) == []
    with pytest.raises(ValueError, match="no such site"):
        log_predictive(model, {"nu": samples["mu"]}, (torch.tensor(3.0),))
    assert poutine.runtime._PYRO_STACK == []


# --- errors ---------------------------------------------------------------------------------

EFFECTS = {"mu": torch.zeros(4), "z": torch.zeros(4, 3)}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "posterior_samples: there are none"),
        ({"mu": 1.0}, r"posterior_samples\['mu'\]: expected a tensor .* found float"),
        ({"mu": torch.zeros(0)}, r"at least one sample, but found \(0,\)"),
        ({"mu": torch.zeros(4), "z": torch.zeros(5, 3)}, "numbers of samples differ"),
        ({"mu": torch.zeros(4), "x": torch.zeros(4)}, "'x': no such site in the model, which has"),
        ({"z": torch.zeros(4, 3)}, "site 'mu': not in posterior_samples, and in no plate"),
        ({"mu": torch.zeros(4, 2), "z": torch.zeros(4, 3)}, r"shape \(2,\) for each sample"),
        ({"mu": torch.zeros(4), "z": torch.zeros(4)}, r"'z': posterior_samples have shape \(\)"),
        ({"mu": torch.zeros(4), "z": torch.zeros(4, 9)}, "plate 'i' has 3 elements in test, but"),
        (
            {"mu": torch.full((4,), math.nan), "z": torch.zeros(4, 3)},
            "site 'mu': posterior_samples have nan",
        ),
    ],
)
def test_samples_that_do_not_fit(samples: Samples, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_predictive(random_effects, samples, (TRAIN,))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"test: expected the model's arg.*write \(x,\)"):
        log_predictive(random_effects, EFFECTS, TRAIN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train: expected the model's arguments"):
        log_predictive(random_effects, EFFECTS, (ALL,), train=TRAIN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test: the model observes nothing when called so"):
        log_predictive(common_mean, {"mu": torch.zeros(4)}, (None,))
    with pytest.raises(ValueError, match="site 'z': not in posterior_samples, so its value in the"):
        log_predictive(random_effects, {"mu": torch.zeros(4)}, (ALL,), train=(TRAIN,))
    with pytest.raises(ValueError, match=r"model called with train has \(2,\)"):
        log_predictive(random_effects, EFFECTS, (ALL,), train=(TEST,))


def test_plates_that_do_not_fit() -> None:
    def two_in_a_plate(y: Tensor) -> None:
        with pyro.plate("i", len(y)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    with pytest.raises(ValueError, match="plate 'i': 3 elements in the samples of 'a', but 2 in"):
        log_predictive(two_in_a_plate, {"a": torch.zeros(4, 3), "b": torch.zeros(4, 2)}, (ALL,))

    def minibatch(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", len(y), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    with pytest.raises(ValueError, match="plate 'i': a subsample of 2 of 5"):
        log_predictive(minibatch, {"mu": torch.zeros(4)}, (ALL,))


def test_models_written_for_single_values() -> None:
    """Indexed from the left, with a branch on a value, one random number besides the sites'."""

    def first_row(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w[0], 1.0), obs=y)

    def branches(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0 if mu > 0 else 1.0, 1.0), obs=y)

    y = torch.tensor(0.5)
    w, mu = torch.tensor([[0.1, 9.0], [-2.0, 9.0]]), torch.tensor([-1.0, 2.0, -3.0])
    expected = dist.Normal(w[:, 0], 1.0).log_prob(y).logsumexp(0) - math.log(2)
    torch.testing.assert_close(log_predictive(first_row, {"w": w}, (y,)), expected)
    expected = dist.Normal((mu < 0).double(), 1.0).log_prob(y).logsumexp(0) - math.log(3)
    torch.testing.assert_close(log_predictive(branches, {"mu": mu}, (y,)), expected)


def test_sites_that_only_some_runs_have() -> None:
    """The data of each sample's own run count."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        if mu > 0:
            pyro.sample("more", dist.Normal(0.0, 1.0), obs=y)

    y, mu = torch.tensor(0.5), torch.tensor([-1.0, 2.0])
    more = dist.Normal(0.0, 1.0).log_prob(y) * (mu > 0)
    expected = (dist.Normal(mu, 1.0).log_prob(y) + more).logsumexp(0) - math.log(2)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(log_predictive(model, {"mu": mu}, (y,)), expected)


def test_steps_that_only_held_out_data_have() -> None:
    """
    A random walk written as a loop: later states come from the prior, given the last one.

    Given the last state, the new data are normal with the variances of two steps and the noise.
    False-alarm probability 1e-6; states that start again at zero fail.
    """

    def walk(y: Tensor, start: float = 1.0) -> None:
        state = torch.zeros(())
        for step in range(len(y)):
            mean = start * state if step == 2 else state
            state = pyro.sample(f"state_{step}", dist.Normal(mean, 1.0))
            pyro.sample(f"y_{step}", dist.Normal(state, 0.5), obs=y[step])

    y = torch.tensor([0.4, 1.5, 2.0, 1.0])
    samples = {"state_0": torch.tensor([0.3]), "state_1": torch.tensor([1.2])}
    covariance = torch.tensor([[1.0, 1.0], [1.0, 2.0]]) + 0.25 * torch.eye(2)
    normal = torch.distributions.MultivariateNormal(torch.full((2,), 1.2), covariance)
    many = {name: value.expand(2000) for name, value in samples.items()}
    truth = float(normal.log_prob(y[2:]))
    pyro.set_rng_seed(0)
    for start, fits in ((1.0, True), (0.0, False)):
        test: dict[str, object] = {"y": y, "start": start}
        draw = partial(log_predictive, walk, many, test, train={"y": y[:2]})
        found = ratios(truth, draw, 30)
        if fits:
            check_mean(found, 1.0)
        else:
            with pytest.raises(AssertionError):
                check_mean(found, 1.0)


def test_plates_without_a_size_and_enumerated_sites() -> None:
    """Indicators that samples have are given; new ones come from the prior, here a certain one."""

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n"):
            shape = torch.tensor([0.0, 1.0]).expand(len(y), 2)
            z = pyro.sample("z", dist.Categorical(shape), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    y, loc = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    each = dist.Normal(loc[:, 1:], 1.0).log_prob(y)
    found = log_predictive(model, {"loc": loc}, (y,))
    torch.testing.assert_close(found, each.sum(-1).logsumexp(0) - math.log(2))
    z = torch.zeros(2, 2, dtype=torch.long)
    each[:, :2] = dist.Normal(loc[:, :1], 1.0).log_prob(y[:2])
    found = log_predictive(model, {"loc": loc, "z": z}, (y,))
    torch.testing.assert_close(found, each.sum(-1).logsumexp(0) - math.log(2))


def test_log_prob_that_is_nan() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.log(), 1.0, validate_args=False), obs=y)

    samples = {"mu": torch.tensor([1.0, -1.0])}
    with pytest.raises(ValueError, match="site 'y': log_prob is nan at some posterior samples"):
        log_predictive(model, samples, (torch.tensor(1.0),))


# --- kinds of models, and of samples, that a run takes too

MU = torch.tensor([0.1, 0.4, -0.3]).double()
SEEN: Any = torch.tensor([True, False])


def hidden_by_handler(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def hidden_by_method(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(SEEN), obs=y)


def scaled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("i", len(y)), poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def without_a_plate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0).expand([2]), obs=y)


def looked_at(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    loc = torch.tensor(float(mu))
    with pyro.plate("i", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def by_name(*, y: Tensor) -> None:
    common_mean(y)


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (hidden_by_handler, [1.0, 0.0]),
        (hidden_by_method, [1.0, 0.0]),
        (scaled, [0.5, 0.5]),
        (without_a_plate, [1.0, 1.0]),
        (looked_at, [1.0, 1.0]),
        (by_name, [1.0, 1.0]),
    ],
)
def test_each_datum_counts_as_in_a_run(model: Callable[..., None], counts: list[float]) -> None:
    each = dist.Normal(MU.unsqueeze(-1), 1.0).log_prob(TEST) * torch.tensor(counts)
    expected = each.sum(-1).logsumexp(0) - math.log(len(MU))
    torch.testing.assert_close(log_predictive(model, {"mu": MU}, {"y": TEST}), expected)


def test_data_outside_of_a_support_that_depends_on_a_latent() -> None:
    def model(y: Tensor) -> None:
        bound = pyro.sample("bound", dist.Gamma(2.0, 1.0))
        with pyro.plate("i", len(y)):
            pyro.sample("y", dist.Uniform(0.0, bound), obs=y)

    bound = torch.tensor([0.5, 1.0, 2.0])
    found = log_predictive(model, {"bound": bound}, (torch.tensor([0.7, 0.1]),))
    assert float(found) == pytest.approx(math.log((0.0 + 1.0 + 0.25) / 3))


@pytest.mark.parametrize(
    "options",
    [{"groups": [("mu", "sd")]}, {"num_samples": {"mu": 20, None: 10}}, {"num_replicates": 3}, {}],
)
def test_draws_of_runs_of_every_kind(options: dict[str, object]) -> None:
    """Of grouped latents, of numbers of particles for each, of ordinary importance sampling."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
        if not options:
            assert float(mu) < 100 * float(sd)  # values that are looked at
        with pyro.plate("i", len(y)):
            pyro.sample("y", dist.Normal(mu, sd), obs=y)

    pyro.set_rng_seed(0)
    settings: dict[str, Any] = {"num_samples": 10} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = MPImportance(model, **settings).run(TRAIN).sample(40)
        found = log_predictive(model, draws, (TEST,))
    each = dist.Normal(draws["mu"].unsqueeze(-1), draws["sd"].unsqueeze(-1)).log_prob(TEST)
    torch.testing.assert_close(found, each.sum(-1).logsumexp(0) - math.log(40))
