# SPDX-License-Identifier: Apache-2.0
"""
What is multiplied with what, and in which order the indices are summed.

First each term is added to a larger one that has all its dims (:func:`absorb`). What is left is
summed in steps (:func:`find_steps`): many dims at once where no tensor grows by it, as in a chain,
and then pair by pair in an order that opt_einsum finds. Steps that do not wait for one another form
a wave (:func:`in_waves`). The functions read shapes alone; no number decides an order.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import opt_einsum

from pyro_mpis.factor_graph.packed import union

MANY_TERMS = 64
MANY_DIMS = 16  # below, an order of pairwise steps is as good
# The largest step, in combinations, that may be taken early to share a round.
ROUND_COMBINATIONS = 2**16
ROUND_OF_GPU = 2**24
KEPT_ORDERS = 64


@dataclass(frozen=True)
class Step:
    """Multiply some operands, by number, and sum over some dims; the result has a number too."""

    operands: tuple[int, ...]
    summed: str
    result: int
    dims: str  # of the result


def all_steps(
    terms: Sequence[str], sum_dims: Set[str], sizes: Mapping[str, int], on_cpu: bool
) -> list[Step]:
    """
    Find all steps of a sum of products: what is absorbed, and what is summed.

    :param terms: the dims of each term.
    :param sum_dims: the dims to sum.
    :param sizes: of every dim.
    """
    absorbed = absorb(terms, sizes)
    steps = [step for step in absorbed if len(step.operands) > 1]
    return steps + find_steps(
        {step.result: step.dims for step in absorbed},
        sum_dims,
        sizes,
        limit=ROUND_COMBINATIONS if on_cpu else ROUND_OF_GPU,
        first_result=2 * len(terms),
    )


def absorb(terms: Sequence[str], sizes: Mapping[str, int]) -> list[Step]:
    """
    Add each term to the smallest other one that has all its dims.

    What is left is what an order of eliminations has to be found for. Terms of the same dims, of
    which there may be very many, are looked at as one: the time is linear in their number.

    :param terms: the dims of each.
    :param sizes: of every dim.
    :return: a step for each term that is left: it comes last among the operands. A step of a
        single operand is that operand.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for number, term in enumerate(terms):
        groups.setdefault(frozenset(term), []).append(number)
    holders: dict[str, set[frozenset[str]]] = {}
    for dims in groups:
        for symbol in dims:
            holders.setdefault(symbol, set()).add(dims)

    def size(dims: frozenset[str]) -> tuple[int, int]:
        return math.prod(sizes[symbol] for symbol in dims), groups[dims][0]

    by_size = sorted(groups, key=size)
    ranks = {dims: rank for rank, dims in enumerate(by_size)}
    for dims, after in zip(by_size, [*by_size[1:], None], strict=True):
        if dims:
            rarest = min((holders[symbol] for symbol in dims), key=len)
            target = min((d for d in rarest if dims < d), key=ranks.__getitem__, default=None)
        else:  # a scalar fits into any term: the next larger one takes it
            target = after
        if target is not None:
            groups[target] = groups.pop(dims) + groups[target]
            for symbol in dims:
                holders[symbol].remove(dims)
    return [
        Step(
            tuple(group),
            "",
            len(terms) + group[-1] if len(group) > 1 else group[-1],
            terms[group[-1]],
        )
        for group in sorted(groups.values(), key=lambda group: group[-1])
    ]


def find_steps(
    inputs: Mapping[int, str],
    sum_dims: Set[str],
    sizes: Mapping[str, int],
    *,
    limit: int,
    first_result: int,
) -> list[Step]:
    """
    Find what is contracted with what, and which dims each step sums.

    An order is searched once for the same dims and sizes: the queries of a run, and its blocks,
    take that of the evidence.

    :param inputs: the dims of each term, by its number.
    :param sum_dims: the dims to sum, those of other terms than these included.
    :param sizes: of every dim.
    :param limit: the largest step, in combinations, that may be taken early to share a round.
    :param first_result: the number of the first step's result; the next ones follow.
    """
    involved = sorted(set().union(*inputs.values()))
    found = _steps(
        tuple("".join(sorted(dims)) for dims in inputs.values()),
        frozenset(sum_dims & set(involved)),
        tuple((symbol, sizes[symbol]) for symbol in involved),
        limit,
    )
    numbers = [*inputs, *range(first_result, first_result + len(found))]
    return [
        replace(
            step,
            operands=tuple(numbers[operand] for operand in step.operands),
            result=numbers[step.result],
        )
        for step in found
    ]


@functools.lru_cache(maxsize=KEPT_ORDERS)
def _steps(
    inputs: tuple[str, ...],
    sum_dims: frozenset[str],
    sizes: tuple[tuple[str, int], ...],
    limit: int,
) -> tuple[Step, ...]:
    """Find steps where terms have the numbers of their places, and results those after."""
    terms, size = dict(enumerate(inputs)), dict(sizes)
    rounds = _rounds(terms, sum_dims, size, limit, len(inputs))
    used = {operand for step in rounds for operand in step.operands}
    dims = terms | {step.result: step.dims for step in rounds}
    left = {number: symbols for number, symbols in dims.items() if number not in used}
    return (*rounds, *_pairs(left, sum_dims, size, len(inputs) + len(rounds)))


