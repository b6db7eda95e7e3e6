# SPDX-License-Identifier: Apache-2.0
"""Functions of single values at many values at once, against plain loops over all of them."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from compare import compare
from pyro.distributions import stable as pyro_stable
from pyro.infer.reparam import stable as reparam_stable
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis.programs.mapped import MAX_LOOP, log_prob_of, run_mapped
from pyro_mpis.programs.tensors import Mapped, unwrapped

pytestmark = pytest.mark.usefixtures("float64")

Function = Callable[[Mapping[str, Tensor]], Tensor]


def mapped(function: Function, levels: list[dict[str, Tensor]], *, patched: bool = False) -> Mapped:
    """Return the result of a function at all combinations of values."""
    results: list[Mapped] = []
    run_mapped(lambda values: results.append(unwrapped(function(values))), levels, patched=patched)
    (result,) = results
    return result


def looped(function: Function, levels: list[dict[str, Tensor]], read: tuple[int, ...]) -> Tensor:
    """Return the same by a plain loop over the levels that are read; first values of all others."""
    sizes = [len(next(iter(level.values()))) for level in levels]
    rows = []
    for numbers in itertools.product(*(range(sizes[level]) for level in read)):
        at = dict(zip(read, numbers, strict=True))
        values = {
            name: value[at.get(n, 0)]
            for n, level in enumerate(levels)
            for name, value in level.items()
        }
        rows.append(function(values))
    return torch.stack(rows).reshape([sizes[level] for level in read] + list(rows[0].shape))


def check(
    function: Function,
    levels: list[dict[str, Tensor]],
    read: tuple[int, ...],
    *,
    patched: bool = False,
) -> None:
    """The result has a dim for each level that was read, in order, and the right numbers."""
    levels = [{name: value.double() for name, value in level.items()} for level in levels]
    result = mapped(function, levels, patched=patched)
    assert result.levels == read
    expected = looped(function, levels, read)
    assert result.shape == expected.shape[len(read) :]
    torch.testing.assert_close(result.tensor, expected)


LEVELS = [
    {"a": torch.linspace(0.5, 1.5, 2), "m": torch.arange(8.0).reshape(2, 2, 2)},
    {"b": torch.linspace(-1.0, 1.0, 9).reshape(3, 3)},
    {"c": torch.linspace(2.0, 3.0, 4)},
]


@pytest.mark.parametrize(
    ("function", "read"),
    [
        (lambda v: v["a"] * v["b"].sum() - v["c"], (0, 1, 2)),
        (lambda v: v["c"] - v["b"][0], (1, 2)),
        (lambda v: v["c"] + v["a"], (0, 2)),
        (lambda v: (v["c"] * v["b"]).unsqueeze(-1) * v["m"].transpose(0, 1)[0], (0, 1, 2)),
        (lambda v: v["m"] @ v["m"].flip(0), (0,)),
        (lambda v: torch.outer(v["b"], v["m"][:, 0]).movedim(0, -1), (0, 1)),
        (lambda v: torch.stack([v["c"], v["b"][1], v["c"]]), (1, 2)),
        (lambda v: torch.ones(2, 3), ()),
        (lambda v: v["b"].detach() * 0.0 + 1.0, (1,)),
    ],
)
def test_levels_that_were_read_and_no_others(function: Function, read: tuple[int, ...]) -> None:
    check(function, LEVELS, read)


def test_level_of_one_value_and_no_level() -> None:
    check(lambda v: v["a"] + 1.0, [{"a": torch.ones(1)}], (0,))
    check(lambda v: torch.ones(2), [], ())


def test_levels_come_first_whichever_dims_torch_keeps_them_in() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    results: list[Mapped] = []

    def inner(x: Tensor) -> tuple[()]:
        results.append(unwrapped(x))
        return ()

    torch.func.vmap(lambda x: torch.func.vmap(inner, in_dims=1)(x), in_dims=1)(x)
    (result,) = results  # of level 0, dim 1 of x; of level 1, dim 2 of it
    assert result.levels == (0, 1)
    assert torch.equal(result.tensor, x.permute(1, 2, 0))


def test_place_of_a_level() -> None:
    result = mapped(lambda v: v["c"] - v["b"], LEVELS)
    assert [result.at(level) for level in range(3)] == [None, 0, 1]
    assert result.shape == (3,)


def test_results_need_no_memory_for_levels_that_they_do_not_read() -> None:
    """Ten levels of a hundred: expanded over all of them, an index would overflow."""
    levels = [{f"x{n}": torch.linspace(0.0, 1.0, 100)} for n in range(10)]
    result = mapped(lambda v: v["x0"] * v["x9"], levels)
    assert result.tensor.shape == (100, 100)
    assert result.levels == (0, 9)


PATCHED: dict[str, tuple[Function, tuple[int, ...]]] = {
    "index by a number": (lambda v: torch.arange(5.0)[v["a"].round().long()] + v["c"], (0, 2)),
    "write by a mask": (lambda v: _written(v["b"] * 1.0, v["b"] > 0.0), (1,)),
    "squeeze of a number": (lambda v: v["c"].squeeze(-1) + torch.squeeze(v["a"]), (0, 2)),
    "data": (lambda v: v["b"].data * 2.0, (1,)),
    "an assertion that holds for all": (lambda v: _asserted(v["c"] > 0, v["b"]), (1,)),
    "a check in a library": (lambda v: dist.Normal(v["b"], v["c"], validate_args=True).loc, (1,)),
}


def _asserted(holds: Tensor, x: Tensor) -> Tensor:
    assert holds
    assert holds.all()
    return x


def _written(x: Tensor, mask: Tensor) -> Tensor:
    x[mask] = 7.0
    return x


@pytest.mark.parametrize("name", PATCHED)
def test_operations_that_are_written_in_another_way(name: str) -> None:
    function, read = PATCHED[name]
    check(function, LEVELS, read, patched=True)


def test_branches_and_numbers_are_not_taken() -> None:
    """
    Whichever was taken would be wrong for some.

    Nor one that all take: whether they do depends on the particles, and so would the estimate.
    """
    for function in (
        lambda v: v["b"] if v["c"] > 2.5 else -v["b"],
        lambda v: v["b"] if v["c"] > 0 else v["a"],
        lambda v: _asserted(v["c"] > 2.5, v["b"]),
        lambda v: v["b"] * v["c"].item(),
        lambda v: v["b"] * (v["c"] * 0.0).item(),
        lambda v: v["b"] * float(v["c"]),
        lambda v: v["b"][int(v["c"] - 2.0)],
    ):
        with pytest.raises(RuntimeError, match="vmap"):
            mapped(function, LEVELS, patched=True)


# Distributions.


class Triangle:
    """A user's own distribution: a density and draws, nothing else."""

    def __init__(self, width: Tensor) -> None:
        self.width = width

    def __call__(self) -> Tensor:
        return self.width * (torch.rand(()) + torch.rand(()) - 1.0)

    sample = rsample = __call__

    def log_prob(self, value: Tensor) -> Tensor:
        return ((1.0 - value.abs() / self.width).clamp(min=0.0) / self.width).log()


