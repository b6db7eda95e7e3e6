# SPDX-License-Identifier: Apache-2.0
"""
Tensors of a program that mapped values are written into: ``out[i] = x``, ``total += x``.

A tensor that was made without latents is the same for all combinations, and torch cannot write
into it what is not. So the operation that made it is found by its place in the program, and the
program runs again: there the operation gives a tensor for each combination of the levels that are
written. It then holds more levels than some of its elements need, which costs time, and changes no
number.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_mpis.programs.tensors import mapped_at, sizes_of, stripped, tensors_of

MOST_ELEMENTS = 2**24  # of a tensor with a dim for each level that is written
MOST_WRITES = 10_000  # that one run goes on after: a loop may end only once they are written

# An operation: what calls it, and how often that has been before. A number of all operations would
# differ between runs, as libraries take other steps for mapped tensors.
Step: TypeAlias = tuple[Hashable, int]


class Written:
    """
    Which operations of a program made a tensor that is written into.

    :param num_levels: of the run; those of a program's own transforms lie within them.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.found = False  # whether this run has found more of them
        self.too_many = set[int]()  # levels of a tensor that would be too large
        self._sizes: dict[Step, dict[int, int]] = {}  # sizes of the levels
        self._calls = Counter[Hashable]()
        self._made_by: dict[int, Step] = {}  # memory of a tensor -> what made it
        self._noted = set[Step]()  # the operations that this run has found
        self._writes = 0  # for which it has

    def begin(self) -> None:
        """Begin a run of the program."""
        self.found = False
        self._calls.clear()
        self._made_by.clear()
        self._noted.clear()
        self._writes = 0

    def result(
        self,
        place: Hashable,
        func: Callable[..., Any],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """
        Take what an operation gives, and return it with the levels that are written into it.

        :param place: in the program's code.
        """
        if type(result) is not Tensor:
            return result
        if _memory_of(result) in map(_memory_of, tensors_of((args, kwargs))):
            return result  # a view, or the tensor that was written into
        if _shares(func, args):
            self._made_by.pop(_memory_of(result), None)
            return result
        self._calls[place] += 1
        step = place, self._calls[place]
        if step in self._sizes:
            result = mapped_at(result, self._sizes[step])
        self._made_by[_memory_of(result)] = step
        return result

    def note(self, target: Tensor, others: Any) -> bool:
        """
        Note that values could not be written.

        :param target: what they were to be written into.
        :return: whether the next run makes the tensor with their levels.
        """
        step = self._made_by.get(_memory_of(target))
        known = {} if step is None else self._sizes.get(step, {})
        sizes = {**known, **sizes_of(target), **levels_written(target, others)}
        if step is None or (sizes == known and step not in self._noted):
            return False
        if max(sizes) >= self.num_levels or self._writes >= MOST_WRITES:
            return False
        self._sizes[step] = sizes
        self._noted.add(step)
        self._writes += 1
        self.found = True
        if math.prod(sizes.values()) * target.numel() > MOST_ELEMENTS:
            self.too_many |= sizes.keys()  # the run goes on, to find all of them
        return True


def levels_written(target: Tensor, others: Any) -> dict[int, int]:
    """Return the levels, with their sizes, at which others are mapped and a target is not."""
    own, sizes = sizes_of(target), sizes_of(*tensors_of(others))
    return {level: size for level, size in sizes.items() if level not in own}


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


# What may share its memory with an array that is no tensor, and so with what others read.
_SHARING = {"as_tensor", "asarray", "from_numpy", "frombuffer", "from_dlpack"}


def _shares(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether an operation may give the memory of an array, not of its own."""
    name = getattr(func, "__name__", "")
    return name in _SHARING and not (args and isinstance(args[0], list | tuple | int | float))


def _memory_of(tensor: Tensor) -> int:
    plain = stripped(tensor).tensor
    return plain.untyped_storage().data_ptr() if plain.layout is torch.strided else id(plain)
