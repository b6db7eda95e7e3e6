# SPDX-License-Identifier: Apache-2.0
"""
Tensors of a program that mapped values are written into: ``out[i] = x``, ``total += x``.

A tensor that was made without latents is the same for all combinations, and torch cannot write
into it what is not. So the operation that made it is found by its number, and the program runs
again: there the operation gives a tensor for each combination of the levels that are written. It
then holds more levels than some of its elements need, which costs time, and changes no number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyro_mpis.programs.tensors import is_mapped, mapped_at, sizes_of, stripped, tensors_of

MOST_ELEMENTS = 2**24  # of a tensor with a dim for each level that is written


class Written:
    """
    Which operations of a program, by their numbers, made a tensor that is written into.

    :param num_levels: of the run; those of a program's own transforms lie within them.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.found = False  # whether this run has found more of them
        self._sizes: dict[int, dict[int, int]] = {}  # number -> sizes of the levels
        self._number = 0
        self._made_by: dict[int, int] = {}  # memory of a tensor -> number of what made it

    def begin(self) -> None:
        """Begin a run of the program."""
        self.found, self._number = False, 0
        self._made_by.clear()

    def result(self, result: Any, args: Sequence[Any]) -> Any:
        """Take what an operation gives, and return it with the levels that are written into it."""
        self._number += 1
        if type(result) is not Tensor:
            return result
        if self._number in self._sizes:
            result = mapped_at(result, self._sizes[self._number])
        elif _memory_of(result) in map(_memory_of, tensors_of(list(args))):
            return result  # a view, or the tensor that was written into
        self._made_by[_memory_of(result)] = self._number
        return result

    def note(self, target: Tensor, others: Any) -> bool:
        """
        Note that values could not be written.

        :param target: what they were to be written into.
        :return: whether the next run makes the tensor with their levels.
        """
        number = self._made_by.get(_memory_of(target))
        known = {} if number is None else self._sizes.get(number, {})
        sizes = {**known, **sizes_of(target), **levels_written(target, others)}
        size = math.prod(sizes.values()) * target.numel()
        if number is None or sizes == known or size > MOST_ELEMENTS:
            return False
        if max(sizes) >= self.num_levels:
            return False
        self._sizes[number] = sizes
        self.found = True
        return True


def levels_written(target: Tensor, others: Any) -> dict[int, int]:
    """Return the levels, with their sizes, at which others are mapped and a target is not."""
    own, result = sizes_of(target), dict[int, int]()
    for tensor in filter(is_mapped, tensors_of(others)):
        result |= sizes_of(tensor)
    return {level: size for level, size in result.items() if level not in own}


def target_of(func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
    """Return the tensor that an operation writes into; None if it writes into none."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


_IN_PLACE = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "pow", "floordiv", "mod")),
    *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")),
}


def _memory_of(tensor: Tensor) -> int:
    return stripped(tensor).tensor.untyped_storage().data_ptr()