class Plain(dist.TorchDistribution):
    """A distribution of Pyro's kind that torch cannot map, with a plain tuple of a shape."""

    arg_constraints = {}  # noqa: RUF012
    event_shape = (2,)  # type: ignore[assignment]
    batch_shape = ()  # type: ignore[assignment]

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate

    def log_prob(self, value: Tensor) -> Tensor:
        if bool(self.rate > 0.7):
            return -self.rate * value.abs().sum()
        return -(value**2).sum()


def gaussian_hmm(v: Mapping[str, Tensor]) -> Any:
    normal = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    matrix = v["a"] * torch.ones(2, 2)
    return dist.GaussianHMM(normal, 0.3 * v["m"], normal, matrix, normal, duration=3)


DISTRIBUTIONS: dict[str, tuple[Callable[[Mapping[str, Tensor]], Any], Tensor]] = {
    "Normal": (lambda v: dist.Normal(v["a"], 1.0), torch.tensor([0.3, -1.0, 2.0])),
    "Multinomial": (
        lambda v: dist.Multinomial(4, torch.stack([v["a"], v["a"] * 0 + 1.0])),
        torch.tensor([[1.0, 3.0], [4.0, 0.0], [2.0, 2.0]]),
    ),
    "DirichletMultinomial": (
        lambda v: dist.DirichletMultinomial(torch.stack([v["a"], v["a"] + 1.0]), 4),
        torch.tensor([[1.0, 3.0], [4.0, 0.0], [2.0, 2.0]]),
    ),
    "MultivariateNormal": (
        lambda v: dist.MultivariateNormal(v["m"][0], v["a"] * torch.eye(2)),
        torch.arange(6.0).reshape(3, 2),
    ),
    "LKJCholesky": (
        lambda v: dist.LKJCholesky(3, v["a"]),
        torch.stack([torch.eye(3)] * 3),
    ),
    "MixtureSameFamily": (
        lambda v: dist.MixtureSameFamily(
            dist.Categorical(torch.stack([v["a"], v["a"] ** 2])), dist.Normal(v["m"][0], 1.0)
        ),
        torch.tensor([0.3, -1.0, 2.0]),
    ),
    "GaussianHMM": (gaussian_hmm, torch.arange(18.0).reshape(3, 3, 2)),
    "DiscreteHMM": (
        lambda v: dist.DiscreteHMM(
            torch.zeros(2), v["m"], dist.Normal(v["a"] * torch.arange(2.0), 1.0), duration=3
        ),
        torch.arange(9.0).reshape(3, 3) / 4,
    ),
    "Stable": (lambda v: dist.Stable(1.2 + 0.3 * v["a"], 0.1), torch.tensor([0.3, -1.0, 2.0])),
    "of the user's own": (lambda v: Triangle(v["a"] + 2.0), torch.tensor([0.3, -1.0, 2.0])),
    "with a plain tuple of a shape": (lambda v: Plain(v["a"]), torch.arange(6.0).reshape(3, 2)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_log_prob(name: str) -> None:
    """Also of distributions that torch cannot map."""
    make, values = DISTRIBUTIONS[name]
    levels = [LEVELS[0], {"unread": torch.zeros(5)}, {"x": values}]
    with pyro.validation_enabled(False):
        check(lambda v: log_prob_of(make(v), v["x"]), levels, (0, 2), patched=True)


@pytest.mark.parametrize("name", ["Multinomial", "Stable", "with a plain tuple of a shape"])
def test_log_prob_of_arguments_that_are_not_mapped(name: str) -> None:
    make, values = DISTRIBUTIONS[name]
    levels = [{"x": values}]
    one = {name: value[0] for name, value in LEVELS[0].items()}
    with pyro.validation_enabled(False):
        check(lambda v: log_prob_of(make(one), v["x"]), levels, (0,), patched=True)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_stabilities_near_one_beside_others(shape: tuple[int, ...]) -> None:
    """Where no value is near one Pyro takes a short cut; the long way holds for all values."""
    stability = torch.tensor([0.8, 0.996, 1.0, 1.0049, 1.3])
    levels = [
        {"a": stability.reshape(-1, *(1,) * len(shape)).expand(-1, *shape)},
        {"u": torch.linspace(-1.2, 1.4, 3), "e": torch.tensor([0.1, 1.0, 3.0])},
    ]

    def moved(v: Mapping[str, Tensor]) -> Tensor:
        noise = v["u"].expand(shape), v["e"].expand(shape)
        skew = torch.full(shape, 0.3)
        shift = reparam_stable._safe_shift(v["a"], skew, skew ** (1 / v["a"]), skew)
        result: Tensor = pyro_stable._standard_stable(v["a"], skew, *noise, coords="S0") + shift
        return result

    check(moved, levels, (0, 1), patched=True)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):  # a user's short cut
        mapped(lambda v: v["a"] if (v["a"] < 1).any() else v["a"] + 1, levels, patched=True)


class Steps(dist.Categorical):
    """A distribution that writes its arguments into a tensor when it is made."""

    def __init__(self, first: Tensor, validate_args: bool | None = None) -> None:
        probs = torch.ones(3)
        probs[0] = first
        super().__init__(probs, validate_args=validate_args)


def test_distribution_that_cannot_be_made_of_mapped_arguments() -> None:
    """It is made for each combination."""

    def steps(v: Mapping[str, Tensor]) -> Tensor:
        return log_prob_of(Steps(v["a"] + v["b"][0] ** 2), torch.tensor(0.0))

    check(steps, LEVELS, (0, 1), patched=True)


def test_ordered_logistic_is_made_of_mapped_arguments() -> None:
    """Pyro's own writes into a tensor. It keeps its class and has a gradient."""
    found: list[type] = []

    def ordered(v: Mapping[str, Tensor]) -> Tensor:
        cuts = torch.stack([v["a"] - 1.0, v["a"]])
        fn = dist.OrderedLogistic(v["b"][0], cuts)
        found.append(type(fn))
        log_prob: Tensor = fn.log_prob(torch.tensor(1.0))
        return log_prob

    a, b = torch.linspace(0.2, 1.0, 3, requires_grad=True), torch.randn(3, 2)
    results: list[Tensor] = []

    def at_single_values(v: dict[str, Tensor]) -> None:
        results.append(unwrapped(ordered(v)).tensor)

    run_mapped(at_single_values, [{"a": a, "b": b}], patched=True)
    (gradient,) = torch.autograd.grad(results[0].sum(), a)
    other = a.detach().clone().requires_grad_()
    expected = torch.stack([ordered({"a": x, "b": y}) for x, y in zip(other, b, strict=True)])
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), other)[0])
    assert set(found) == {dist.OrderedLogistic}


