# SPDX-License-Identifier: Apache-2.0
"""At home among Pyro's handlers, tools and settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    EmpiricalMarginal,
    Predictive,
    WeighedPredictive,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.stats import weighed_quantile
from pyro.poutine.runtime import _PYRO_STACK, InferDict
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

Program = Callable[..., object]

equalize: Any = getattr(poutine, "equalize", None)

Y = torch.tensor([0.3, 1.5, -0.4])


def hierarchy() -> Tensor:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=Y)
    return theta


def unobserved_hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5))


def same(program: Program, longhand: Program, num_samples: int = 6) -> MPImportance:
    """Check that two programs have the same posterior, to the last particle."""
    found = []
    for model in (program, longhand):
        pyro.set_rng_seed(0)
        found.append(MPImportance(model, num_samples=num_samples).run())
    torch.testing.assert_close(found[0].evidence(), found[1].evidence())
    torch.testing.assert_close(found[0].moments(), found[1].moments())
    for name, marginal in found[1].marginals().items():
        torch.testing.assert_close(found[0].marginals(name).log_weights, marginal.log_weights)
    return found[0]


# Handlers around the model.


def test_condition(float64: None) -> None:
    same(poutine.condition(unobserved_hierarchy, data={"y": Y}), hierarchy)


def test_condition_on_a_latent(float64: None) -> None:
    def longhand() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0), obs=torch.tensor(0.4))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=Y)

    same(poutine.condition(hierarchy, data={"mu": torch.tensor(0.4)}), longhand)


def test_do(float64: None) -> None:
    """The site stays, and nothing reads it; its value is set for what is downstream."""

    def longhand() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            theta = pyro.sample("theta", dist.Normal(0.4, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=Y)

    same(poutine.do(hierarchy, data={"mu": torch.tensor(0.4)}), longhand)


def test_block(float64: None) -> None:
    """Hidden observations do not count, as in ``Importance``."""

    def longhand() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            pyro.sample("theta", dist.Normal(mu, tau))

    same(poutine.block(hierarchy, hide=["y"]), longhand)
    same(poutine.block(hierarchy, hide_types=["observe"]), longhand)


def test_reparam(float64: None) -> None:
    def longhand() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            z = pyro.sample("theta_decentered", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, 0.5), obs=Y)

    program = poutine.reparam(hierarchy, config={"theta": LocScaleReparam(0.0)})
    posterior = same(program, longhand)
    # the site itself is in the traces
    mean = EmpiricalMarginal(posterior, "theta").mean
    assert torch.equal(EmpiricalMarginal(posterior).mean, mean)
    assert mean.shape == (3,)


def test_scale(float64: None) -> None:
    def longhand() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.factor("y", 0.25 * dist.Normal(theta, 0.5).log_prob(Y))

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            with poutine.scale(scale=0.25):
                pyro.sample("y", dist.Normal(theta, 0.5), obs=Y)

    same(program, longhand)


def test_mask(float64: None) -> None:
    first_two = cast(torch.BoolTensor, torch.tensor([True, True, False]))

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=first_two):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=Y)

    def longhand() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=Y[:2])

    same(program, longhand)


def test_uncondition(float64: None) -> None:
    same(poutine.uncondition(hierarchy), unobserved_hierarchy)


@pytest.mark.skipif(equalize is None, reason="needs Pyro 1.9.2")
def test_equalize(float64: None) -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(a + b, 0.5), obs=torch.tensor(0.7))

    def kept() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(1.0, 2.0), obs=a)
        pyro.sample("y", dist.Normal(2.0 * a, 0.5), obs=torch.tensor(0.7))

    def replaced() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(2.0 * a, 0.5), obs=torch.tensor(0.7))

    same(equalize(model, ["a", "b"], keep_dist=True), kept)
    same(equalize(model, ["a", "b"]), replaced)


# Handlers around a run.


@contextmanager
def recorded() -> Iterator[Any]:
    """Fail if a handler outside of a run sees any of its sites."""
    with poutine.trace() as tracer:
        yield
    assert set(tracer.trace.nodes) <= {"_INPUT", "_RETURN"}


HANDLERS: dict[str, Callable[[], Any]] = {
    "trace": recorded,
    "condition": lambda: poutine.condition(data={"mu": torch.tensor(5.0)}),
    "do": lambda: poutine.do(data={"mu": torch.tensor(5.0)}),
    "scale": lambda: poutine.scale(scale=0.1),
    "mask": lambda: poutine.mask(mask=False),
    "plate": lambda: pyro.plate("around", 7),
    "uncondition": lambda: poutine.uncondition(),
    "block": lambda: poutine.block(),
}
if equalize is not None:
    HANDLERS["equalize"] = lambda: equalize(sites=["mu", "tau"])


@pytest.mark.parametrize("name", HANDLERS)
def test_run_inside_a_handler(name: str, float64: None) -> None:
    """The handler sees nothing of it and changes nothing, of queries neither."""
    limit = 6_000  # two blocks and more: queries evaluate them again
    results = []
    for handler in (HANDLERS[name], None):
        pyro.set_rng_seed(0)
        inference = MPImportance(hierarchy, num_samples=6, memory_limit=limit)
        if handler is None:
            posterior = inference.run()
            results.append((posterior.moments(), EmpiricalMarginal(posterior, "mu").mean))
        else:
            with handler():
                posterior = inference.run()
                results.append((posterior.moments(), EmpiricalMarginal(posterior, "mu").mean))
        assert _PYRO_STACK == []
        assert len(posterior._sums[0].blocks) > 1
    torch.testing.assert_close(results[0], results[1])


def test_stack_after_an_exception_inside_a_handler() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", a.sign().clamp(max=0.0).sqrt())

    pyro.set_rng_seed(0)
    with poutine.trace() as tracer:
        with pytest.raises(ValueError, match="site 'f': log_prob is nan"):
            MPImportance(model, num_samples=20).run()
        assert _PYRO_STACK == [tracer]
        pyro.sample("after", dist.Normal(0.0, 1.0))
    assert list(tracer.trace.nodes) == ["after"]
    assert _PYRO_STACK == []


def test_params_are_hidden_and_kept() -> None:
    """A guide's params are read, not traced."""

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("mu", dist.Normal(loc, 1.0))

    loc: Any = pyro.param("loc", torch.tensor(0.3))
    loc.grad = torch.tensor(2.0)
    with poutine.trace(param_only=True) as tracer:
        MPImportance(hierarchy, guide, num_samples=3).run()
    assert not tracer.trace.nodes
    assert loc.grad == 2.0


