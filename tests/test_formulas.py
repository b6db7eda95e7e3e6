# SPDX-License-Identifier: Apache-2.0
"""Formulas in place of torch's give torch's densities."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_mpis.programs.formulas import by_formula
from pyro_mpis.programs.mapped import log_prob_of, run_mapped
from pyro_mpis.programs.tensors import Mapped, unwrapped, vmap_alone

LOGITS = torch.tensor([-120.0, -30.0, -3.0, 0.0, 1e-8, 7.0, 45.0, 60.0], dtype=torch.double)


def mapped_log_probs(make: Callable[[Tensor], Any], values: Tensor) -> list[Mapped | None]:
    """Return what the formula and the package give at all pairs of logits and values."""
    found: list[Mapped | None] = []

    def at_single_values(values: dict[str, Tensor]) -> None:
        fn = make(values["x"])
        log_prob = by_formula(fn, values["y"])
        found.append(None if log_prob is None else unwrapped(log_prob))
        found.append(unwrapped(log_prob_of(fn, values["y"])))

    with pyro.validation_enabled(False):
        run_mapped(at_single_values, [{"x": LOGITS}, {"y": values}], patched=False)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda x: dist.Bernoulli(logits=x),
        lambda x: dist.Bernoulli(probs=x.clamp(-30, 30).sigmoid()),
        lambda x: torch.distributions.Bernoulli(logits=x),
        lambda x: dist.Bernoulli(logits=torch.stack([x, -x])).to_event(1),
        lambda x: dist.Bernoulli(logits=torch.stack([x, -x])),
    ],
)
def test_bernoulli(make: Callable[[Tensor], Any]) -> None:
    values = torch.tensor([0.0, 1.0], dtype=torch.double)
    formula, given = mapped_log_probs(make, values)
    assert formula is not None
    assert formula == given
    expected = torch.stack([torch.stack([make(x).log_prob(y) for y in values]) for x in LOGITS])
    torch.testing.assert_close(formula.tensor, expected, rtol=1e-12, atol=1e-14)


def test_other_values_and_other_families_are_left_to_torch() -> None:
    """The formula holds at 0 and 1 alone; torch's is linear in the value."""
    values = torch.tensor([0.0, 0.3], dtype=torch.double)
    formula, given = mapped_log_probs(
        lambda x: dist.Bernoulli(logits=x, validate_args=False),
        values,
    )
    assert formula is None
    assert given is not None
    expected = dist.Bernoulli(logits=LOGITS[3], validate_args=False).log_prob(values[1])
    assert given.tensor[3, 1] == expected
    formula, _ = mapped_log_probs(dist.Poisson, torch.tensor([0.0]))
    assert formula is None


def test_plain_runs_are_left_to_torch() -> None:
    assert by_formula(dist.Bernoulli(logits=LOGITS), torch.ones(8, dtype=torch.double)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda x, s: dist.Normal(x, s),
        lambda x, s: dist.Normal(1.5, s),
        lambda x, s: dist.Normal(x, 2.0),
        lambda x, s: torch.distributions.Normal(torch.stack([x, -x, x]), s),
        lambda x, s: dist.Normal(torch.stack([x, -x, x]), s).to_event(1),
        lambda x, s: dist.LogNormal(torch.stack([x, -x]).unsqueeze(-1), s),
    ],
)
@pytest.mark.parametrize("event", [(), (3,)])
def test_normal(make: Callable[[Tensor, Tensor], Any], event: tuple[int, ...]) -> None:
    """Locations, scales and values on levels in an order other than that of the shape."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    x, scale = torch.rand(5, generator=generator), torch.rand(4, generator=generator) + 1e-3
    values = torch.rand((2, *event), generator=generator) + 0.5
    expected = torch.stack(
        [
            torch.stack([torch.stack([make(m, s).log_prob(y) for m in x]) for y in values])
            for s in scale
        ]
    )
    found = []

    def at_single_values(single: dict[str, Tensor]) -> None:
        formula = by_formula(make(single["x"], single["s"]), single["y"])
        assert formula is not None
        found.append(unwrapped(formula))

    with pyro.validation_enabled(False):
        run_mapped(at_single_values, [{"s": scale}, {"y": values}, {"x": x}], patched=False)
    (result,) = found
    torch.testing.assert_close(
        result.along(0, 1, 2).expand(expected.shape), expected, rtol=2e-6, atol=2e-6
    )


def test_derivatives_of_a_normal() -> None:
    """First and second derivatives through a mapped run are those of torch's formula."""
    leaves = [torch.tensor([0.3, -1.0], dtype=torch.double, requires_grad=True) for _ in "xs"]

    def derivatives(log_prob: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(log_prob.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.cat(first).square().sum(), leaves)
        return [*first, *second]

    found: list[Tensor] = []

    def at_single_values(single: dict[str, Tensor]) -> None:
        log_prob = by_formula(dist.Normal(single["x"], single["s"]), torch.tensor(0.7))
        assert log_prob is not None
        found.append(unwrapped(log_prob).tensor)

    with pyro.validation_enabled(False):
        run_mapped(at_single_values, [{"x": leaves[0]}, {"s": leaves[1].exp()}], patched=False)
    expected = dist.Normal(leaves[0].unsqueeze(1), leaves[1].exp()).log_prob(torch.tensor(0.7))
    for one, other in zip(derivatives(found[0]), derivatives(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_within_other_transforms_torchs_formula_is_used() -> None:
    """Their tensors have no dims that could be put beside those of levels."""
    formulas: list[Tensor | None] = []
    derivatives: list[Tensor] = []

    def at_single_values(single: dict[str, Tensor]) -> None:
        def of_scale(scale: Tensor) -> Tensor:
            fn = dist.Normal(single["x"], scale)
            formulas.append(by_formula(fn, torch.tensor(0.7)))
            return log_prob_of(fn, torch.tensor(0.7))

        derivatives.append(unwrapped(torch.func.grad(of_scale)(torch.tensor(1.3))).tensor)

    with pyro.validation_enabled(False):
        run_mapped(at_single_values, [{"x": torch.tensor([0.0, 2.0])}], patched=False)
    assert formulas == [None]
    z2 = (0.7 - torch.tensor([0.0, 2.0])) ** 2
    torch.testing.assert_close(derivatives[0], z2 / 1.3**3 - 1 / 1.3)


def test_memory_is_counted_by_torchs_formula() -> None:
    """Tensors of a formula that is not vmap's do not show what they are mapped at."""
    found: list[Tensor | None] = []

    def at_single_values(single: dict[str, Tensor]) -> None:
        fn = dist.Normal(single["x"], 1.0)
        with vmap_alone():
            found.append(by_formula(fn, torch.tensor(0.7)))
        found.append(by_formula(fn, torch.tensor(0.7)))

    with pyro.validation_enabled(False):
        run_mapped(at_single_values, [{"x": torch.zeros(2)}], patched=False)
    assert found[0] is None
    assert found[1] is not None