def test_cut_points_that_are_mapped() -> None:
    def ordered(v: Mapping[str, Tensor]) -> Tensor:
        cuts = torch.stack([v["a"] - 1.0, v["a"], v["a"] + 1.0])
        return log_prob_of(dist.OrderedLogistic(v["b"][0], cuts), torch.tensor(1.0))

    check(ordered, LEVELS, (0, 1), patched=True)


def test_loops_over_very_many_combinations_are_not_begun() -> None:
    number = int(MAX_LOOP**0.5) + 1
    levels = [{"a": torch.linspace(0.1, 2.0, number)}, {"x": torch.ones(number, 2)}]
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        mapped(lambda v: log_prob_of(Plain(v["a"]), v["x"]), levels)


def test_programs_with_distributions_that_torch_cannot_map() -> None:
    def counts() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
        counts = torch.tensor([2.0, 1.0, 1.0])
        pyro.sample("y", dist.Multinomial(4, p**s / (p**s).sum()), obs=counts)

    def ordered() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        gap = pyro.sample("gap", dist.LogNormal(0.0, 0.3))
        cuts = torch.stack([-gap, gap])
        with pyro.plate("data", 3):
            data = torch.tensor([0.0, 1.0, 2.0])
            pyro.sample("y", dist.OrderedLogistic(loc.expand(3), cuts), obs=data)

    def own() -> None:
        width = pyro.sample("width", dist.LogNormal(1.0, 0.3))
        x: Tensor = pyro.sample("x", Triangle(width))  # type: ignore[arg-type]
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    def states() -> None:
        a = pyro.sample("a", dist.Beta(2.0, 2.0))
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        table = torch.stack([torch.stack([a, 1 - a]), torch.stack([1 - a, a])]).log()
        fn = dist.DiscreteHMM(torch.zeros(2), table, dist.Normal(loc, 1.0))
        pyro.sample("y", fn, obs=torch.tensor([0.3, -0.5, 1.0]))

    for model in (counts, ordered, states, own):
        compare(model, num_samples=4)


