# SPDX-License-Identifier: Apache-2.0
"""What Pyro programs are made of: each feature against a program written without it."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, config_enumerate
from pyro.infer.importance import vectorized_importance_weights
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.particles import memory, pairs

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.3, -0.5, 1.2], dtype=torch.float64)


def evidence(
    model: Callable[..., object],
    guide: Callable[..., object] | None = None,
    *args: object,
    num_samples: int = 5,
    **kwargs: object,
) -> Tensor:
    pyro.set_rng_seed(0)
    return MPImportance(model, guide, num_samples=num_samples).run(*args, **kwargs).evidence()


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("p", 3):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def test_arguments_go_to_model_and_guide() -> None:
    def model(y: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> None:
        mu = pyro.sample("mu", dist.Normal(shift, 1.0))
        with pyro.plate("p", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    def guide(y: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> None:
        pyro.sample("mu", dist.Normal(shift + y.mean(), scale))

    found = evidence(model, guide, Y, 2.0, shift=1.0, num_samples=4000)
    cov = torch.eye(3) * 4.0 + 1.0
    truth = dist.MultivariateNormal(torch.ones(3), cov).log_prob(Y)
    assert abs(float(found - truth)) < 0.1


def test_masks_and_scales_are_those_of_the_log_prob() -> None:
    """A mask as a handler, as a distribution and in a pyro.factor; a scale and its pyro.factor."""
    keep = torch.tensor([True, False, True])

    def body(observe: Callable[[Tensor], None]) -> Callable[[], None]:
        def model() -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("p", 3):
                observe(mu)

        return model

    def by_handler(mu: Tensor) -> None:
        with poutine.mask(mask=keep):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    def by_distribution(mu: Tensor) -> None:
        pyro.sample("y", dist.Normal(mu, 1.0).mask(keep), obs=Y)

    def by_factor(mu: Tensor) -> None:
        pyro.factor("y", dist.Normal(mu, 1.0).log_prob(Y) * keep)

    results = [evidence(body(f)) for f in (by_handler, by_distribution, by_factor)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])

    def half(mu: Tensor) -> None:
        with poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y)

    def half_factor(mu: Tensor) -> None:
        pyro.factor("y", 0.5 * dist.Normal(mu, 1.0).log_prob(Y))

    torch.testing.assert_close(evidence(body(half)), evidence(body(half_factor)))


def test_obs_mask_imputes_the_hidden() -> None:
    """Hidden observations become latents, drawn from the prior, and add nothing to the evidence."""
    keep = torch.tensor([True, False, True])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=keep)  # type: ignore[arg-type]

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=400).run()
    truth = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1.0).log_prob(Y[keep])
    assert abs(float(posterior.evidence() - truth)) < 0.2
    mean = posterior.moments()
    assert abs(float(mean["y_unobserved"][1] - mean["mu"])) < 0.2
    assert abs(float(mean["mu"]) - float(Y[keep].sum()) / 3) < 0.2


def test_masked_latents_count_as_drawn() -> None:
    """
    What a mask hides of a latent is drawn all the same, and what reads it is weighed by it.

    As with Importance: sequences of different lengths have the evidence of the shorter ones, and
    their hidden states are forecasts.
    """

    def model(steps: int, masked: bool, enumerated: bool) -> None:
        mark = {"enumerate": "parallel"} if enumerated else {}
        z = torch.tensor(0.0)
        for i in range(steps):
            with poutine.mask(mask=not masked or i < 1):
                z = pyro.sample(f"z_{i}", dist.Bernoulli(0.1 + 0.7 * z), infer=mark)  # type: ignore[arg-type]
                pyro.sample(f"y_{i}", dist.Normal(z, 0.5), obs=torch.tensor(1.0))

    short = MPImportance(model, num_samples=1).run(1, masked=False, enumerated=True)
    posterior = MPImportance(model, num_samples=1).run(4, masked=True, enumerated=True)
    torch.testing.assert_close(posterior.evidence(), short.evidence())
    state = posterior.moments()
    torch.testing.assert_close(state["z_1"], 0.1 + 0.7 * state["z_0"])
    torch.testing.assert_close(state["z_3"], 0.1 + 0.7 * state["z_2"])
    sampled = MPImportance(model, num_samples=2000).run(4, masked=True, enumerated=False)
    assert abs(float(sampled.evidence() - short.evidence())) < 0.2
    assert abs(float(sampled.moments()["z_1"] - state["z_1"])) < 0.1


def test_masked_states_are_summed_whether_the_guide_has_them_or_not() -> None:
    """Those that the guide marks for an exact sum are not proposed: its masks mean nothing."""

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        z = torch.tensor(0.0)
        for i in range(3):
            with poutine.mask(mask=i < 1):
                z = pyro.sample(f"z_{i}", dist.Bernoulli(0.1 + 0.7 * z))
                pyro.sample(f"y_{i}", dist.Normal(z, scale), obs=torch.tensor(1.0))

    def guide(states: int) -> None:
        pyro.sample("scale", dist.LogNormal(0.1, 0.4))
        for i in range(states):
            with poutine.mask(mask=i > 0):
                half = dist.Bernoulli(torch.tensor(0.5))
                pyro.sample(f"z_{i}", half, infer={"enumerate": "parallel"})

    evidences = []
    for states in (3, 0):
        pyro.set_rng_seed(0)
        marked = config_enumerate(model)
        posterior = MPImportance(marked, partial(guide, states), num_samples=5).run()
        evidences.append(posterior.evidence())
    torch.testing.assert_close(*evidences)


def test_a_mask_in_the_guide_changes_nothing() -> None:
    def model() -> None:
        with pyro.plate("p", 3), poutine.mask(mask=torch.tensor([True, True, False])):  # type: ignore[call-overload]
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    def guide() -> None:
        with pyro.plate("p", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def masked_guide() -> None:
        with poutine.mask(mask=torch.tensor([True, True, False])):  # type: ignore[call-overload]
            guide()

    for program in (guide, masked_guide):
        torch.testing.assert_close(evidence(model, program), evidence(model))


def test_deterministic_sites_and_reparametrised_ones() -> None:
    """LocScaleReparam moves the latent to another site; the evidence converges to the same."""
    model = poutine.reparam(hierarchy, {"x": LocScaleReparam(0.0)})
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=300).run()
    truth = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1.0).log_prob(Y)
    assert abs(float(posterior.evidence() - truth)) < 0.2
    assert set(posterior.moments()) == {"mu", "x_decentered"}
    draws = posterior.sample(50)
    again = Predictive(model, posterior_samples=draws)()
    torch.testing.assert_close(again["x"], draws["mu"][:, None] + draws["x_decentered"])


def test_deterministic_adds_nothing() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2.0 * mu)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    def plain() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    torch.testing.assert_close(evidence(model), evidence(plain))


def test_modules_with_random_weights_and_params() -> None:
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = (self.weight * x).sum(-1)  # type: ignore[operator]
            with pyro.plate("p", len(y)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=y)  # type: ignore[arg-type]

    x = torch.tensor([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0]])
    found = evidence(Regression(), None, x, Y, num_samples=20_000)
    truth = dist.MultivariateNormal(torch.zeros(3), x @ x.T + torch.eye(3)).log_prob(Y)
    assert abs(float(found - truth)) < 0.1
    assert list(pyro.get_param_store().keys()) == []


def test_params_in_model_and_guide_are_read_and_kept() -> None:
    def model() -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 2.0))

    store = pyro.get_param_store()
    store.clear()
    fresh = evidence(model, guide)
    assert list(store.keys()) == []
    pyro.param("loc", torch.tensor(0.3))
    leaf = store["loc"].unconstrained()  # type: ignore[attr-defined]
    assert float(evidence(model, guide)) != float(fresh)
    assert list(store.keys()) == ["loc"]
    assert store["loc"].unconstrained() is leaf  # type: ignore[attr-defined]
    assert leaf.grad is None
    store.clear()


def test_event_dims_differ_between_guide_and_model() -> None:
    """A guide may draw as one vector what the model has in a plate, and the reverse."""

    def joint_guide() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.5).to_event(1))

    def joint_model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(mu.unsqueeze(-1), torch.ones(3)).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=Y)

    def plated_guide() -> None:
        with pyro.plate("p", 3):
            pyro.sample("x", dist.Normal(0.0, 1.5))

    truth = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1.0).log_prob(Y)
    for model, guide in ((hierarchy, joint_guide), (joint_model, plated_guide)):
        pyro.set_rng_seed(0)
        posterior = MPImportance(model, guide, num_samples=1000).run()
        assert abs(float(posterior.evidence() - truth)) < 0.2
        assert posterior.moments()["x"].shape == (3,)
        assert posterior.sample(4)["x"].shape == (4, 3)


def test_single_precision_stays_single() -> None:
    torch.set_default_dtype(torch.float32)
    y = Y.float()

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = MPImportance(model, num_samples=5).run()
    assert posterior.evidence().dtype == torch.float32
    assert posterior.moments()["mu"].dtype == torch.float32
    assert posterior.sample(2)["mu"].dtype == torch.float32
    assert posterior.marginals("mu").log_weights.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    y = Y.cuda()

    def model() -> None:
        zero = y.new_zeros(())
        mu = pyro.sample("mu", dist.Normal(zero, 1.0))
        with pyro.plate("p", 3):
            x = pyro.sample("x", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    posterior = MPImportance(model, num_samples=300).run()
    truth = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1.0).log_prob(Y)
    assert posterior.evidence().device.type == "cuda"
    assert abs(float(posterior.evidence()) - float(truth)) < 0.2
    assert posterior.sample(3)["x"].shape == (3, 3)
    assert posterior.marginals("mu", "x").ess.device.type == "cuda"
    assert str(posterior.summary())


def no_latents() -> None:
    with pyro.plate("p", 3):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y)


def test_model_without_latents() -> None:
    posterior = MPImportance(no_latents, num_samples=3).run()
    torch.testing.assert_close(posterior.evidence(), dist.Normal(0.0, 1.0).log_prob(Y).sum())
    assert posterior.moments() == {}
    assert posterior.sample(3) == {}
    assert "log evidence" in str(posterior.summary())


def test_model_without_observations() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0))

    posterior = MPImportance(model, num_samples=4).run()
    torch.testing.assert_close(posterior.evidence(), torch.tensor(0.0), atol=1e-12, rtol=0)


def test_model_with_a_delta_latent() -> None:
    """A Delta in the model follows the particles that it was computed from."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        twice = pyro.sample("twice", dist.Delta(2.0 * mu))
        pyro.sample("y", dist.Normal(twice, 1.0), obs=Y[0])

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=6).run()
    mean = posterior.moments()
    torch.testing.assert_close(mean["twice"], 2.0 * mean["mu"])
    draws = posterior.sample(10)
    torch.testing.assert_close(draws["twice"], 2.0 * draws["mu"])


