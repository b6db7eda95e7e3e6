# SPDX-License-Identifier: Apache-2.0
"""Marginals, moments, samples and the summary, as a user meets them."""

import math
import pickle
import weakref

import pytest
import torch
from hierarchy import hierarchy, run_hierarchy

from pyro_mpis import MPImportance, MPISWarning, queries
from pyro_mpis.factor_graph import sampling
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.sampling import ForwardPass, sample_indices
from pyro_mpis.factor_graph.source_terms import joint_weights

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


def test_samples_in_large_plates_are_drawn_in_parts(
    posterior: MPImportance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indices of all draws at once take twice the draws; within 6 standard errors."""
    together: list[int] = []

    def counted(graph: FactorGraph, num_draws: int, forward: ForwardPass) -> object:
        together.append(num_draws)
        return sample_indices(graph, num_draws, forward)

    monkeypatch.setattr(sampling, "sample_indices", counted)
    of_draw = 8 * (1 + 1 + 2 + 6)  # mu, kind, v in two elements and x in six
    monkeypatch.setattr(sampling, "BYTES_OF_INDICES", 3000 * of_draw)
    draws = posterior.sample(20_000)
    assert together == [3000] * 6 + [2000]
    for name, mean in posterior.moments().items():
        values = draws[name].double()
        error = values.std(0) / math.sqrt(20_000)
        assert bool(((values.mean(0) - mean).abs() <= 6 * error + 1e-9).all()), name
    product = draws["mu"] * draws["kind"]
    error = product.std() / math.sqrt(20_000)
    assert float((product.mean() - posterior.moments(torch.mul, "mu", "kind")).abs()) <= 6 * error


def test_weights_of_blocks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once they took ten times the limit of a model with many states in plates."""
    living: list[int] = []
    found: list[weakref.ref[torch.Tensor]] = []

    def watched(graph: FactorGraph, tuples: tuple[str, ...]) -> object:
        living.append(sum(weight() is not None for weight in found))
        log_p, weights = joint_weights(graph, tuples)
        found.extend(weakref.ref(weight) for weight in weights.values())
        return log_p, weights

    monkeypatch.setattr(queries, "joint_weights", watched)
    MPImportance(hierarchy, num_samples=8, memory_limit=30_000).run().moments()
    assert len(living) >= 8
    assert len(found) % len(living) == 0
    assert max(living) <= 2 * len(found) // len(living)


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


def test_results_pickle_without_their_programs(posterior: MPImportance) -> None:
    marginal = posterior.marginals("x")
    again = pickle.loads(pickle.dumps(marginal))
    torch.testing.assert_close(again.mean, marginal.mean)


def test_a_pickled_posterior_draws_as_before(posterior: MPImportance) -> None:
    """Without the messages that its run has kept, which hold the factors once more."""
    assert posterior._sums[0].forward is not None
    again = pickle.loads(pickle.dumps(posterior))
    assert again._sums[0].forward is None
    draws = []
    for one in (posterior, again):
        torch.manual_seed(0)
        draws.append(one.sample(7))
    for name, draw in draws[0].items():
        assert torch.equal(draw, draws[1][name])
