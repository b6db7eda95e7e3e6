# SPDX-License-Identifier: Apache-2.0
"""The contraction: its order, the sizes of its tensors, and its invariances."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_frequencies
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph import order
from pyro_mpis.factor_graph.evidence import LogSpaceRing, log_evidence, sum_product
from pyro_mpis.factor_graph.order import absorb
from pyro_mpis.factor_graph.packed import dims_of, packed

pytestmark = pytest.mark.usefixtures("float64")

K = 8


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            shape = [size for size, step in zip(result.shape, result.stride(), strict=True) if step]
            self.numel = max(self.numel, math.prod(shape))
        return result


def delays() -> None:
    """Two levels of effects, and two vectors: the shape of a model of the paper."""
    phi = pyro.sample("phi", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    psi = pyro.sample("psi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("year", 3, dim=-3):
        beta = pyro.sample("beta", dist.Normal(mu, spread))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("borough", 3, dim=-2):
            alpha = pyro.sample("alpha", dist.Normal(beta, sigma))
            with pyro.plate("journey", 5, dim=-1):
                mean = alpha + phi.sum(-1) + psi.sum(-1)
                pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.ones(3, 3, 5))


def test_largest_tensor_of_the_contraction() -> None:
    """No larger than the message over four indices that has to be made, in each of nine cells."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(delays, num_samples=K).run()
    graph = posterior._sums[0].whole
    needed = 9 * K**4
    assert max(factor.tensor.numel() for factor in graph.factors) <= needed
    with torch.no_grad(), Largest() as largest:
        log_evidence(graph)
    assert largest.numel <= needed
    with Largest() as largest:
        posterior.moments()
    assert largest.numel <= needed
    with Largest() as largest:
        posterior.sample(500)
    assert largest.numel <= max(needed, 500 * 9 * K)


def test_chain_of_many_sites_has_small_tensors() -> None:
    def scaled_chain() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        x = torch.tensor(0.0)
        for t in range(100):
            x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, scale))
            pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=torch.tensor(0.1))

    pyro.set_rng_seed(0)
    graph = MPImportance(scaled_chain, num_samples=K).run()._sums[0].whole
    with torch.no_grad(), Largest() as largest:
        log_evidence(graph)
    assert largest.numel <= 100 * K**3  # all steps of one wave, stacked


def chain(num_steps: int) -> None:
    x = torch.tensor(0.0)
    for t in range(num_steps):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, 0.5))
        pyro.sample(f"y{t}", dist.Normal(x, 0.5), obs=torch.tensor(math.sin(t)))


def chain_guide(num_steps: int) -> None:
    for t in range(num_steps):
        pyro.sample(f"x{t}", dist.Normal(math.sin(t), 1.0))


def chain_with_globals(num_steps: int) -> None:
    """Transitions and observations read one global each: a state has three terms."""
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    x = torch.tensor(0.0)
    for t in range(num_steps):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x + 0.1 * drift, 0.5))
        pyro.sample(f"y{t}", dist.Normal(x + bias, 0.5), obs=torch.tensor(math.sin(t)))