def test_many_sites_share_dims() -> None:
    """A long chain needs a handful of dims, with or without pyro.markov; its evidence is known."""
    steps = 70
    y = torch.linspace(-1.0, 1.0, steps)

    def chain(markov: bool) -> None:
        x = torch.tensor(0.0)
        for t in pyro.markov(range(steps)) if markov else range(steps):
            x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, 0.5))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])

    lag = torch.arange(steps)
    half = torch.tensor([[0.9 ** float(i - j) if j <= i else 0.0 for j in lag] for i in lag])
    cov = 0.25 * half @ half.T + 0.25 * torch.eye(steps)
    truth = float(dist.MultivariateNormal(torch.zeros(steps), cov).log_prob(y))
    for markov in (False, True):
        pyro.set_rng_seed(0)
        posterior = MPImportance(chain, num_samples=100).run(markov)
        assert abs(float(posterior.evidence()) - truth) < 1.0
        assert len(posterior.sample(5)) == steps
        assert len(posterior.moments()) == steps


def test_many_samples_of_a_single_site() -> None:
    """Nothing is of size K squared for a site without parents."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    posterior = MPImportance(model, num_samples=200_000).run()
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(Y[0])
    assert abs(float(posterior.evidence() - truth)) < 0.02


@pytest.mark.parametrize("groups", [[], [("mu", "x")]])
def test_agrees_with_vectorised_importance(groups: list[tuple[str, ...]]) -> None:
    """K = 1, and one group of everything, are ordinary importance sampling on the same draws."""
    num_samples = 6 if groups else 1

    def guide() -> None:
        mu = pyro.sample("mu", dist.Normal(0.2, 1.3))
        with pyro.plate("p", 3):
            pyro.sample("x", dist.Normal(0.5 * mu, 1.2))

    pyro.set_rng_seed(0)
    posterior = MPImportance(hierarchy, guide, num_samples=num_samples, groups=groups).run()
    if groups:  # the plate is drawn as one with mu
        assert posterior.marginals("mu", "x").samples.shape == (3, num_samples, 2)
    particles = {name: m.samples for name, m in posterior.marginals().items()}
    mu, x = particles["mu"], particles["x"].movedim(-1, 0)
    values = {"mu": mu.reshape(-1, 1), "x": x}

    class Given(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] in values:
                msg["value"], msg["done"] = values[msg["name"]], True

    with Given():
        log_weights, _, _ = vectorized_importance_weights(
            hierarchy, guide, num_samples=num_samples, max_plate_nesting=1, normalized=False
        )
    expected = log_weights.logsumexp(0) - math.log(num_samples)
    torch.testing.assert_close(posterior.evidence(), expected.reshape(()))
    torch.testing.assert_close(
        posterior.marginals("mu").log_weights, log_weights.log_softmax(0).reshape(-1)
    )


def test_sites_configured_for_tensor_monte_carlo_are_sampled() -> None:
    """config_enumerate(num_samples=K) marks sites for TraceTMC_ELBO: those are particles here."""

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    marked = config_enumerate(guide, "parallel", num_samples=7)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    torch.testing.assert_close(evidence(model, marked), evidence(model, guide))


def test_predictive_takes_the_samples() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(hierarchy, num_samples=8).run()

    def prediction() -> Tensor:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            x = pyro.sample("x", dist.Normal(mu, 1.0))
            return pyro.sample("new", dist.Normal(x, 1.0))

    draws = posterior.sample(100)
    for parallel in (False, True):
        result = Predictive(prediction, posterior_samples=draws, parallel=parallel)()
        assert result["new"].shape == (100, 3)


def test_same_seed_same_result() -> None:
    results = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        posterior = MPImportance(hierarchy, num_samples=4).run()
        results.append((posterior.evidence(), posterior.sample(5)["x"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_validation_off_gives_the_same() -> None:
    on = evidence(hierarchy)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(evidence(hierarchy), on)
    assert _PYRO_STACK == []


def test_nothing_requires_grad_outside_of_training() -> None:
    scale = torch.tensor(1.0, requires_grad=True)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])

    posterior = MPImportance(model, num_samples=4).run()
    assert not posterior.evidence().requires_grad
    assert not posterior.moments()["mu"].requires_grad
    assert not posterior.marginals("mu").mean.requires_grad
    assert not posterior.sample(2)["mu"].requires_grad
    assert scale.grad is None


def test_masks_and_scales_are_read_too() -> None:
    """With more sites than dims of their own, what a mask or a scale was computed from counts."""

    def masked(n: int) -> None:
        xs = [pyro.sample(f"x{i}", dist.Normal(0.0, 1.0)) for i in range(n)]
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with poutine.mask(mask=z.bool()):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(xs[3], 1.0), obs=torch.tensor(1.0))

    def scaled(n: int) -> None:
        xs = [pyro.sample(f"x{i}", dist.Normal(0.0, 1.0)) for i in range(n)]
        z = pyro.sample("z", dist.Gamma(5.0, 5.0))
        with poutine.scale(scale=z):
            pyro.sample("y", dist.Normal(xs[3], 1.0), obs=torch.tensor(1.0))

    for model in (masked, scaled):
        means = []
        for n in (5, 20):
            pyro.set_rng_seed(0)
            posterior = MPImportance(model, num_samples=2000).run(n)
            means.append(float(posterior.moments()["z"]))
        assert abs(means[0] - means[1]) < 0.05


def test_infinite_values_of_weight_zero_do_not_count() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.factor("f", torch.tensor([-1e9, 0.0, 0.0])[z])

    posterior = MPImportance(model, num_samples=1).run()
    mean = posterior.moments(lambda z: 1.0 / z, "z")
    torch.testing.assert_close(mean, torch.tensor(0.75))


def test_delta_of_one_event_for_a_plated_site() -> None:
    """The guide's value is one vector, the model's site is plated."""

    def model() -> None:
        with pyro.plate("p", 3):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    def guide() -> None:
        u = pyro.sample(
            "u", dist.Normal(torch.zeros(3), 1.2).to_event(1), infer={"is_auxiliary": True}
        )
        pyro.sample("x", dist.Delta(u, event_dim=1))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=20_000).run()
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(Y).sum()
    assert abs(float(posterior.evidence() - truth)) < 0.1
    assert posterior.sample(2)["x"].shape == (2, 3)


def test_guide_in_a_plate_of_another_name_warns() -> None:
    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("other", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.warns(MPISWarning, match=r"'x': in other plates in the guide"):
        evidence(hierarchy, guide)


def test_model_delta_read_by_index_has_no_queries() -> None:
    """The evidence is that of the model without it."""
    county = torch.tensor([0, 1, 1])

    def model(named: bool) -> None:
        with pyro.plate("county", 2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            mean = a[..., county]
            if named:
                mean = pyro.sample("mean", dist.Delta(mean))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    torch.testing.assert_close(evidence(model, None, True), evidence(model, None, False))
    posterior = MPImportance(model, num_samples=3).run(True)
    assert set(posterior.sample(2)) == {"a"}
    with pytest.raises(ValueError, match=r"site 'mean': the model has no such latent site"):
        posterior.marginals("mean")


def test_group_that_reads_an_enumerated_site() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        a = pyro.sample("a", dist.Normal(z, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=Y[0])

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=2_000, groups=[("a", "b")]).run()
    density = dist.Normal(torch.tensor([0.0, 1.0]), math.sqrt(3.0)).log_prob(Y[0])
    truth = density.logsumexp(0) - math.log(2.0)
    assert abs(float(posterior.evidence() - truth)) < 0.1


def test_mixtures_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs of particles of a child and its parents are many: a part of them at a time."""
    results = []
    for elements in (2**24, 40, 1):
        monkeypatch.setattr(pairs, "MIXTURE_ELEMENTS", elements)
        results.append(evidence(hierarchy, num_samples=7))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_numbers_of_samples_may_be_numpy_s() -> None:
    import numpy as np

    assert MPImportance(hierarchy, num_samples=np.int64(3)).num_samples == 3  # type: ignore[arg-type]


