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
from pyro_mpis.programs.tensors import Mapped, unwrapped

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