def test_a_chain_with_globals_takes_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the logarithm of its length; evidence, weights and samples are those without."""
    launches = []
    eliminate_all = LogSpaceRing._eliminate_all

    def counted(self: LogSpaceRing, steps: Any, terms: Any) -> Any:
        launches.append(len(steps))
        return eliminate_all(self, steps, terms)

    monkeypatch.setattr(LogSpaceRing, "_eliminate_all", counted)
    numbers = []
    for num_steps in (32, 256):
        pyro.set_rng_seed(0)
        rounds = MPImportance(chain_with_globals, chain_guide, num_samples=4).run(num_steps)
        launches.clear()
        log_evidence(rounds._sums[0].whole)
        numbers.append(len(launches))
        with monkeypatch.context() as patched:
            patched.setattr(order, "ROUND_COMBINATIONS", 0)
            pyro.set_rng_seed(0)
            along = MPImportance(chain_with_globals, chain_guide, num_samples=4).run(num_steps)
            launches.clear()
            log_evidence(along._sums[0].whole)
            assert len(launches) >= num_steps
            expected = along.marginals()
        torch.testing.assert_close(rounds.evidence(), along.evidence(), rtol=1e-12, atol=1e-9)
        for name, marginal in rounds.marginals().items():
            weights = expected[name].log_weights.exp()
            torch.testing.assert_close(marginal.log_weights.exp(), weights, rtol=1e-9, atol=1e-12)
        draws = rounds.sample(2000)
        for name in ("drift", "x7", f"x{num_steps - 1}"):
            counts = (draws[name].unsqueeze(-1) == expected[name].samples).sum(0)
            check_frequencies(counts, expected[name].log_weights.exp())
    # eight times the steps are three more rounds, of up to six kinds of steps
    assert numbers[1] - numbers[0] <= 18


def test_a_chain_takes_rounds_to_the_logarithm_of_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every launch of a kernel sums all dims of a round; the sums are those along the chain."""
    launches = []
    eliminate_all = LogSpaceRing._eliminate_all

    def counted(self: LogSpaceRing, steps: Any, terms: Any) -> Any:
        launches.append(len(steps))
        return eliminate_all(self, steps, terms)

    monkeypatch.setattr(LogSpaceRing, "_eliminate_all", counted)
    numbers = []
    for num_steps in (32, 256):
        pyro.set_rng_seed(0)
        posterior = MPImportance(chain, chain_guide, num_samples=K).run(num_steps)
        launches.clear()
        found = log_evidence(posterior._sums[0].whole)
        numbers.append(len(launches))

        x = [posterior.marginals(f"x{t}").samples for t in range(num_steps)]
        message = torch.zeros(1, dtype=torch.float64)
        previous = torch.zeros(1, dtype=torch.float64)
        for t in range(num_steps):
            step = dist.Normal(0.9 * previous, 0.5).log_prob(x[t].unsqueeze(-1))
            message = (message + step).logsumexp(-1)
            message = message + dist.Normal(x[t], 0.5).log_prob(torch.tensor(math.sin(t)))
            message = message - dist.Normal(math.sin(t), 1.0).log_prob(x[t]) - math.log(K)
            previous = x[t]
        torch.testing.assert_close(found, message.logsumexp(0), rtol=1e-12, atol=1e-9)
    # eight times the steps are three more rounds, of two kinds of steps at most (inside, ends)
    assert numbers[1] - numbers[0] <= 6
    assert numbers[1] < 40


def factors(seed: int) -> list[Tensor]:
    """Some packed tensors over a..d, of any scale."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for dims in ("ab", "bc", "cd", "a", "d", "bd", "", "b"):
        shape = [2 + "abcd".index(s) for s in dims]
        scale = 10.0 ** float(torch.rand((), generator=generator) * 3)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        result.append(packed(x, dims))
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dims", ["", "a", "bc", "abcd"])
def test_sum_of_products_longhand(seed: int, dims: str) -> None:
    """Any number of terms, any dims, against one sum over everything."""
    for number in (1, 2, 3, 8):
        terms = factors(seed)[:number]
        inside = "".join(sorted(set("".join(dims_of(term) for term in terms))))
        summed = "".join(s for s in dims if s in inside)
        found = sum_product(terms, summed)
        kept = dims_of(found)
        assert set(kept) == set(inside) - set(summed)
        sizes = {s: range(2 + "abcd".index(s)) for s in inside}
        for place in itertools.product(*(sizes[s] for s in kept)):
            at = dict(zip(kept, place, strict=True))
            logs = []
            for rest in itertools.product(*(sizes[s] for s in summed)):
                full = at | dict(zip(summed, rest, strict=True))
                logs.append(sum(float(t[tuple(full[s] for s in dims_of(t))]) for t in terms))
            top = max(logs)
            expected = top + math.log(math.fsum(math.exp(x - top) for x in logs))
            assert float(found[place]) == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_each_factor_is_absorbed_by_the_smallest_that_holds_it() -> None:
    terms = factors(0)
    groups = {frozenset(step.operands): step.operands[-1] for step in absorb(terms)}
    by_dims = {
        "".join(sorted(dims_of(terms[last]))): sorted(dims_of(terms[n]) for n in members)
        for members, last in groups.items()
    }
    assert set(by_dims) == {"ab", "bc", "cd", "bd"}
    assert sorted(d for members in by_dims.values() for d in members) == sorted(
        dims_of(term) for term in terms
    )


def test_adding_to_a_factor_adds_to_the_evidence() -> None:
    """And the order of the factors does not matter."""
    from dataclasses import replace

    pyro.set_rng_seed(0)
    graph = MPImportance(delays, num_samples=3).run()._sums[0].whole
    base = log_evidence(graph)
    torch.testing.assert_close(log_evidence(graph, graph.factors[::-1]), base)
    for number, factor in enumerate(graph.factors):
        shifted = replace(factor, tensor=factor.tensor + 1.5)
        changed = [*graph.factors[:number], shifted, *graph.factors[number + 1 :]]
        cells = math.prod(graph.sizes[plate] for plate in factor.plates)
        torch.testing.assert_close(log_evidence(graph, changed), base + 1.5 * cells)
