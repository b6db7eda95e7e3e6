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
from graphs import graph_of, noise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph.evidence import log_evidence, reduced, sum_product
from pyro_mpis.factor_graph.graph import RaggedPlate
from pyro_mpis.factor_graph.packed import dims_of, packed
from pyro_mpis.factor_graph.sampling import sample_indices
from pyro_mpis.factor_graph.source_terms import joint_weights

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


def factors(seed: int) -> list[Tensor]:
    """Some packed tensors over a..d, of any scale."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
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


@pytest.mark.parametrize("with_index", [True, False])
def test_products_over_plates_are_in_double_precision(with_index: bool) -> None:
    """A sum of 30,000 numbers in single precision is off by some thousandths of a nat."""
    table = noise(3, 30_000, scale=30.0).float() - 20.0
    index_plates = {"k": "", "j": "p"} if with_index else {"k": ""}
    tables = [("k", torch.zeros(3)), ("kp", table)]
    if with_index:  # that is summed in its plate first
        tables.append(("jp", torch.zeros(2, 30_000)))
    graph = graph_of(tables, index_plates)
    exact = (table.double().sum(1) + with_index * 30_000 * math.log(2.0)).logsumexp(0)
    in_single = (table.sum(1) + with_index * 30_000 * math.log(2.0)).logsumexp(0)
    for before in (graph, reduced(graph)):
        found = log_evidence(before).double()
        # of an index in the plate, log 2 is rounded to single precision before the product
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-2 if with_index else 1e-7)
    assert with_index or abs(float(in_single.double() - exact)) > 1e-4


def test_products_over_ragged_plates_are_in_double_precision() -> None:
    table = noise(3, 30_000, scale=30.0).float() - 20.0
    elements = torch.arange(30_000) % 2
    plate = RaggedPlate("p", {"g": elements})
    graph = graph_of([("kp", table), ("kg", torch.zeros(3, 2))], {"k": "g"}, {"p": plate})
    sums = torch.stack([table.double()[:, elements == g].sum(1) for g in (0, 1)], 1)
    torch.testing.assert_close(log_evidence(graph), sums.logsumexp(0).sum(), rtol=0, atol=1e-7)


def peaked(name: str) -> list[tuple[str, Tensor]]:
    """Terms in single precision of which one is so large that others would be lost beside it."""
    best = torch.tensor([-4e7, -1e8, -2e7, -9e7])
    small = [("m", noise(3, seed=1)), ("tp", noise(4, 2, seed=2)), ("mtp", noise(3, 4, 2, seed=3))]
    large = {
        "of one index": ("tp", best.unsqueeze(1).expand(4, 2)),
        "at one plate element": ("tp", torch.stack([best, torch.zeros(4)], 1)),
        "a number": ("", torch.tensor(-3e7)),
        "the same at all": ("mtp", torch.full((3, 4, 2), -3e7)),
        "of either sign": ("tp", -best.unsqueeze(1).expand(4, 2)),
        "none": ("tp", torch.zeros(4, 2)),
    }[name]
    opposite = [("tp", best.unsqueeze(1).expand(4, 2))] if name == "of either sign" else []
    return [(dims, table.float()) for dims, table in (*small, large, *opposite)]


@pytest.mark.parametrize(
    "name",
    [
        "of one index",
        "at one plate element",
        "a number",
        "the same at all",
        "of either sign",
        "none",
    ],
)
def test_nothing_is_lost_beside_a_large_term(name: str) -> None:
    """Evidence, weights and samples are those of the same numbers in double precision."""
    index_plates = {"m": "", "t": "p"}
    single = graph_of(peaked(name), index_plates)
    double = graph_of([(dims, x.double()) for dims, x in peaked(name)], index_plates)
    expected_p, expected = joint_weights(double, ["m", "t", "mt"])
    log_p, weights = joint_weights(single, ["m", "t", "mt"])
    torch.testing.assert_close(log_p.double(), expected_p, rtol=1e-6, atol=1e-4)
    for symbols, weight in weights.items():
        torch.testing.assert_close(weight, expected[symbols], rtol=0, atol=1e-5)
    torch.manual_seed(0)
    draws = sample_indices(single, 20_000)[1]
    check_frequencies(draws["m"].bincount(minlength=3), expected["m"])


def test_particles_without_weight_do_not_make_it_double() -> None:
    """Only the largest entries at each plate element count; the flagship models have such."""
    table = noise(3, 4, 5).float()
    table[1:, :, 2] = -1e9
    table[:, 0] = -math.inf
    graph = graph_of(
        [("abc", table), ("b", torch.tensor([0.0, 0.0, -1e9, 1.0]).float())],
        index_plates={"a": "", "b": "", "c": ""},
    )
    assert log_evidence(graph).dtype == torch.float32