# Tools.


def test_predictive() -> None:
    """In parallel and one by one; means of what is predicted are those of the posterior."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(hierarchy, num_samples=100).run()
    number = 4000
    samples = posterior.sample(number)
    predicted = Predictive(poutine.uncondition(hierarchy), samples, parallel=True)()["y"]
    assert predicted.shape == (number, 3)
    theta = posterior.marginals("theta")
    sd = (theta.variance + 0.25).sqrt()
    z = (predicted.mean(0) - theta.mean) / (sd / number**0.5)
    assert bool((z.abs() < 5.5).all())  # given the particles; false alarm below 1e-6
    assert bool(((predicted.mean(0) - 1.0) / (sd / number**0.5)).abs().max() > 5.5)
    few = {name: value[:3] for name, value in samples.items()}
    assert Predictive(poutine.uncondition(hierarchy), few)()["y"].shape == (3, 3)


def test_weighed_predictive() -> None:
    """The same evidence from both, with its weights and ours; the same quantiles."""

    def guide() -> None:
        pyro.sample("a", dist.Normal(0.4, 0.9))

    def model(y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y, number = torch.tensor(1.2), 4000
    observed = poutine.condition(model, data={"y": y})
    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(y))
    pyro.set_rng_seed(0)
    posterior: Any = MPImportance(observed, guide, num_samples=number).run()
    weighed: Any = WeighedPredictive(model, guide=guide, num_samples=number, parallel=True)(
        model_guide=observed
    )
    quantiles = []
    for result in (posterior, weighed):
        error = (1 / float(result.get_ESS()) - 1 / number) ** 0.5
        assert abs(float(result.get_log_normalizer()) - exact) < 5 * error
    marginal = posterior.marginals("a")
    for values, log_weights in (
        (weighed.samples["a"], weighed.log_weights),
        (marginal.samples, marginal.log_weights),
    ):
        quantiles.append(weighed_quantile(values, [0.1, 0.5, 0.9], log_weights))
    torch.testing.assert_close(quantiles[1], marginal.quantile([0.1, 0.5, 0.9]), atol=0.01, rtol=0)
    torch.testing.assert_close(quantiles[0], quantiles[1], atol=0.15, rtol=0)


def mixture() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    infer: InferDict = {"enumerate": "parallel"}
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=infer)
        pyro.sample("y", dist.Normal(loc + 2.0 * z, 1.0), obs=Y)


def test_infer_discrete() -> None:
    """Given the continuous draws, discrete ones are those of ``infer_discrete``."""
    pyro.set_rng_seed(0)
    number = 3000
    draws = MPImportance(mixture, num_samples=50).run().sample(number)
    loc = draws["loc"].unsqueeze(-1)

    def given() -> None:
        with pyro.plate("draws", number, dim=-2), poutine.condition(data={"loc": loc}):
            mixture()

    discrete = infer_discrete(given, first_available_dim=-3)
    theirs: Any = poutine.trace(discrete).get_trace().nodes["z"]["value"]
    one = 0.3 * dist.Normal(loc + 2.0, 1.0).log_prob(Y).exp()
    none = 0.7 * dist.Normal(loc, 1.0).log_prob(Y).exp()
    probs = one / (one + none)  # (number, 3)
    error = (probs * (1 - probs)).sum(0).sqrt()
    for z in (theirs, draws["z"]):
        assert z.shape == (number, 3)
        assert bool((((z - probs).sum(0) / error).abs() < 5.5).all())  # false alarm below 1e-6
    assert bool((((draws["z"] - 0.3).sum(0) / error).abs() > 5.5).all())


def test_config_enumerate(float64: None) -> None:
    def unmarked() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(loc + 2.0 * z, 1.0), obs=Y)

    same(config_enumerate(unmarked, "parallel"), mixture)


# Settings.


def test_seed_alone_decides() -> None:
    results = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        posterior = MPImportance(hierarchy, num_samples=5).run()
        traces = EmpiricalMarginal(posterior, "theta").enumerate_support()
        results.append((posterior.evidence(), posterior.sample(4)["theta"], traces))
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    pyro.set_rng_seed(3)
    with torch.random.fork_rng():
        MPImportance(hierarchy, num_samples=5).run()
    assert torch.equal(MPImportance(hierarchy, num_samples=5).run().evidence(), results[0][0])


@pytest.mark.parametrize("how", ["enable_validation", "distributions", "settings"])
def test_validation(how: str) -> None:
    """Pyro's switch decides whether arguments are checked, and stays as it was."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        probs = torch.stack([1.0 + 0.0 * a, torch.ones_like(a)], -1) * torch.tensor([1.0, 1.0])
        value = torch.where(a > -10.0, 0.5, 1.0)  # not a whole number
        pyro.sample("y", dist.Categorical(probs), obs=torch.tensor(0))
        pyro.sample("x", dist.Bernoulli(0.3), obs=value)

    with pytest.raises(ValueError, match="site 'x'"):
        MPImportance(model, num_samples=3).run()
    try:
        if how == "settings":
            with pyro.settings.context(
                validate_distributions_pyro=False, validate_distributions_torch=False
            ):
                assert bool(MPImportance(model, num_samples=3).run().evidence().isfinite())
                assert not torch.distributions.Distribution._validate_args
        else:
            (dist if how == "distributions" else pyro).enable_validation(False)
            assert bool(MPImportance(model, num_samples=3).run().evidence().isfinite())
            assert not torch.distributions.Distribution._validate_args
    finally:
        pyro.enable_validation(True)