class Shifted(dist.TorchDistribution):
    """An exponential distribution from 1 on, written as users do: zeros are put in afterwards."""

    arg_constraints = {"rate": constraints.positive}  # noqa: RUF012
    support = constraints.real

    def __init__(self, rate: Tensor, *, spread: bool = False) -> None:
        self.rate, self.spread = rate, spread
        super().__init__(rate.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.rate.log() - self.rate * (value - 1)
        outside = (value < 1) & (self.rate > 0)
        if outside.any():
            log_prob[outside] = -math.inf
        if self.spread:  # not of one value alone
            log_prob = log_prob - (1.0 + log_prob.exp().sum()).log()
        return log_prob


MANY = 33  # two levels of so many values have more combinations than are looped over


def test_levels_as_batch_dims() -> None:
    """A log_prob that torch cannot map is evaluated at more combinations than a loop is worth."""
    levels = [{"a": torch.linspace(0.1, 2.0, MANY)}, {"x": torch.linspace(-1.0, 3.0, MANY)}]
    assert MANY**2 > MAX_LOOP

    def density(v: Mapping[str, Tensor]) -> Tensor:
        rate = v["a"] + torch.tensor([0.0, 1.0, 2.0])
        return log_prob_of(Shifted(rate), v["x"])

    check(density, levels, (0, 1), patched=True)
    check(density, levels, (0, 1), patched=True)  # known not to be mapped by now


def test_a_log_prob_that_mixes_batch_dims_is_not_given_levels_as_such() -> None:
    """It is looped over, or refused where that is not worth it."""
    levels = [{"a": torch.linspace(0.1, 2.0, 5)}, {"x": torch.linspace(-1.0, 3.0, 4)}]

    def density(v: Mapping[str, Tensor]) -> Tensor:
        return log_prob_of(Shifted(v["a"] + torch.arange(2.0), spread=True), v["x"])

    check(density, levels, (0, 1), patched=True)
    levels = [{"a": torch.linspace(0.1, 2.0, MANY)}, {"x": torch.linspace(-1.0, 3.0, MANY)}]
    with pytest.raises(RuntimeError):
        mapped(density, levels, patched=True)


EVENTS: dict[str, Function] = {
    "OrderedLogistic": lambda v: log_prob_of(
        dist.OrderedLogistic(v["x"] * torch.arange(4.0) / 3, v["a"] * torch.linspace(-1.0, 1.0, 4)),
        torch.tensor([0.0, 4.0, 2.0, 1.0]),
    ),
    "cut points of all": lambda v: log_prob_of(
        dist.OrderedLogistic(
            v["x"] * torch.linspace(0.0, 1.0, 3), torch.stack([-v["a"], 0.1 * v["a"], v["a"]])
        ),
        torch.tensor([0.0, 3.0, 2.0]),
    ),
    "Multinomial": lambda v: log_prob_of(
        dist.Multinomial(4, logits=torch.stack([v["a"], v["x"], 0 * v["x"]])),
        torch.tensor([1.0, 3.0, 0.0]),
    ),
    "Multinomial in a batch": lambda v: log_prob_of(
        dist.Multinomial(4, logits=torch.stack([v["a"] * torch.arange(2.0), v["x"].expand(2)], -1)),
        torch.tensor([[1.0, 3.0], [4.0, 0.0]]),
    ),
    "expanded": lambda v: log_prob_of(
        dist.OrderedLogistic(v["x"] * torch.arange(3.0), v["a"] * torch.linspace(-1.0, 1.0, 3))
        .expand((2, 3))
        .to_event(1),
        torch.tensor([[0.0, 3.0, 2.0], [1.0, 1.0, 2.0]]),
    ),
    "expanded, one value": lambda v: log_prob_of(
        Shifted(v["a"] + v["x"] ** 2).expand((3,)), v["x"]
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_levels_as_batch_dims_beside_event_dims(name: str) -> None:
    """Arguments with dims of the event, as vectors and cut points have, or without."""
    levels = [{"a": torch.linspace(0.1, 2.0, MANY)}, {"x": torch.linspace(-1.0, 3.0, MANY)}]
    check(EVENTS[name], levels, (0, 1), patched=True)


def test_torchscript_is_not_fused_where_tensors_are_mapped() -> None:
    """A GPU's kernels of several operations see the values of all particles as one tensor."""
    found = []

    def at_single_values(values: dict[str, Tensor]) -> None:
        found.append(torch._C._get_graph_executor_optimize())

    run_mapped(at_single_values, [{"x": torch.zeros(2)}], patched=False)
    assert found == [False]
    assert torch._C._get_graph_executor_optimize()
