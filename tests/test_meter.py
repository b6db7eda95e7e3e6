# SPDX-License-Identifier: Apache-2.0
"""What a mapped run at single values says of one at many."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.meter import Meter
from pyro_mpis.programs.tensors import unwrapped

A, B = 0, 1  # levels


def metered(function: Callable[[dict[str, Tensor]], Any], num_levels: int | None = None) -> Meter:
    meter = Meter(num_levels)
    levels = [{"a": torch.ones(1)}, {"b": torch.ones(1)}]
    with torch.no_grad(), meter:
        run_mapped(function, levels, patched=False)
    meter.finish()
    return meter


def highest(meter: Meter, levels: tuple[int, ...]) -> int:
    """Return the most bytes held at any moment by tensors of some levels."""
    return max((held.get(levels, 0) for _, held in meter.moments), default=0)


def test_bytes_of_each_combination_of_levels() -> None:
    kept: list[Tensor] = []

    def program(values: dict[str, Tensor]) -> None:
        row = torch.zeros(100)
        kept.append(row + values["a"])
        kept.append(kept[0] * values["b"])
        kept.append(kept[1] + kept[0])

    meter = metered(program)
    assert highest(meter, ()) == 400
    assert highest(meter, (A,)) == 400
    assert highest(meter, (A, B)) == 800
    assert meter.made[(A, B)] == 800
    assert meter.largest[(A, B)] == (400, None)


def test_what_is_freed_does_not_count() -> None:
    def program(values: dict[str, Tensor]) -> None:
        x = torch.zeros(100) + values["a"]
        for _ in range(50):
            x = x + 1.0

    meter = metered(program)
    assert meter.made[(A,)] == 51 * 400
    assert highest(meter, (A,)) == 800, "old and new"


def test_views_and_expanded_tensors_take_nothing() -> None:
    def program(values: dict[str, Tensor]) -> None:
        x = torch.zeros(100) + values["a"]
        keep = [x.view(10, 10), x[:50], x.expand(1000, 100), x.unsqueeze(0)]
        del keep

    assert metered(program).made[(A,)] == 400


def test_copies_of_matrices_have_the_batch_dims_of_all() -> None:
    """A product of matrices copies both operands; to take one apart takes five times a copy."""

    def program(values: dict[str, Tensor]) -> None:
        matrix = torch.zeros(10, 10) + values["a"]
        vectors = torch.zeros(5, 10, 1) + values["b"]
        matrix @ vectors

    meter = metered(program)
    copies = 4 * (5 * 10 * 10 + 5 * 10)
    assert highest(meter, (A, B)) == copies + 4 * 50
    assert meter.made[(A, B)] == copies + 4 * 50
    assert metered(lambda v: torch.linalg.det(torch.eye(10) + v["a"])).made[(A,)] >= 6 * 400


def test_transforms_of_the_program_itself() -> None:
    """Their levels are no levels of the run: what they map has dims of its own."""

    def program(values: dict[str, Tensor]) -> None:
        rows = torch.zeros(7, 10) + values["a"]
        torch.func.vmap(lambda row: row * values["b"])(rows)
        torch.func.grad(lambda row: (row * values["b"]).sum())(rows)

    meter = metered(program, num_levels=2)
    assert set(meter.made) == {(), (A,), (A, B)}
    assert meter.largest[(A, B)] == (4 * 7 * 10, None)


def test_results_that_were_taken_out_are_held() -> None:
    results = []

    def program(values: dict[str, Tensor]) -> None:
        results.append(unwrapped(torch.zeros(100) + values["b"]))

    meter = metered(program)
    assert meter.moments[-1][1][(B,)] == 400


def test_a_mapped_run_leaves_no_cycle() -> None:
    """Results would otherwise stay until Python looks for garbage, block after block."""

    def result_of_run() -> "weakref.ref[Tensor]":
        found: dict[str, Tensor] = {}

        def program(values: dict[str, Tensor]) -> None:
            found["result"] = unwrapped(values["a"] * 2.0).tensor

        run_mapped(program, [{"a": torch.ones(3)}], patched=False)
        torch.testing.assert_close(found["result"], torch.full((3,), 2.0))
        return weakref.ref(found["result"])

    gc.disable()
    try:
        assert result_of_run()() is None
    finally:
        gc.enable()