def test_sites_marked_for_sequential_enumeration_are_summed_too() -> None:
    """Exactly, with a single particle: Pyro's two ways differ in how they sum, not in the sum."""

    def model(how: Literal["parallel", "sequential"]) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])), infer={"enumerate": how})
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 1.0]))

    evidence = MPImportance(model, num_samples=1).run("sequential").evidence()
    torch.testing.assert_close(
        evidence, MPImportance(model, num_samples=1).run("parallel").evidence()
    )
    y = torch.tensor([0.5, 1.0])
    p = torch.tensor([0.3, 0.6])
    one, zero = (dist.Normal(z, 1.0).log_prob(y).exp() for z in (1.0, 0.0))
    torch.testing.assert_close(evidence, (p * one + (1 - p) * zero).log().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_single(dtype: torch.dtype) -> None:
    """Of a conjugate model: the log evidence, within the densities' own rounding."""
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(zero, one))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(a, one), obs=torch.ones(3, dtype=dtype))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=2000).run()
    assert posterior.evidence().dtype == torch.float32
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0)
    assert posterior.evidence().item() == pytest.approx(
        joint.log_prob(torch.ones(3)).item(), abs=0.1
    )
    assert posterior.sample(5)["a"].dtype == dtype


def test_a_long_wait_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain whose steps all read two global latents: four indices; with a group, three."""

    def chain() -> None:
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        x = torch.tensor(0.0)
        for i in range(3):
            x = pyro.sample(f"x_{i}", dist.Normal(phi * x, scale))
            pyro.sample(f"y_{i}", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    work = 5 + 5 + 5**3 + 2 * 5**4 + 3 * 5  # of phi, scale, x_0, the other x, the y
    monkeypatch.setattr(memory, "MUCH_WORK", work - 1)
    with pytest.warns(MPISWarning, match=r"1\.4e\+03 densities, .* 'x_1' .* 4 particle indices"):
        MPImportance(chain, num_samples=5).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MPImportance(chain, num_samples=5, groups=[("phi", "scale")]).run()
        monkeypatch.setattr(memory, "MUCH_WORK", work)
        MPImportance(chain, num_samples=5).run()


def test_autocast_and_deterministic_algorithms_change_nothing() -> None:
    """Around the run: the programs' own products are not rounded either."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("p", 3):
            mean = torch.tensor([[1.0, 2.3], [0.1, 1.7], [1.9, 1.3]]) @ w
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    plain = evidence(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evidence(model), plain)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(evidence(model), plain)
    finally:
        torch.use_deterministic_algorithms(False)
