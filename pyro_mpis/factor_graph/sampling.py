# SPDX-License-Identifier: Apache-2.0
r"""
Joint posterior samples: the contraction's steps, walked backwards.

Samples are of :math:`P_z(k)`, (25) of [1]. As in (36)-(37) there, it is taken apart into
distributions of one index given others. Each step of the contraction sums a product of factors over
an index :math:`k_D`; given the indices that remain, :math:`P_z(k_D \mid \cdot)` is the softmax of
that product. Those remaining indices are summed by later steps, so walking the steps from last to
first draws every index given the ones it depends on.

Equation (38) read literally draws each site given its generative parents; that is wrong whenever
two latents meet in one observation (a -> x <- b), where each depends on the other. The paper gets
its conditional probabilities by differentiating, (39)-(42). Here they are shares of the terms that
the contraction has summed, and nothing is differentiated.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_mpis.factor_graph.evidence import Elimination, LogSpaceRing, Record, contract
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.logspace import cuts, exp_, finite, running_total
from pyro_mpis.factor_graph.packed import aligned, dims_of
from pyro_mpis.factor_graph.selection import Drawn, index_at, positions_in, sites_at

DRAW_ELEMENTS = 2**18  # probabilities that are looked at together
LARGEST_NUMBER = 2**62  # of combinations that an integer can number
Distinct: TypeAlias = tuple[dict[str, Tensor], Tensor]
# Of the indices of draws that are held at once: in large plates they take twice the draws.
BYTES_OF_INDICES = 2**27
LOST = 1e-20  # below this a sum of products of single precision has lost terms to underflow


@dataclass(frozen=True)
class ForwardPass:
    """A contraction that has been done, with the steps that draws walk back."""

    log_evidence: Tensor
    steps: tuple[Elimination, ...]


def forward_pass(graph: FactorGraph, most: float = math.inf) -> tuple[Tensor, ForwardPass | None]:
    """
    Contract a factor graph.

    :param most: how many bytes of messages to keep for draws, beside the factors.
    :return: the log evidence; the pass, None if its messages take more.
    """
    record = Record(graph.factors, most)
    with torch.no_grad():
        log_p = contract(graph, graph.factors, LogSpaceRing(graph, record=record))
    return log_p, None if record.steps is None else ForwardPass(log_p, tuple(record.steps))


def sample_indices(
    graph: FactorGraph, num_draws: int, forward: ForwardPass | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Draw joint samples of all indices from :math:`P_z(k)`; draws random numbers.

    :param forward: the graph's, if it has been kept.
    :return: the log evidence; for each index a long tensor ``(num_draws, *plates)``, with the
        plates of its ordinal as :meth:`FactorGraph.tensor_plates` lists them.
    """
    if forward is None:
        _, forward = forward_pass(graph)
        assert forward is not None, "whatever it takes"
    drawn: dict[str, Tensor] = {}
    with torch.no_grad():
        for step in reversed(forward.steps):
            drawn |= _draw_step(graph, step, drawn, num_draws)
    for symbol, plates in graph.index_plates.items():
        if symbol not in drawn:  # one particle, or an index that no factor distinguishes
            shape = [graph.sizes[s] for s in graph.tensor_plates(graph.with_enclosing(plates))]
            size = graph.sizes[symbol]
            drawn[symbol] = torch.randint(size, (num_draws, *shape), device=graph.device)
    return forward.log_evidence, drawn


