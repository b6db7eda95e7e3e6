# SPDX-License-Identifier: Apache-2.0
"""Marginals, moments, samples and the summary, as a user meets them."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchy import hierarchy, run_hierarchy
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def posterior() -> MPImportance:
    return run_hierarchy()


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
