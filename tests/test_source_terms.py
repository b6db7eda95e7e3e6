# SPDX-License-Identifier: Apache-2.0
"""Weights as derivatives of the evidence."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from graphs import graph_of, noise
from hierarchy import run_hierarchy
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph import logspace
from pyro_mpis.factor_graph.graph import RaggedPlate
from pyro_mpis.factor_graph.source_terms import joint_weights

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def posterior() -> MPImportance:
    return run_hierarchy()


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


def test_weights_of_a_graph_longhand() -> None:
    """Of one index, of two, of none, and along a plate; against the sum over all combinations."""
    ab, bp, cp = noise(3, 4, seed=1), noise(4, 2, seed=2), noise(5, 2, seed=3)
    cb = noise(5, 4, 2, seed=4)
    tables = [("ab", ab), ("bp", bp), ("cp", cp), ("cbp", cb)]
    graph = graph_of(tables, {"a": "", "b": "", "c": "p"})
    log_p, weights = joint_weights(graph, ["a", "b", "ba", "c", "bc", ""])
    cells = (cb + cp.unsqueeze(1)).movedim(-1, 0)  # (p, c, b)
    messages = cells.logsumexp(1) + bp.mT  # (p, b)
    joint = ab + messages.sum(0)
    torch.testing.assert_close(log_p, joint.flatten().logsumexp(0))
    share = (joint - log_p).exp()
    torch.testing.assert_close(weights["a"], share.sum(1))
    torch.testing.assert_close(weights["b"], share.sum(0))
    torch.testing.assert_close(weights["ba"], share.mT.contiguous())
    in_cell = cells.softmax(1) * share.sum(0)  # (p, c, b)
    torch.testing.assert_close(weights["c"], in_cell.sum(2).mT.contiguous())
    torch.testing.assert_close(weights["bc"], in_cell.permute(2, 1, 0).contiguous())
    assert float(weights[""]) == pytest.approx(1.0)


@pytest.mark.parametrize("kernel", ["_LogSumExp", "_LogMatmul"])
@pytest.mark.parametrize("factor", [3.0, 1.01])
def test_a_kernel_with_wrong_derivatives_is_refused(
    monkeypatch: pytest.MonkeyPatch, kernel: str, factor: float
) -> None:
    """Weights are not divided by their sum: that it is one is what tells a wrong kernel."""
    function = getattr(logspace, kernel)
    right = function.backward

    def wrong(ctx: Any, *grads: Tensor) -> Any:
        result = right(ctx, *grads)
        many = result if isinstance(result, tuple) else (result,)
        return tuple(None if grad is None else factor * grad for grad in many)

    tables = [("ab", noise(3, 4)), ("bc", noise(4, 5)), ("ca", noise(5, 3))]
    graph = graph_of(tables, dict.fromkeys("abc", ""))
    joint_weights(graph, "abc")
    monkeypatch.setattr(function, "backward", staticmethod(wrong))
    with pytest.raises(AssertionError, match=r"weights of 'site [abc]' sum to [\d.]+, not"):
        joint_weights(graph, "abc")


def test_weights_are_zero_where_the_evidence_is() -> None:
    none = torch.full((3, 4), -math.inf).double()
    graph = graph_of([("ab", none), ("b", noise(4))], dict.fromkeys("ab", ""))
    log_p, weights = joint_weights(graph, ["a", "b"])
    assert log_p == -math.inf
    torch.testing.assert_close(weights["a"], torch.zeros(3).double())
    torch.testing.assert_close(weights["b"], torch.zeros(4).double())


def test_weights_of_a_posterior_sum_to_one(posterior: MPImportance) -> None:
    """As derivatives, before anything divides them."""
    graph = posterior._sums[0].whole
    singles = list(graph.index_plates)
    for symbols, weight in joint_weights(graph, [*singles, "".join(singles)])[1].items():
        total = weight.sum(tuple(range(len(symbols))))
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("made_in_it", [False, True])
@pytest.mark.parametrize("asked_in_it", [False, True])
def test_inference_mode(made_in_it: bool, asked_in_it: bool) -> None:
    """Weights are derivatives where autograd is off, too, and of tensors made there."""
    pupils = RaggedPlate("p", {"s": torch.tensor([0, 1, 1])})
    tables = [("ks", noise(4, 2)), ("kp", noise(4, 3)), ("jkp", noise(2, 4, 3))]
    plates = {"k": "s", "j": "p"}
    expected = joint_weights(graph_of(tables, plates, {"p": pupils}), ["k", "j", "kj"])[1]
    with torch.inference_mode(made_in_it):
        elements = {"s": torch.tensor([0, 1, 1])}
        copies = [(dims, table.clone()) for dims, table in tables]
        graph = graph_of(copies, plates, {"p": RaggedPlate("p", elements)})
    with torch.inference_mode(asked_in_it):
        weights = joint_weights(graph, ["k", "j", "kj"])[1]
    for symbols, weight in weights.items():
        torch.testing.assert_close(weight, expected[symbols])
        assert not weight.is_inference()


@pytest.mark.parametrize("run_in_it", [False, True])
def test_queries_in_inference_mode(posterior: MPImportance, run_in_it: bool) -> None:
    with torch.inference_mode(run_in_it):
        again = run_hierarchy()
    with torch.inference_mode():
        inside = again.moments()
        marginal = again.marginals("mu", "x")
        assert again.sample(3)["x"].shape == (3, 2, 3)
    for name, mean in posterior.moments().items():
        torch.testing.assert_close(inside[name], mean)
        torch.testing.assert_close(again.moments()[name], mean)
    torch.testing.assert_close(marginal.weights, posterior.marginals("mu", "x").weights)


def test_joint_weights_that_make_plates_cross() -> None:
    """Of a cell and its column, where rows meet the cells: each alone has weights."""

    def model() -> None:
        rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
        with rows:
            r = pyro.sample("r", dist.Normal(0.0, 1.0))
        with columns:
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("of c", dist.Normal(c, 1.0), obs=torch.zeros(3))
        with rows, columns:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(r + x, 1.0), obs=torch.zeros(2, 3))

    posterior = MPImportance(model, num_samples=3).run()
    assert set(posterior.moments()) == {"r", "c", "x"}
    assert posterior.moments(torch.mul, "r", "x").shape == (2, 3)
    message = "joint weights of 'c', 'x' for each element of plates 'column', 'row'.*sample"
    with pytest.raises(NotImplementedError, match=message):
        posterior.moments(torch.mul, "c", "x")
