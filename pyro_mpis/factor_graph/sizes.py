# SPDX-License-Identifier: Apache-2.0
"""
What a contraction takes, in bytes and in multiplications, from the dims of the factors alone.

The steps are those of :class:`~pyro_mpis.factor_graph.evidence.LogSpaceRing`: the same plates are
multiplied over, and the same order of eliminations is found (and kept, for the sum itself). Nothing
is computed and nothing is allocated, so that sizes may be beyond what any machine has.
"""

import functools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import Ring
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph import order
from pyro_mpis.factor_graph.graph import with_enclosing
from pyro_mpis.factor_graph.packed import dims_of, union

DOUBLE = torch.double.itemsize
KEPT = 64  # contractions whose sizes are remembered
PART = 2**18 * DOUBLE * 6  # temporaries of a sum that is worked on in parts


@dataclass(frozen=True)
class Shape:
    """A factor before it exists: its dims, its plates, and the bytes of an entry."""

    name: str
    dims: str
    plates: Ordinal
    itemsize: int


@dataclass(frozen=True)
class Shapes:
    """A factor graph before it exists."""

    factors: tuple[Shape, ...]
    sizes: Mapping[str, int]
    index_plates: Mapping[str, Ordinal]
    ragged: Mapping[Ordinal, Ordinal] = field(default_factory=dict)  # inner plates -> outer plates
    on_cpu: bool = True


@dataclass(frozen=True)
class Message:
    """A tensor of a contraction: its dims, and its bytes."""

    dims: str
    bytes: int


@dataclass(frozen=True)
class Contraction:
    """What the queries of a factor graph take, beside the factors."""

    forward: int  # bytes of the evidence
    backward: int  # of moments and marginals
    sampling: int  # of draws
    work: int  # multiplications of matrix products, for the evidence
    sums: int  # entries that are added and summed one by one, for the evidence
    largest: Message  # the largest tensor

    @property
    def needed(self) -> int:
        """Bytes of the query that takes most."""
        return max(self.forward, self.backward, self.sampling)


def contraction_of(shapes: Shapes) -> Contraction | None:
    """
    Find what the contraction of a factor graph takes; kept for the runs that follow.

    :param shapes: of the factors, one of each source term included.
    :return: None where plates cross: the sum cannot be taken as it is.
    """
    return _contraction(
        tuple((shape.dims, shape.plates, shape.itemsize) for shape in shapes.factors),
        tuple(shapes.sizes.items()),
        tuple(shapes.index_plates.items()),
        tuple(shapes.ragged.items()),
        shapes.on_cpu,
    )


@functools.lru_cache(KEPT)
def _contraction(
    factors: tuple[tuple[str, Ordinal, int], ...],
    sizes: tuple[tuple[str, int], ...],
    index_plates: tuple[tuple[str, Ordinal], ...],
    ragged: tuple[tuple[Ordinal, Ordinal], ...],
    on_cpu: bool,
) -> Contraction | None:
    size_of, outer = dict(sizes), dict(ragged)
    ring = _SizeRing(size_of, outer, on_cpu)
    tree: OrderedDict[Ordinal, list[Tensor]] = OrderedDict()
    used: set[str] = set()
    for dims, plates, itemsize in factors:
        dims = "".join(symbol for symbol in dims if size_of[symbol] > 1)
        tree.setdefault(with_enclosing(outer, plates), []).append(_named(dims, itemsize))
        used |= set(dims)
    try:
        contract_to_tensor(tree, used & dict(index_plates).keys(), ring=ring)
    except NotImplementedError:
        return None
    return Contraction(
        forward=ring.forward,
        backward=ring.saved + ring.grads,
        sampling=ring.kept + ring.tables,
        work=ring.work,
        sums=ring.sums,
        largest=ring.largest,
    )


