# SPDX-License-Identifier: Apache-2.0
r"""
Count what a mapped run allocates: a :class:`~torch.overrides.TorchFunctionMode`.

In a run over levels of a single value each, every tensor is small, and the levels that it is mapped
at say how it grows: a tensor of ``n`` bytes that is mapped at two levels has ``n * K_1 * K_2`` with
``K_1`` and ``K_2`` values on them. Tensors are counted from the operation that makes them to when
they are freed, those that a distribution holds for as long as the trace holds it. So it is known
what values, arguments of distributions and temporaries take together at each moment of the run,
without knowing any of the distributions.
"""

import math
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_mpis._text import broadcast_shape
from pyro_mpis.programs.tensors import Mapped, stripped

Levels = tuple[int, ...]
Bytes = dict[Levels, int]  # of one combination of the values on these levels

# Operations that copy what they are given, to the levels of all of it.
COPYING = ("linalg", "cholesky", "solve", "matmul", "mm", "mv", "einsum", "logsumexp", "dot", "det")
# Those of them that take a matrix apart, and how many times as long as a copy that takes.
FACTORING, TIMES_A_COPY = ("linalg", "cholesky", "solve", "det"), 5


class Meter(TorchFunctionMode):
    """
    Note the bytes that are held at each moment of a mapped run.

    :attr:`moments` are those at which most may be held: before something is freed.

    :param num_levels: of the run; those of a program's own transforms lie within them. All levels
        count by default.
    """

    def __init__(self, num_levels: int | None = None) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.site: str | None = None  # whose density is computed, to note with the moments
        self.moments: list[tuple[str | None, Bytes]] = []
        self.made: Bytes = {}  # by all operations together, or that take as long
        self.largest: dict[Levels, tuple[int, str | None]] = {}  # tensor of such levels
        self._held: Bytes = {}
        self._references: dict[int, int] = {}  # storage -> tensors that are views of it
        self._sizes: dict[int, tuple[Levels, int]] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._has_grown = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Apply an operation, and note what comes out."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self._note(part)
        else:
            return result
        name = getattr(func, "__name__", "")
        if any(part in name for part in COPYING):
            times = TIMES_A_COPY if any(part in name for part in FACTORING) else 1
            self._note_copies([arg for arg in args if isinstance(arg, Tensor)], times)
        return result

    def finish(self) -> None:
        """Note the last moment."""
        self._note_moment()

    @property
    def highest(self) -> int:
        """The most bytes held at any moment, with a single value on each level."""
        return max((sum(held.values()) for _, held in self.moments), default=0)

    def _note(self, tensor: Tensor) -> None:
        """Note a tensor, unless it is a view of one that is known."""
        mapped = self._mapped(tensor)
        plain = mapped.tensor
        if plain.layout != torch.strided or id(plain) in self._watched:
            return
        storage = plain.untyped_storage()._cdata
        if storage not in self._references:
            self._references[storage] = 0
            num_levels = len(mapped.levels)
            number = plain.element_size()
            sizes = zip(plain.shape, plain.stride(), strict=True)
            for size, stride in list(sizes)[num_levels:]:
                number *= size if stride or size == 0 else 1  # else expanded
            self._add(mapped.levels, number)
            self.made[mapped.levels] = self.made.get(mapped.levels, 0) + number
            if number > self.largest.get(mapped.levels, (0, None))[0]:
                self.largest[mapped.levels] = number, self.site
            self._sizes[storage] = mapped.levels, number
        self._references[storage] += 1
        key = id(plain)
        self._watched[key] = weakref.ref(plain, lambda _: self._drop(key, storage))

    def _mapped(self, tensor: Tensor) -> Mapped:
        """Return a tensor with the levels of the run; dims of others are its own."""
        mapped = stripped(tensor)
        return Mapped(mapped.tensor, mapped.levels[: self._num_own(mapped)])

    def _num_own(self, mapped: Mapped) -> int:
        if self.num_levels is None:
            return len(mapped.levels)
        return sum(level < self.num_levels for level in mapped.levels)

    def _note_copies(self, operands: Sequence[Tensor], times: int) -> None:
        """
        Note a moment at which an operation holds copies of its operands.

        :param times: what it takes to make it, in copies.
        """
        mapped = [self._mapped(operand) for operand in operands]
        levels = tuple(sorted({level for operand in mapped for level in operand.levels}))
        number = sum(
            map(operator.mul, _copied(operands), (m.tensor.element_size() for m in mapped))
        )
        self.made[levels] = self.made.get(levels, 0) + number * times
        self._add(levels, number)
        self._note_moment()
        self._add(levels, -number)

    def _drop(self, key: int, storage: int) -> None:
        self._watched.pop(key, None)
        self._references[storage] -= 1
        if self._references[storage] == 0:
            del self._references[storage]
            levels, number = self._sizes.pop(storage)
            self._note_moment()
            self._add(levels, -number)

    def _add(self, levels: Levels, number: int) -> None:
        self._held[levels] = self._held.get(levels, 0) + number
        self._has_grown |= number > 0

    def _note_moment(self) -> None:
        if self._has_grown:
            self.moments.append((self.site, dict(self._held)))
            self._has_grown = False


def _copied(operands: Sequence[Tensor]) -> list[int]:
    """Return the elements of copies of matrices, which have the batch dims of all of them."""
    matrices = [operand.shape[-2:] for operand in operands]
    try:
        batch = math.prod(broadcast_shape(*(operand.shape[:-2] for operand in operands)))
    except (RuntimeError, ValueError):  # other dims than those of matrices, as in an einsum
        return [operand.shape.numel() for operand in operands]
    return [batch * matrix.numel() for matrix in matrices]
