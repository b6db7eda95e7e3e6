# SPDX-License-Identifier: Apache-2.0
"""Weighted particles as a distribution: quantiles, tails, joint marginals."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from graphs import noise
from hierarchy import run_hierarchy
from pyro.ops.stats import fit_generalized_pareto

from pyro_mpis import Marginal, MPImportance

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def posterior() -> MPImportance:
    return run_hierarchy()


def test_joint_marginals_have_the_marginals(posterior: MPImportance) -> None:
    """Summing a joint marginal over one site leaves the other's; three levels deep."""
    joint = posterior.marginals("mu", "v", "x")
    assert joint.batch_shape == (2, 3)
    assert joint.samples.shape == (2, 3, 512, 1 + 4 + 1)
    weights = joint.weights.reshape(2, 3, 8, 8, 8)
    for dims, site in (((3, 4), "mu"), ((2, 4), "v"), ((2, 3), "x")):
        expected = posterior.marginals(site).weights.expand(2, 3, 8)
        torch.testing.assert_close(weights.sum(dims), expected)
    values = joint.unpack(joint.samples)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "mu": (2, 3, 512),
        "v": (2, 3, 512, 4),
        "x": (2, 3, 512),
    }
    first = values["mu"].reshape(2, 3, 8, 64)[..., 0]
    torch.testing.assert_close(first, posterior.marginals("mu").samples.expand(2, 3, 8))