def in_waves(steps: Sequence[Step]) -> list[list[Step]]:
    """Order steps into waves: the steps of one depend on earlier ones only."""
    level: dict[int, int] = {}
    waves: dict[int, list[Step]] = {}
    for step in steps:
        level[step.result] = 1 + max(level.get(operand, 0) for operand in step.operands)
        waves.setdefault(level[step.result], []).append(step)
    return [waves[number] for number in sorted(waves)]


def _rounds(
    inputs: Mapping[int, str],
    sum_dims: Set[str],
    sizes: Mapping[str, int],
    limit: int,
    first_result: int,
) -> list[Step]:
    """
    Sum many dims at once, as long as no tensor grows by it.

    Each round takes dims that no term has two of, every other one of a chain, so that a chain takes
    rounds to the number of the logarithm of its length. It is worth more multiplications than to go
    along the chain, not many more.
    """
    dims = dict(inputs)
    holders: dict[str, set[int]] = {}
    for number, symbols in inputs.items():
        for symbol in symbols:
            holders.setdefault(symbol, set()).add(number)
    left = [symbol for symbol in holders if symbol in sum_dims]
    steps: list[Step] = []
    while len(left) >= MANY_DIMS:
        taken = _round(left, holders, dims, sizes, limit, first_result + len(steps))
        steps += taken
        dims |= {step.result: step.dims for step in taken}
        for step in taken:
            for number in step.operands:
                for symbol in dims[number]:
                    holders[symbol].discard(number)
            for symbol in step.dims:
                holders[symbol].add(step.result)
        chosen = {symbol for step in taken for symbol in step.summed}
        is_last = len(chosen) < len(left) / 8  # a longer search would not be linear
        left = [symbol for symbol in left if symbol not in chosen]
        if is_last:
            break
    return steps


def _round(
    left: Sequence[str],
    holders: Mapping[str, Set[int]],
    dims: Mapping[int, str],
    sizes: Mapping[str, int],
    limit: int,
    first_result: int,
) -> list[Step]:
    """
    Find one round: dims of two terms each, no term with two of them.

    Where a dim has three terms, as a state of a chain whose observations read another global than
    its transitions do, the smallest is multiplied into one of the others first.

    :param left: the dims that are left to sum.
    :param holders: the terms that have each dim; ``dims`` are theirs.
    """
    steps: list[Step] = []
    taken: set[int] = set()
    for symbol in left:
        operands = sorted(holders[symbol])
        if len(operands) > 3 or not taken.isdisjoint(operands):
            continue
        merged = _merged(operands, dims, sizes) if len(operands) == 3 else ()
        terms = {number: dims[number] for number in operands if number not in merged}
        if merged:
            step = Step(
                merged, "", first_result + len(steps), union(*(dims[number] for number in merged))
            )
            terms[step.result] = step.dims
        inside = union(*terms.values())
        result_dims = inside.replace(symbol, "")
        largest = max(_size(symbols, sizes) for symbols in terms.values())
        if _size(inside, sizes) > limit or _size(result_dims, sizes) > largest:
            continue
        taken.update(operands)
        if merged:
            steps.append(step)
        steps.append(Step(tuple(terms), symbol, first_result + len(steps), result_dims))
    return steps


def _merged(
    operands: Sequence[int], dims: Mapping[int, str], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Return the smallest of some terms, and that which grows least by it."""
    small = min(operands, key=lambda number: _size(dims[number], sizes))
    others = [number for number in operands if number != small]
    return small, min(others, key=lambda n: _size(union(dims[n], dims[small]), sizes))


def _pairs(
    inputs: Mapping[int, str], sum_dims: Set[str], sizes: Mapping[str, int], first_result: int
) -> list[Step]:
    """Contract terms pair by pair, and sum each dim with the last pair that has it."""
    dims = dict(inputs)
    pending = list(inputs)
    uses = Counter(symbol for symbols in inputs.values() for symbol in symbols)
    steps: list[Step] = []
    for positions in _path(list(inputs.values()), sum_dims, sizes):
        operands = [pending.pop(position) for position in sorted(positions, reverse=True)]
        for operand in operands:
            uses.subtract(dims[operand])
        inside = union(*(dims[operand] for operand in operands))
        summed = "".join(s for s in inside if s in sum_dims and uses[s] == 0)
        result = first_result + len(steps)
        dims[result] = "".join(symbol for symbol in inside if symbol not in summed)
        steps.append(Step(tuple(operands), summed, result, dims[result]))
        pending.append(result)
        uses.update(dims[result])
    return steps


def _path(
    inputs: Sequence[str], sum_dims: Set[str], sizes: Mapping[str, int]
) -> list[tuple[int, ...]]:
    """
    Find an order of pairwise steps.

    A dim of very many terms, such as a global's in a long chain, is summed last whatever the order,
    but would make each of its terms a neighbour of all others: it is left out of the search.
    """
    if len(inputs) <= 2:
        return [tuple(range(len(inputs)))]
    uses = Counter(symbol for dims in inputs for symbol in dims)
    everywhere = {symbol for symbol, count in uses.items() if count > MANY_TERMS}
    inputs = ["".join(s for s in dims if s not in everywhere) for dims in inputs]
    output = "".join(symbol for symbol in union(*inputs) if symbol not in sum_dims)
    equation = ",".join(inputs) + "->" + output
    shapes = [tuple(sizes[symbol] for symbol in dims) for dims in inputs]
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
    return [tuple(step) for step in path]


def _size(dims: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[symbol] for symbol in dims)