class _SizeRing(Ring):
    """Sums and products of which only the sizes are known."""

    def __init__(
        self, sizes: Mapping[str, int], ragged: Mapping[Ordinal, Ordinal], on_cpu: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes, self._ragged, self._on_cpu = sizes, ragged, on_cpu
        self.live = self.forward = self.saved = self.grads = self.kept = self.tables = 0
        self.work = self.sums = 0
        self.largest = Message("", 0)

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        """Take the steps that the sum would take."""
        if not terms:
            return _named("", DOUBLE)
        steps = order.all_steps(
            [dims_of(term) for term in terms], set(dims), self._sizes, self._on_cpu
        )
        held = {number: _Held(dims_of(t), _itemsize(t), 0) for number, t in enumerate(terms)}
        for step in steps:
            operands = [held.pop(number) for number in step.operands]
            held[step.result] = self._step(operands, step.summed)
        (result,) = held.values()
        self.live += result.bytes
        return _named(result.dims, result.itemsize)

    def _step(self, operands: Sequence["_Held"], summed: str) -> "_Held":
        """Note what a step takes for each of the queries."""
        uses = Counter(symbol for term in operands for symbol in term.dims)
        itemsize = max(term.itemsize for term in operands)
        alone = {symbol for symbol in summed if uses[symbol] == 1}
        terms = ["".join(s for s in term.dims if s not in alone) for term in operands]
        shared = "".join(symbol for symbol in summed if symbol not in alone)
        everything = union(*terms)
        result_dims = "".join(symbol for symbol in everything if symbol not in shared)
        result = self._bytes(result_dims, itemsize)
        inputs = [self._bytes(term.dims, term.itemsize) for term in operands]
        if _is_matmul(terms, shared):
            self.work += self._count(everything)
            # shifted, exponentiated, and searched for what is lost: as long, if they are small
            self.sums += sum(map(self._count, (*terms, result_dims)))
        else:
            self.sums += self._count(everything)
        self.sums += sum(self._count(term.dims) for term in operands) if alone else 0
        product = self._bytes(everything, itemsize)
        if _is_matmul(terms, shared):
            temporary, saved, grads = sum(inputs) + PART, sum(inputs), sum(inputs) + PART
        else:
            several = len(terms) > 2
            temporary = (1 + several) * product + min(PART, 2 * product) if shared else product
            saved = (product if shared else 0) + (product if several and shared else 0)
            grads = product + sum(inputs)
        if alone:
            temporary, saved = temporary + sum(inputs), saved + sum(inputs)
        self.forward = max(self.forward, self.live + temporary + result)
        self.live += result - sum(term.bytes for term in operands)
        self.saved += saved + result
        self.grads = max(self.grads, grads + result)
        self.kept += result + (sum(inputs) if alone else 0)
        tables = sum(self._count(term.dims) for term in operands) * 2 * DOUBLE
        if not result_dims:
            tables = max(tables, 3 * DOUBLE * self._count(shared))
        self.tables = max(self.tables, tables if summed else 0)
        if not _is_matmul(terms, shared) and product > self.largest.bytes:
            self.largest = Message(everything, product)
        elif result > self.largest.bytes:
            self.largest = Message(result_dims, result)
        return _Held(result_dims, itemsize, result)

    def product(self, term: Tensor, ordinal: Ordinal) -> Tensor:
        """Multiply over plates; elements of a ragged plate go to those that they read."""
        dims = frozenset(dims_of(term))
        ragged = self._ragged
        for inner, outer in ragged.items():
            if inner <= dims and inner & ordinal and with_enclosing(ragged, outer) - ordinal:
                left = "".join(s for s in dims_of(term) if s not in inner & ordinal)
                self._note_product(dims_of(term), left + "".join(sorted(outer)))
                return self.product(_named(left + "".join(sorted(outer)), DOUBLE), ordinal)
        if not dims & ordinal:
            return term
        result_dims = "".join(symbol for symbol in dims_of(term) if symbol not in ordinal)
        self._note_product(dims_of(term), result_dims)
        return _named(result_dims, DOUBLE)

    def _note_product(self, dims: str, result_dims: str) -> None:
        result = self._bytes(result_dims, DOUBLE)
        self.live += result
        self.forward = max(self.forward, self.live)
        self.saved += result
        self.kept += result
        self.grads = max(self.grads, self._bytes(dims, DOUBLE))
        self.sums += self._count(dims)

    def _count(self, dims: str) -> int:
        return math.prod(self._sizes[symbol] for symbol in dims)

    def _bytes(self, dims: str, itemsize: int) -> int:
        return self._count(dims) * itemsize

    def inv(self, term: Tensor) -> Tensor:
        """Refuse: nothing is divided here."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Held:
    """A term of a sum; its bytes if the sum made it, as those of factors are counted elsewhere."""

    dims: str
    itemsize: int
    bytes: int


def _is_matmul(terms: Sequence[str], summed: str) -> bool:
    """Whether a step is a matrix product, without a tensor of all its dims."""
    if len(terms) != 2 or not summed:
        return False
    a, b = (set(term) for term in terms)
    return bool(a - b and b - a) and set(summed) <= a & b


def _named(dims: str, itemsize: int) -> Tensor:
    """Return an empty tensor that stands for one of some dims, whatever its size."""
    tensor = torch.empty(0)
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    tensor._itemsize = itemsize  # type: ignore[attr-defined]
    return tensor


def _itemsize(tensor: Tensor) -> int:
    itemsize: int = tensor._itemsize  # type: ignore[attr-defined]
    return itemsize