def test_default_dtype(float64: None) -> None:
    """All results have it, without a word of it in the program."""
    posterior: Any = MPImportance(mixture, num_samples=5).run()
    tensors = [
        posterior.evidence(),
        posterior.moments()["loc"],
        posterior.marginals("loc").log_weights,
        posterior.sample(2)["loc"],
        posterior.log_weights[0],
        posterior.exec_traces[0].nodes["loc"]["value"],
        posterior.get_normalized_weights(),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


def test_default_device() -> None:
    """All results are on it."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    previous = torch.get_default_device()
    torch.set_default_device(name)
    try:

        def model() -> None:
            loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(3))

        posterior: Any = MPImportance(model, num_samples=5).run()
        tensors = [
            posterior.evidence(),
            posterior.moments()["loc"],
            posterior.sample(2)["loc"],
            posterior.get_normalized_weights(),
            EmpiricalMarginal(posterior, "loc").mean,
        ]
        assert {tensor.device.type for tensor in tensors} == {name}
    finally:
        torch.set_default_device(previous)


def test_settings() -> None:
    pyro.set_rng_seed(0)
    posterior = MPImportance(hierarchy, num_samples=20).run()
    with pyro.settings.context(mpis_low_ess=15.0), pytest.warns(MPISWarning, match="below 15"):
        posterior.summary()
    with (
        pyro.settings.context(mpis_memory_fraction=1e-12),
        pytest.warns(MPISWarning, match="site 'theta' reads too many latents"),
    ):
        shared = MPImportance(hierarchy, num_samples=20).run()
    assert len(shared._sums[0].replicate.structure.indices) == 1
    assert pyro.settings.get("mpis_memory_fraction") == 0.5
    assert pyro.settings.get("mpis_high_k_hat") == 0.7
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected a positive threshold"):
            pyro.settings.set(mpis_high_k_hat=wrong)
    with pytest.raises(ValueError, match="mpis_memory_fraction: expected a number"):
        pyro.settings.set(mpis_memory_fraction=2.0)