def test_quantiles_longhand() -> None:
    samples = torch.tensor([[3.0, 1.0, 2.0, 5.0], [0.0, 1.0, 1.0, -1.0]])
    weights = torch.tensor([[0.2, 0.5, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    marginal = Marginal(samples, weights.log(), {"x": torch.Size()})
    torch.testing.assert_close(marginal.quantile(0.5), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(
        marginal.quantile([0.0, 0.6, 0.7, 0.95, 1.0]),
        torch.tensor([[1.0, -1.0], [2.0, 1.0], [2.0, 1.0], [5.0, 1.0], [5.0, 1.0]]),
    )
    torch.testing.assert_close(marginal.mean, torch.tensor([2.0, 0.25]))
    torch.testing.assert_close(marginal.ess, torch.tensor([1 / 0.34, 4.0]))
    assert bool(marginal.pareto_k.isnan().all())
    assert marginal.quantile(torch.tensor([[0.1, 0.2]])).shape == (1, 2, 2)


def test_it_is_an_empirical_distribution(posterior: MPImportance) -> None:
    marginal = posterior.marginals("x")
    assert isinstance(marginal, dist.Empirical)
    assert marginal.sample((7,)).shape == (7, 2, 3)  # type: ignore[no-untyped-call]
    assert bool(marginal.log_prob(marginal.sample()).isfinite().all())  # type: ignore[no-untyped-call]
    assert posterior.marginals("v").quantile(0.5).shape == (2, 1, 4)
    assert posterior.marginals("kind").mean.is_floating_point()


def test_pareto_k_is_that_of_the_tail() -> None:
    """As Pyro's fit has it; heavy tails are heavier; even weights have none."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    log_weights = torch.randn(2, 1000, generator=generator) * torch.tensor([[0.5], [4.0]])
    log_weights = log_weights.log_softmax(-1)
    marginal = Marginal(torch.zeros(2, 1000), log_weights, {"x": torch.Size()})
    light, heavy = marginal.pareto_k.tolist()
    assert light < 0.5 < 0.7 < heavy
    sorted_weights = log_weights[0].exp().sort().values / log_weights[0].exp().max()
    tail = math.ceil(3 * math.sqrt(1000))
    expected, _ = fit_generalized_pareto(sorted_weights[-tail:] - sorted_weights[-tail - 1])
    assert light == pytest.approx(expected)
    even = Marginal(torch.zeros(100), torch.zeros(100) - math.log(100), {"x": torch.Size()})
    assert float(even.pareto_k) == -math.inf
    spike = torch.full((100,), -1000.0)
    spike[0] = 0.0
    assert float(Marginal(torch.zeros(100), spike, {"x": torch.Size()}).pareto_k) == math.inf


def test_results_pickle_without_their_programs(posterior: MPImportance) -> None:
    marginal = posterior.marginals("x")
    again = pickle.loads(pickle.dumps(marginal))
    torch.testing.assert_close(again.mean, marginal.mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num", [*range(1, 41), 57, 100, 1000, 10_000])
def test_quantiles_at_the_shares_of_even_weights(dtype: torch.dtype, num: int) -> None:
    """The j-th of K particles is the quantile at j / K, however the weights are rounded."""
    samples = torch.arange(num, dtype=dtype)
    log_weights = torch.full((num,), 1.0 / num, dtype=dtype).log()
    marginal = Marginal(samples, log_weights, {"x": torch.Size()})
    shares = torch.arange(1, num + 1) / num
    torch.testing.assert_close(marginal.quantile(shares), samples)
    just_above = (shares[:-1] + 0.1 / num).tolist()
    torch.testing.assert_close(marginal.quantile(just_above), samples[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_at_the_shares_of_any_weights(dtype: torch.dtype) -> None:
    """Weights are multiples of one number, so that their sums are known exactly."""
    for seed in range(100):
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        num = int(torch.randint(2, 40, (), generator=generator))
        counts = torch.randint(1, 9, (num,), generator=generator)
        log_weights = (counts.double() / counts.sum()).log().to(dtype)
        marginal = Marginal(torch.arange(num, dtype=dtype), log_weights, {"x": torch.Size()})
        shares = counts.cumsum(0).double() / counts.sum()
        assert marginal.quantile(shares).tolist() == list(range(num))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [0.0, 1e-12])
def test_extreme_quantiles_have_weight(dtype: torch.dtype, smallest: float) -> None:
    """Particles without weight are no part of the posterior, and those with little are."""
    for seed in range(20):
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        weights = torch.rand(50, generator=generator, dtype=torch.float64)
        weights[:5], weights[-5:] = 0.0, 0.0
        weights[5], weights[-6] = smallest, smallest
        ends = weights.nonzero().flatten()[[0, -1]].tolist()
        order = torch.randperm(50, generator=generator)
        log_weights = (weights / weights.sum()).log().to(dtype)
        samples = torch.arange(50.0, dtype=dtype)
        marginal = Marginal(samples[order], log_weights[order], {"x": torch.Size()})
        assert marginal.quantile([0.0, 1.0]).tolist() == ends


@pytest.mark.parametrize(("scale", "cutoff"), [(8.0, None), (30.0, 1e-15)])
def test_pareto_k_of_a_tail_of_small_weights(scale: float, cutoff: float | None) -> None:
    """What is 1e-7 of the heaviest weight is in the tail; what is below 1e-15 is left out."""
    log_weights = noise(1000, scale=scale)
    marginal = Marginal(torch.zeros(1000), log_weights, {"x": torch.Size()})
    weights = (log_weights - log_weights.max()).exp().sort().values
    begin = cutoff or float(weights[-math.ceil(3 * math.sqrt(1000)) - 1])
    assert cutoff or 1e-12 < begin < 1e-5
    expected, _ = fit_generalized_pareto(weights[weights > begin] - begin)
    assert float(marginal.pareto_k) == pytest.approx(float(expected), rel=1e-6)


def test_values_of_a_summed_site_stand_once() -> None:
    """Over replicates too, with the weights of all of them."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu + z, 1.0), obs=torch.tensor(1.3))

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=4, num_replicates=5).run()
    assert posterior.marginals("z").samples.tolist() == [0, 1, 2]
    assert posterior.marginals("mu").samples.shape == (20,)
    expected = [float(posterior.moments(lambda z, i=i: (z == i).double(), "z")) for i in range(3)]
    assert posterior.marginals("z").weights.tolist() == pytest.approx(expected)
