# SPDX-License-Identifier: Apache-2.0
r"""
Evidence by plated sum-product.

Eq. (18) of [1], with :math:`r_k` of (19) split into a small tensor per site as in (20)-(22):

.. math:: P(z) = K^{-n} \sum_{k_1 \dots k_n} \prod_i f_i(k_i, k_{\mathrm{pa}(i)}).

Plates are Pyro's: :func:`pyro.ops.contract.contract_to_tensor` (Obermeyer et al. 2019) eliminates
the indices of the innermost plates, multiplies over the plate and goes outwards. It takes a ring;
ours is :class:`LogSpaceRing`, which finds the order of eliminations with opt_einsum and sums with
the kernels of :mod:`pyro_mpis.logspace`. Products over plates, and messages after them, are in
float64.

A **ragged plate** is one whose every element reads one element of other plates through an index
array. Its ordinal contains those plates too, its tensors do not have their dims, and its product
adds up, for each element of the outer plates, the elements that read it.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import opt_einsum
import torch
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import Ring
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate
from pyro_mpis.logspace import log_matmul, logsumexp, sum_in_double

MANY_TERMS = 64
MANY_DIMS = 16  # below, an order of pairwise steps is as good
ROUND_COMBINATIONS = 2**16  # of a step that may be taken out of order to be taken with others
ROUND_OF_GPU = 2**24
STACK_ELEMENTS = 2**16  # of a term, above which stacking copies more than it saves
STACK = "\0"  # the dim of stacked terms: no symbol of an index or a plate


@dataclass(frozen=True)
class Elimination:
    """One step of a contraction: sum the product of ``terms`` over one dim."""

    terms: tuple[Tensor, ...]  # packed, each with that dim
    symbol: str


@dataclass(frozen=True)
class Step:
    """Multiply some operands, by number, and sum over ``dims``; the result has a number too."""

    operands: tuple[int, ...]
    dims: str
    result: int


class LogSpaceRing(Ring):
    """
    Sums and products of packed tensors in log space.

    :param graph: for the sizes of the dims and the ragged plates.
    :param record: where to note each elimination, one dim at a time and in order, for sampling.
    """

    def __init__(
        self,
        graph: FactorGraph,
        record: list[Elimination] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._dim_to_size = dict(graph.sizes)
        self._record = record

    def sumproduct(self, terms: Sequence[Tensor], dims: Iterable[str]) -> Tensor:
        """Multiply packed tensors and sum over ``dims``, pair by pair."""
        if not terms:
            return packed(torch.zeros((), dtype=self._graph.dtype, device=self._graph.device), "")
        steps = absorb(terms)
        inputs = [step.result for step in steps]
        owned = {step.result: dims_of(terms[step.operands[-1]]) for step in steps}
        steps = [step for step in steps if len(step.operands) > 1]
        steps += self._steps(inputs, owned, set(dims), first_result=2 * len(terms))
        known = dict(enumerate(terms))
        for wave in _waves(steps):
            for group in _alike(wave, known):
                known |= self._eliminate_all(group, known)
        (result,) = known.values()
        return result

    def _steps(
        self, inputs: Sequence[int], owned: dict[int, str], dims: set[str], *, first_result: int
    ) -> list[Step]:
        """
        Find what is contracted with what, and which dims each step sums.

        :param inputs: numbers of the terms; ``owned`` has their dims.
        """
        steps = self._rounds(inputs, owned, dims, first_result)
        used = {operand for step in steps for operand in step.operands}
        pending = [n for n in (*inputs, *(step.result for step in steps)) if n not in used]
        inputs = list(pending)
        uses = Counter(symbol for number in inputs for symbol in owned[number])
        for positions in self._path([owned[number] for number in inputs], dims):
            operands = [pending.pop(position) for position in sorted(positions, reverse=True)]
            for operand in operands:
                uses.subtract(owned[operand])
            inside = set("".join(owned[operand] for operand in operands))
            summed = "".join(sorted(s for s in inside & dims if uses[s] == 0))
            result = first_result + len(steps)
            steps.append(Step(tuple(operands), summed, result))
            pending.append(result)
            owned[result] = "".join(sorted(inside - set(summed)))
            uses.update(owned[result])
        return steps

    def _rounds(
        self, inputs: Sequence[int], owned: dict[int, str], dims: set[str], first_result: int
    ) -> list[Step]:
        """
        Sum many dims at once, as long as no tensor grows by it.

        Each round takes dims that no term has two of, every other one of a chain, so that a chain
        takes rounds to the number of the logarithm of its length. It is worth more
        multiplications than to go along the chain, not many more. Where a dim has three terms, as a
        state of a chain whose observations read another global than its transitions do, the
        smallest is multiplied into one of the others first.
        """
        limit = ROUND_COMBINATIONS if self._graph.device.type == "cpu" else ROUND_OF_GPU
        holders: dict[str, set[int]] = {}
        for number in inputs:
            for symbol in owned[number]:
                holders.setdefault(symbol, set()).add(number)
        left = [symbol for symbol in holders if symbol in dims]
        steps: list[Step] = []
        while len(left) >= MANY_DIMS:
            taken: set[int] = set()
            chosen = set()
            start = len(steps)
            for symbol in left:
                operands = sorted(holders[symbol])
                if len(operands) > 3 or not taken.isdisjoint(operands):
                    continue
                merged = self._merged(operands, owned) if len(operands) == 3 else None
                terms = [owned[number] for number in operands if not merged or number not in merged]
                if merged:
                    terms.append(_union(*(owned[number] for number in merged)))
                inside = _union(*terms)
                kept = inside.replace(symbol, "")
                if self._size(inside) > limit or self._size(kept) > max(map(self._size, terms)):
                    continue
                taken.update(operands)
                chosen.add(symbol)
                if merged:
                    steps.append(Step(merged, "", first_result + len(steps)))
                    owned[steps[-1].result] = terms[-1]
                    operands = [n for n in operands if n not in merged] + [steps[-1].result]
                steps.append(Step(tuple(operands), symbol, first_result + len(steps)))
                owned[steps[-1].result] = kept
            if not chosen:
                break
            for step in steps[start:]:
                for number in step.operands:
                    for symbol in owned[number]:
                        holders[symbol].discard(number)
                for symbol in owned[step.result]:
                    holders[symbol].add(step.result)
            done = len(chosen) < len(left) / 8  # a longer search would not be linear
            left = [symbol for symbol in left if symbol not in chosen]
            if done:
                break
        return steps

    def _merged(self, operands: Sequence[int], owned: Mapping[int, str]) -> tuple[int, int]:
        """Return the smallest of some terms, and that which grows least by it."""
        small = min(operands, key=lambda number: self._size(owned[number]))
        others = [number for number in operands if number != small]
        return small, min(others, key=lambda n: self._size(_union(owned[n], owned[small])))

    def _size(self, dims: str) -> int:
        return math.prod(self._dim_to_size[symbol] for symbol in dims)

    def _path(self, inputs: Sequence[str], dims: set[str]) -> list[tuple[int, ...]]:
        """
        Find an order of pairwise steps.

        A dim of very many terms, such as a global's in a long chain, is summed last whatever the
        order, but would make each of its terms a neighbour of all others: it is left out of the
        search.
        """
        if len(inputs) <= 2:
            return [tuple(range(len(inputs)))]
        uses = Counter(symbol for own in inputs for symbol in own)
        everywhere = {symbol for symbol, count in uses.items() if count > MANY_TERMS}
        inputs = ["".join(s for s in own if s not in everywhere) for own in inputs]
        output = "".join(sorted(set("".join(inputs)) - dims))
        equation = ",".join(inputs) + "->" + output
        shapes = [tuple(self._dim_to_size[symbol] for symbol in own) for own in inputs]
        path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
        return [tuple(step) for step in path]

    def _eliminate_all(self, steps: Sequence[Step], known: dict[int, Tensor]) -> dict[int, Tensor]:
        """Take steps that are alike: as one on stacked terms, if they are several."""
        terms = [[known.pop(operand) for operand in step.operands] for step in steps]
        if self._record is not None:
            return {
                step.result: self._eliminate_one_by_one(operands, step.dims)
                for step, operands in zip(steps, terms, strict=True)
            }
        first = steps[0]
        if len(steps) == 1:
            return {first.result: sum_product(terms[0], first.dims)}
        stacked = [
            packed(torch.stack([own[place] for own in terms]), STACK + dims_of(terms[0][place]))
            for place in range(len(first.operands))
        ]
        result = sum_product(stacked, first.dims)
        layout = dims_of(result).replace(STACK, "")
        result = aligned(result, STACK + layout)
        canonical = _renaming([dims_of(term) for term in terms[0]])
        results = {}
        for step, operands, part in zip(steps, terms, result.unbind(), strict=True):
            back = {v: k for k, v in _renaming([dims_of(term) for term in operands]).items()}
            results[step.result] = packed(part, "".join(back[canonical[s]] for s in layout))
        return results

    def _eliminate_one_by_one(self, terms: Sequence[Tensor], dims: str) -> Tensor:
        """Sum over one dim after the other and note each, so that each can be drawn by itself."""
        assert self._record is not None
        pending = list(terms)
        for symbol in sorted(dims, key=lambda s: sum(s in dims_of(term) for term in terms)):
            involved = [term for term in pending if symbol in dims_of(term)]
            pending = [term for term in pending if symbol not in dims_of(term)]
            self._record.append(Elimination(tuple(involved), symbol))
            pending.append(sum_product(involved, symbol))
        return sum_product(pending, "")

    def product(self, term: Tensor, ordinal: Ordinal) -> Tensor:
        """Multiply a packed tensor over the plates of ``ordinal``."""
        own = frozenset(dims_of(term))
        for inner, element_map in self._graph.ragged.items():
            outer = frozenset(element_map.outer)
            if inner <= own and inner & ordinal and self._graph.with_enclosing(outer) - ordinal:
                term = regroup(term, inner & ordinal, element_map, outer, self._graph.sizes)
                return self.product(term, ordinal)
        positions = [place for place, symbol in enumerate(dims_of(term)) if symbol in ordinal]
        if not positions:
            return term
        kept = "".join(symbol for symbol in dims_of(term) if symbol not in ordinal)
        return packed(sum_in_double(term, positions), kept)

    def inv(self, term: Tensor) -> Tensor:
        """Refuse: nothing is divided here."""
        raise NotImplementedError


def log_evidence(graph: FactorGraph, factors: Sequence[LogFactor] | None = None) -> Tensor:
    """
    Estimate the log evidence: sum over every index, multiply over every plate.

    The exponential of the result is unbiased; the result itself is biased low. Pure: draws
    nothing, changes nothing.

    :param factors: in place of the graph's own, for example with source terms added.
    :return: a scalar in nats, differentiable in every factor.
    :raises NotImplementedError: if plates cross: the cost would be exponential in their size.
    """
    return contract(graph, graph.factors if factors is None else factors, LogSpaceRing(graph))


def reduced(graph: FactorGraph) -> FactorGraph:
    """Sum the log factors over the plates that hold no index: so are those of observations."""
    occupied = frozenset[str]().union(*map(graph.with_enclosing, graph.index_plates.values()))
    for inner, element_map in graph.ragged.items():
        occupied |= inner | frozenset(element_map.outer)
    factors = tuple(over_plates(factor, factor.plates - occupied) for factor in graph.factors)
    return replace(graph, factors=factors)


def over_plates(factor: LogFactor, plates: Ordinal) -> LogFactor:
    """Multiply a factor over plates that hold none of its indices: sum its log."""
    positions = [place for place, symbol in enumerate(factor.dims) if symbol in plates]
    if not positions:
        return factor
    dims = "".join(symbol for symbol in factor.dims if symbol not in plates)
    tensor = sum_in_double(factor.tensor, positions)
    return LogFactor(factor.name, tensor, dims, factor.plates - plates)


def contract(graph: FactorGraph, factors: Sequence[LogFactor], ring: LogSpaceRing) -> Tensor:
    """Contract log factors to a scalar with the given ring."""
    tree: OrderedDict[Ordinal, list[Tensor]] = OrderedDict()
    used: set[str] = set()
    for factor in factors:
        tensor = packed(factor.tensor.view_as(factor.tensor), factor.dims)
        tree.setdefault(graph.with_enclosing(factor.plates), []).append(tensor)
        used |= set(factor.dims)
    sum_dims = used & set(graph.index_plates)
    _check_crossing(graph, factors)
    result: Tensor = contract_to_tensor(tree, sum_dims, ring=ring)
    return result


def _union(*dims: str) -> str:
    """Return the dims that any of some tensors has."""
    return "".join(sorted(set("".join(dims))))


def _waves(steps: Sequence[Step]) -> list[list[Step]]:
    """Order steps into waves: the steps of one depend on earlier ones only."""
    level: dict[int, int] = {}
    waves: dict[int, list[Step]] = {}
    for step in steps:
        level[step.result] = 1 + max(level.get(operand, 0) for operand in step.operands)
        waves.setdefault(level[step.result], []).append(step)
    return [waves[number] for number in sorted(waves)]


def _alike(steps: Sequence[Step], known: Mapping[int, Tensor]) -> list[list[Step]]:
    """Group steps that are the same but for the names of their dims, as those of a chain are."""
    if len(steps) == 1:
        return [list(steps)]
    groups: dict[object, list[Step]] = {}
    for step in steps:
        terms = [known[operand] for operand in step.operands]
        if max(term.numel() for term in terms) > STACK_ELEMENTS:
            groups[step.result] = [step]
            continue
        names = _renaming([dims_of(term) for term in terms])
        shape = tuple(
            (tuple(names[s] for s in dims_of(term)), term.shape, term.dtype) for term in terms
        )
        groups.setdefault((shape, tuple(sorted(names[s] for s in step.dims))), []).append(step)
    return list(groups.values())


def _renaming(dims: Sequence[str]) -> dict[str, int]:
    """Return the number of each symbol in the order of their first appearance."""
    return {symbol: number for number, symbol in enumerate(dict.fromkeys("".join(dims)))}


def absorb(terms: Sequence[Tensor]) -> list[Step]:
    """
    Add each packed tensor to the smallest other one that has all its dims.

    What is left is what an order of eliminations has to be found for.

    :return: a step for each tensor that is left: it comes last among the operands. A step of a
        single operand is that operand.
    """
    holders: dict[str, set[int]] = {}
    for number, term in enumerate(terms):
        for symbol in dims_of(term):
            holders.setdefault(symbol, set()).add(number)
    parts = {number: [number] for number in range(len(terms))}
    order = sorted(parts, key=lambda number: terms[number].numel())
    for position, number in enumerate(order):
        own = dims_of(terms[number])
        if own:
            rarest = min((holders[symbol] for symbol in own), key=len)
            larger = [n for n in rarest if n != number and set(own) <= set(dims_of(terms[n]))]
        else:  # a number goes with anything: with the next in size
            larger = order[position + 1 : position + 2]
        if larger:
            target = min(larger, key=lambda n: (terms[n].numel(), n))
            parts[target] = parts.pop(number) + parts[target]
            for symbol in own:
                holders[symbol].remove(number)
    return [
        Step(tuple(group), "", len(terms) + number if len(group) > 1 else number)
        for number, group in parts.items()
    ]


def sum_product(terms: Sequence[Tensor], dims: str) -> Tensor:
    """
    Multiply packed tensors in log space and sum over ``dims``.

    A genuine matrix product goes through :func:`~pyro_mpis.logspace.log_matmul`; where one tensor
    has every dim, add and log-sum-exp.
    """
    uses = Counter(symbol for term in terms for symbol in dims_of(term))
    terms = [_without_own(term, "".join(s for s in dims if uses[s] == 1)) for term in terms]
    dims = "".join(symbol for symbol in dims if uses[symbol] > 1)
    every = sorted(set("".join(dims_of(term) for term in terms)))
    kept = "".join(symbol for symbol in every if symbol not in dims)
    if len(terms) == 2 and dims:
        a, b = terms
        only_a = "".join(s for s in dims_of(a) if s not in dims_of(b) and s not in dims)
        only_b = "".join(s for s in dims_of(b) if s not in dims_of(a) and s not in dims)
        if only_a and only_b and set(dims) <= set(dims_of(a)) & set(dims_of(b)):
            return _matmul(a, b, only_a, only_b, dims)
    layout = kept + dims
    total = aligned(terms[0], layout)
    for term in terms[1:]:
        total = total + aligned(term, layout)
    return packed(logsumexp(total, len(dims)), kept)


def _without_own(term: Tensor, dims: str) -> Tensor:
    """Sum a term over those of ``dims`` that it has: dims of no other term."""
    own = [symbol for symbol in dims if symbol in dims_of(term)]
    if not own:
        return term
    kept = "".join(symbol for symbol in dims_of(term) if symbol not in own)
    return packed(logsumexp(aligned(term, kept + "".join(own)), len(own)), kept)


def _matmul(a: Tensor, b: Tensor, only_a: str, only_b: str, dims: str) -> Tensor:
    batch = "".join(s for s in dims_of(a) if s in dims_of(b) and s not in dims)
    if a.numel() < b.numel():  # the larger one's rows can be worked on in parts
        a, b, only_a, only_b = b, a, only_b, only_a
    left = aligned(a, batch + only_a + dims)
    right = aligned(b, batch + dims + only_b)
    shape = left.shape[: len(batch + only_a)] + right.shape[len(batch + dims) :]
    left = left.flatten(len(batch + only_a)).flatten(len(batch), -2)
    right = right.flatten(len(batch + dims)).flatten(len(batch), -2)
    return packed(log_matmul(left, right).reshape(shape), batch + only_a + only_b)


def aligned(term: Tensor, layout: str) -> Tensor:
    """View a packed tensor with the dims of ``layout``, size one where it has none of its own."""
    own = dims_of(term)
    term = term.permute([own.index(symbol) for symbol in layout if symbol in own])
    for position, symbol in enumerate(layout):
        if symbol not in own:
            term = term.unsqueeze(position)
    return term


def regroup(
    term: Tensor,
    summed: Iterable[str],
    element_map: RaggedPlate,
    outer: Iterable[str],
    sizes: Mapping[str, int],
) -> Tensor:
    """
    Add up, for each element of the ``outer`` plates, the ``summed`` elements that read it.

    :param term: packed, with every dim of ``element_map.inner``.
    :param summed: plates to eliminate; those of ``element_map.inner`` that are left stay.
    :param outer: plates of the map that the result has.
    :return: packed, float64.
    """
    inner = element_map.inner
    summed = "".join(symbol for symbol in inner if symbol in set(summed))
    batch = "".join(symbol for symbol in inner if symbol not in summed)
    outer = "".join(sorted(outer))
    rest = "".join(symbol for symbol in dims_of(term) if symbol not in inner)
    target = torch.zeros((), dtype=torch.long, device=term.device)
    for symbol in outer:
        target = target * sizes[symbol] + element_map.outer[symbol]
    target = packed(target, inner)
    shape = [sizes[symbol] for symbol in batch]
    flat_target = aligned(target, batch + summed).unsqueeze(-1).flatten(len(batch))
    flat_term = aligned(term, rest + batch + summed).unsqueeze(-1).flatten(len(rest + batch))
    flat_term = flat_term.double()  # (*rest, *batch, elements)
    sizes_of_rest = list(flat_term.shape[: len(rest)])
    num_outer = int(torch.Size([sizes[symbol] for symbol in outer]).numel())
    result = flat_term.new_zeros([*sizes_of_rest, *shape, num_outer])
    result = result.scatter_add(-1, flat_target.expand(flat_term.shape), flat_term)
    result = result.reshape([*sizes_of_rest, *shape, *(sizes[symbol] for symbol in outer)])
    return packed(result, rest + batch + outer)


def packed(tensor: Tensor, dims: str) -> Tensor:
    """Name the dims of a tensor, by Pyro's convention; the next operation forgets them."""
    assert tensor.dim() == len(dims)
    tensor._pyro_dims = dims  # type: ignore[attr-defined]
    return tensor


def dims_of(tensor: Tensor) -> str:
    """Return the names of a packed tensor's dims."""
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    return dims


def _check_crossing(graph: FactorGraph, factors: Sequence[LogFactor]) -> None:
    """Refuse a factor that reads two latents of plates of which neither contains the other."""
    for factor in factors:
        inside = {
            s: graph.with_enclosing(graph.index_plates[s])
            for s in factor.dims
            if s in graph.index_plates
        }
        for a, plates_a in inside.items():
            for b, plates_b in inside.items():
                if plates_a <= plates_b or plates_b <= plates_a:
                    continue
                one, other = (
                    ", ".join(sorted(repr(graph.plate_names[p]) for p in plates))
                    for plates in (plates_a - plates_b, plates_b - plates_a)
                )
                raise NotImplementedError(
                    f"site '{factor.name}': it reads {graph.index_sites[a]} of plate {one} and "
                    f"{graph.index_sites[b]} of plate {other}. These plates cross: every element "
                    "of one meets every element of the other, and the exact sum is exponential in "
                    "their size. Give one of the sites a single particle index: draw it with "
                    ".to_event(1) outside its plate, in guide and model, or put it into a group "
                    "with a site outside the plate."
                )