def sample_sites(
    graph: FactorGraph, num_draws: int, forward: ForwardPass | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Draw joint posterior samples of the model's latent sites; draws random numbers.

    :return: the log evidence; for each site ``(num_draws, *shape)``, the shape of an ordinary run.
    """
    size = max(1, BYTES_OF_INDICES // max(1, _bytes_of_draw(graph)))
    if num_draws <= size:
        log_p, drawn = sample_indices(graph, num_draws, forward)
        return log_p, sites_at(graph, drawn, num_draws)
    if forward is None:
        _, forward = forward_pass(graph)
    result: dict[str, Tensor] = {}
    for start in range(0, num_draws, size):
        number = min(size, num_draws - start)
        log_p, drawn = sample_indices(graph, number, forward)
        for name, value in sites_at(graph, drawn, number).items():
            if name not in result:
                result[name] = value.new_empty((num_draws, *value.shape[1:]))
            result[name][start : start + number] = value
    return log_p, result


def _bytes_of_draw(graph: FactorGraph) -> int:
    """Return what the indices of one draw take."""
    elements = 0
    for plates in graph.index_plates.values():
        dims = graph.tensor_plates(graph.with_enclosing(plates))
        elements += math.prod(graph.sizes[symbol] for symbol in dims)
    return elements * torch.long.itemsize


def _draw_step(
    graph: FactorGraph, step: Elimination, drawn: Drawn, num_draws: int
) -> dict[str, Tensor]:
    """
    Draw the indices that one step sums over, given those of later steps (37): each (N, *plates).

    Several indices of a step are drawn together, as one that runs over their combinations. Summed
    one after the other, the first would leave a tensor of all the others, which no step has.
    """
    summed = step.summed
    plates = graph.tensor_plates(graph.with_enclosing(graph.index_plates[summed[0]]))
    inside = {s for term in step.terms for s in dims_of(term)} - set(summed)
    given = inside & set(graph.index_plates)
    assert inside - given <= set(plates), "summed in its plates"
    if given:
        chosen = _draw_given(graph, step, plates, given, drawn, num_draws)
    else:
        log_product = _log_product(step.terms, plates + summed)
        chosen = _same_for_all(log_product.flatten(len(plates)), num_draws)
    result = {}
    for symbol in reversed(summed[1:]):
        result[symbol] = chosen % graph.sizes[symbol]
        chosen = chosen // graph.sizes[symbol]
    return {**result, summed[0]: chosen}


def _draw_given(
    graph: FactorGraph,
    step: Elimination,
    plates: str,
    given: Set[str],
    drawn: Drawn,
    num_draws: int,
) -> Tensor:
    """Draw the number of a combination of a step's indices: (N, *plates)."""
    shape = [graph.sizes[plate] for plate in plates]
    indices = {s: index_at(graph, drawn, s, plates) for s in given}
    positions = {s: positions_in(graph, s, plates).unsqueeze(0) for s in plates}
    tables = [_Table(graph, term, step.summed, plates, num_draws) for term in step.terms]
    chosen = torch.empty((num_draws, *shape), dtype=torch.long, device=graph.device)
    # Cut along plates first: the draws of one element look up few rows, which stay in the cache.
    order = (*range(1, chosen.dim()), 0)
    combinations = math.prod(graph.sizes[symbol] for symbol in step.summed)
    differing = [
        dim for dim in range(chosen.dim()) if any(i.shape[dim] > 1 for i in indices.values())
    ]
    known: Distinct | None = None
    place: list[slice] = []
    for part in cuts(chosen.shape, order, DRAW_ELEMENTS // combinations):
        at = {s: _cut(index, part) for s, index in indices.items()}
        here = {s: _cut(index, part) for s, index in positions.items()}
        if place != [part[dim] for dim in differing]:  # parts in a row are often given the same
            place = [part[dim] for dim in differing]
            known = _distinct(graph, at)
        chosen[part] = _draw(tables, at, here, known, chosen[part].shape)
    return chosen


def _draw(
    tables: Sequence["_Table"], given: Drawn, here: Drawn, known: Distinct | None, shape: torch.Size
) -> Tensor:
    """
    Draw from the product of rows of tables, by inverting its distribution function.

    Where all plate elements are given the same, many draws often are too: then a distribution
    function is found once for all of these.

    :param given: the indices that the draws are given: (N, *plates), size one where they are same.
    :param here: the numbers of the plate elements, likewise.
    :param known: what differs among the given, and the number of each draw's own.
    :param shape: (N, *plates).
    """
    if known is None:
        return _inverted(_cumulative(tables, {**given, **here}, shape))
    distinct, numbers = known
    rows = len(next(iter(distinct.values())))
    cumulative = _cumulative(tables, {**distinct, **here}, torch.Size((rows, *shape[1:])))
    return _inverted(cumulative.index_select(1, numbers))


def _distinct(graph: FactorGraph, given: Drawn) -> Distinct | None:
    """
    Return what differs among the draws' given indices, and the number of each draw's own.

    :return: None where plate elements are given others, or where most draws differ.
    """
    draws = next(iter(given.values())).shape[0]
    combinations = math.prod(graph.sizes[symbol] for symbol in given)
    if any(index.numel() > draws for index in given.values()) or combinations > LARGEST_NUMBER:
        return None
    number = torch.zeros(draws, dtype=torch.long, device=graph.device)
    for symbol, index in given.items():
        number = number * graph.sizes[symbol] + index.reshape(-1)
    differing, numbers = number.unique(return_inverse=True)
    if 2 * len(differing) > draws:
        return None
    distinct = {}
    for symbol, index in reversed([*given.items()]):
        distinct[symbol] = (differing % graph.sizes[symbol]).reshape(-1, *index.shape[1:])
        differing = differing // graph.sizes[symbol]
    return distinct, numbers


def _cumulative(tables: Sequence["_Table"], at: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """
    Return distribution functions of the product of rows of tables: (combinations, *shape).

    Where the largest entries of the rows do not meet, so that products underflow, their logarithms
    are added up instead. Shares are in float32: a probability is off by some 1e-7, of no account
    for draws that can be counted, and one of zero stays zero.
    """
    shares = tables[0].shares(at)
    for table in tables[1:]:
        shares = shares * table.shares(at)
    cumulative = running_total(_of_combinations(shares, shape), 0)
    lost = ~(cumulative[-1] > LOST)
    if bool(lost.any()):
        here = {symbol: index.expand(shape)[lost] for symbol, index in at.items()}
        logits = tables[0].logs(here).double()
        for table in tables[1:]:
            logits = logits + table.logs(here)
        logits = _of_combinations(logits, logits.shape[-1:])
        total = running_total(exp_(logits - logits.amax(0)), 0)
        cumulative[:, lost] = total.to(cumulative.dtype)
    return cumulative


def _of_combinations(rows: Tensor, shape: torch.Size) -> Tensor:
    """Bring ``(*dims to draw, *shape)`` to ``(combinations, *shape)``, expanded to the shape."""
    left = rows.dim() - len(shape)
    return rows.expand(*rows.shape[:left], *shape).flatten(0, left - 1)


def _log_product(terms: Sequence[Tensor], layout: str) -> Tensor:
    """Multiply packed terms, in double precision."""
    log_product = aligned(terms[0], layout).double()
    for term in terms[1:]:
        log_product = log_product + aligned(term, layout)
    return log_product


def _cut(index: Tensor, part: Sequence[slice]) -> Tensor:
    """Cut out a part of an index, which has size one in the plates that it is not in."""
    sizes = zip(part, index.shape, strict=True)
    return index[tuple(slices if size > 1 else slice(None) for slices, size in sizes)]


class _Table:
    """
    A term of a step, to be looked up at plate elements and at the indices drawn already.

    A row of it has a dim for each of ``summed``, of size one where the term lacks it.

    :param summed: the indices to draw.
    :param plates: those of the indices to draw.
    """

    def __init__(
        self, graph: FactorGraph, term: Tensor, summed: str, plates: str, num_draws: int
    ) -> None:
        self.sizes = graph.sizes
        self.num_summed = len(summed)
        left = set(dims_of(term)) - set(summed)
        self.dims = "".join(sorted(left, key=lambda s: (s not in plates, s)))
        self.term = aligned(term, summed + self.dims)
        self.row_shape = self.term.shape[: len(summed)]
        looked_up = num_draws * self.row_shape.numel()
        looked_up *= math.prod(graph.sizes[symbol] for symbol in plates)
        exponentiated = looked_up > term.numel()  # then each row is worth its exponentials
        self.all_shares = (
            _relative(self.term, len(summed)).reshape(self.row_shape.numel(), -1)
            if exponentiated
            else None
        )

    def shares(self, at: Mapping[str, Tensor]) -> Tensor:
        """Return rows divided by their largest entries: (*dims to draw, N, *plates), float32."""
        if self.all_shares is None:
            return _relative(self.logs(at), self.num_summed)
        row = self._row(at)
        rows = self.all_shares.index_select(1, row.flatten())
        return rows.view(*self.row_shape, *row.shape)

    def logs(self, at: Mapping[str, Tensor]) -> Tensor:
        """Return rows as they are, log scale: (*dims to draw, N, *plates)."""
        if not self.dims:
            return self.term.reshape(*self.row_shape, *(1,) * _num_dims(at))
        rows: list[slice | Tensor] = [slice(None)] * self.num_summed
        return self.term[tuple(rows + [at[symbol] for symbol in self.dims])]

    def _row(self, at: Mapping[str, Tensor]) -> Tensor:
        """Return the number of the row: (N, *plates), size one where it is the same."""
        row = torch.zeros((1,) * _num_dims(at), dtype=torch.long, device=self.term.device)
        for symbol in self.dims:
            row = row * self.sizes[symbol] + at[symbol]
        return row


def _num_dims(at: Mapping[str, Tensor]) -> int:
    return next(iter(at.values())).dim()


def _relative(logs: Tensor, num_dims: int) -> Tensor:
    """Divide by the largest along the first dims: from log scale to linear, float32."""
    highest = logs.amax(tuple(range(num_dims)))
    return exp_((logs - finite(highest)).float())


def _inverted(cumulative: Tensor) -> Tensor:
    """Draw by inverting distribution functions, (categories, *rest), to (*rest)."""
    uniform = torch.rand(cumulative.shape[1:], dtype=cumulative.dtype, device=cumulative.device)
    is_below = cumulative[:-1] <= uniform.mul_(cumulative[-1])
    few = len(cumulative) <= torch.iinfo(torch.int8).max
    return is_below.view(torch.int8).sum(0, dtype=torch.int8 if few else torch.long)


def _same_for_all(logits: Tensor, num_draws: int) -> Tensor:
    """Draw from the same distributions again and again: (*plates, categories) to (N, *plates)."""
    cumulative = running_total(exp_(logits - logits.amax(-1, keepdim=True)), -1)
    shape = (*cumulative.shape[:-1], num_draws)
    uniform = torch.rand(shape, dtype=cumulative.dtype, device=cumulative.device)
    uniform.mul_(cumulative[..., -1:])
    choice = torch.searchsorted(cumulative, uniform, right=True).movedim(-1, 0)
    return choice.clamp(max=logits.shape[-1] - 1)
