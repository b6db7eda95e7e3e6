# SPDX-License-Identifier: Apache-2.0
"""Marginals, moments, samples and the summary, as a user meets them."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_mpis import Marginal, MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, -0.2]], dtype=torch.float64)


def hierarchy() -> None:
    """A global, a discrete one, a vector in the outer plate, a scalar in the inner one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("outer", 2, dim=-2):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(4)).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(v.sum(-1) + kind, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


@pytest.fixture
def posterior() -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(hierarchy, num_samples=8).run()


def test_shapes(posterior: MPImportance) -> None:
    shapes = {name: m.samples.shape for name, m in posterior.marginals().items()}
    assert shapes == {"mu": (8,), "kind": (8,), "v": (2, 1, 8, 4), "x": (2, 3, 8)}
    assert {n: m.log_weights.shape for n, m in posterior.marginals().items()} == {
        "mu": (8,),
        "kind": (8,),
        "v": (2, 1, 8),
        "x": (2, 3, 8),
    }
    ordinary = {"mu": (), "kind": (), "v": (2, 1, 4), "x": (2, 3)}
    assert {name: tuple(mean.shape) for name, mean in posterior.moments().items()} == ordinary
    draws = posterior.sample(5)
    assert {name: tuple(d.shape[1:]) for name, d in draws.items()} == ordinary
    assert draws["kind"].dtype == torch.long
    assert posterior.evidence().shape == ()
    torch.testing.assert_close(posterior.evidence(log_scale=False).log(), posterior.evidence())


def test_weights_of_every_site_and_element_sum_to_one(posterior: MPImportance) -> None:
    for marginal in posterior.marginals().values():
        total = marginal.weights.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


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
    generator = torch.Generator().manual_seed(0)
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


def test_samples_have_the_moments(posterior: MPImportance) -> None:
    """Within 6 standard errors, at a fixed seed."""
    draws = posterior.sample(20_000)
    for name, mean in posterior.moments().items():
        values = draws[name].double()
        error = values.std(0) / math.sqrt(20_000)
        assert bool(((values.mean(0) - mean).abs() <= 6 * error + 1e-9).all()), name


def test_what_a_notebook_shows(posterior: MPImportance) -> None:
    unrun = MPImportance(hierarchy, num_samples=3, num_replicates=2)
    assert repr(unrun) == "<MPImportance: 3 particles a site, 2 replicates, not run>"
    log_evidence = f"{float(posterior.evidence()):.2f}"
    assert repr(posterior) == f"<MPImportance: 8 particles a site, log evidence {log_evidence}>"
    shown = "Marginal('v': 8 particles, batch shape (2, 1), event shape (4,))"
    assert repr(posterior.marginals("v")) == shown
    assert repr(posterior.marginals("mu", "kind")).startswith("Marginal('mu', 'kind': 64 particles")
    with pytest.warns(MPISWarning):
        summary = posterior.summary()
    assert repr(summary) == str(summary)


def test_weights_of_an_ill_scaled_chain_sum_to_one() -> None:
    """Where Pyro's log einsum gives a right evidence and wrong weights (or -inf), in float32."""
    torch.set_default_dtype(torch.float32)
    for scale in (1.0, 0.1, 0.03, 0.01):

        def model(s: float = scale) -> None:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("y1", dist.Normal(a, s), obs=torch.tensor(0.5))
            b = pyro.sample("b", dist.Normal(a, s))
            pyro.sample("y2", dist.Normal(b, s), obs=torch.tensor(-0.5))

        def guide() -> None:
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))

        for seed in range(5):
            pyro.set_rng_seed(seed)
            posterior = MPImportance(model, guide, num_samples=30).run()
            exact = exact_weights(posterior, scale)
            assert bool(posterior.evidence().isfinite())
            found = posterior.marginals("a").weights.double()
            torch.testing.assert_close(found, exact, atol=2e-3, rtol=0.0)
            torch.testing.assert_close(found.sum(), torch.tensor(1.0).double())


def exact_weights(posterior: MPImportance, s: float) -> Tensor:
    """Weights of site a by one sum over all pairs, in double precision."""
    a = posterior.marginals("a").samples.double().unsqueeze(-1)
    b = posterior.marginals("b").samples.double()
    standard = dist.Normal(torch.zeros(()).double(), 1.0)
    log_r = (
        dist.Normal(a, s).log_prob(torch.tensor(0.5).double())
        + dist.Normal(a, s).log_prob(b)
        - standard.log_prob(b)
        + dist.Normal(b, s).log_prob(torch.tensor(-0.5).double())
    )
    return log_r.flatten().softmax(0).reshape(30, 30).sum(-1)  # type: ignore[no-any-return]


def test_results_pickle_without_their_programs(posterior: MPImportance) -> None:
    marginal = posterior.marginals("x")
    again = pickle.loads(pickle.dumps(marginal))
    torch.testing.assert_close(again.mean, marginal.mean)
