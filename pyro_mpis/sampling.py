# SPDX-License-Identifier: Apache-2.0
r"""
Joint posterior samples: the contraction's steps, walked backwards.

Each step of the contraction sums a product of factors over some indices :math:`k_D`; given the
indices that remain, :math:`P_z(k_D \mid \cdot)` of (25) of [1] is the softmax of that product.
Those remaining indices are summed by later steps, so walking the steps from last to first draws
every index given the ones it depends on.

Equation (38) of [1] read literally draws each site given its generative parents; that is wrong
whenever two latents meet in one observation (a -> x <- b), where each depends on the other.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_mpis.contraction import Elimination, LogSpaceRing, aligned, contract, dims_of, packed
from pyro_mpis.factors import FactorGraph, SiteValue
from pyro_mpis.logspace import exp_

DRAW_ELEMENTS = 2**19  # probabilities that are looked at together

Drawn = Mapping[str, Tensor]  # index -> (N, *plates of the index), plates as tensor_plates has them


def sample_indices(graph: FactorGraph, num_draws: int) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Draw joint samples of all indices from :math:`P_z(k)`; draws random numbers.

    :return: the log evidence; for each index a long tensor ``(num_draws, *plates)``, with the
        plates of its ordinal as :meth:`~pyro_mpis.factors.FactorGraph.tensor_plates` lists them.
    """
    steps: list[Elimination] = []
    drawn: dict[str, Tensor] = {}
    with torch.no_grad():
        log_p = contract(graph, graph.factors, LogSpaceRing(graph, record=steps))
        for step in reversed(steps):
            drawn[step.symbol] = _draw_step(graph, step, drawn, num_draws)
    for symbol, plates in graph.index_plates.items():
        if symbol not in drawn:  # one particle, or an index that no factor distinguishes
            shape = [graph.sizes[s] for s in graph.tensor_plates(graph.closed(plates))]
            size = graph.sizes[symbol]
            drawn[symbol] = torch.randint(size, (num_draws, *shape), device=graph.device)
    return log_p, drawn


def sample_sites(graph: FactorGraph, num_draws: int) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Draw joint posterior samples of the model's latent sites; draws random numbers.

    :return: the log evidence; for each site ``(num_draws, *shape)``, the shape of an ordinary run.
    """
    log_p, drawn = sample_indices(graph, num_draws)
    return log_p, sites_at(graph, drawn, num_draws)


def sites_at(graph: FactorGraph, drawn: Drawn, num_draws: int) -> dict[str, Tensor]:
    """Return the values of the model's latent sites at given particles, as ordinary runs do."""
    return {name: _select(graph, value, drawn, num_draws) for name, value in graph.values.items()}


def _select(graph: FactorGraph, site: SiteValue, drawn: Drawn, num_draws: int) -> Tensor:
    """Select a site's value at the drawn indices."""
    plates = graph.tensor_plates(graph.closed(site.plates))
    value = graph.to_plates(site.tensor, plates, left=len(site.indices), right=site.event_dim)
    if site.indices:
        selection = [index_at(graph, drawn, symbol, plates) for symbol in site.indices]
        selection += [_positions(graph, symbol, plates) for symbol in plates]
        value = value[tuple(selection)]
    else:
        value = value.unsqueeze(0)
    value = value.expand((num_draws, *value.shape[1:]))
    return site.ordinary(graph.to_batch(value, plates, site.batch_shape, left=1), left=1)


def index_at(graph: FactorGraph, drawn: Drawn, symbol: str, plates: str) -> Tensor:
    """
    Return an index as seen from a deeper ordinal: (N, *plates), size one where it is the same.

    :param plates: the dims of the tensors of the deeper ordinal.
    """
    own = graph.tensor_plates(graph.closed(graph.index_plates[symbol]))
    return at_plates(graph, drawn[symbol], own, plates)


def at_plates(graph: FactorGraph, tensor: Tensor, own: str, plates: str) -> Tensor:
    """Bring ``(N, *own, *right)`` to ``(N, *plates, *right)``, gathering through ragged plates."""
    while not set(own) <= set(plates):
        tensor, own = _step_inwards(graph, tensor, own, plates)
    order = [1 + own.index(symbol) for symbol in plates if symbol in own]
    tensor = tensor.permute((0, *order, *range(1 + len(own), tensor.dim())))
    for position, symbol in enumerate(plates):
        if symbol not in own:
            tensor = tensor.unsqueeze(1 + position)
    return tensor


def _step_inwards(graph: FactorGraph, tensor: Tensor, own: str, plates: str) -> tuple[Tensor, str]:
    """Replace the plates around one ragged plate by the ragged plate."""
    deep = graph.closed(frozenset(plates))
    for inner, element_map in graph.nesting.items():
        around = [symbol for symbol in own if symbol in element_map.outer]
        if not inner <= deep or not around or inner <= set(own):
            continue
        rest = [symbol for symbol in own if symbol not in element_map.outer]
        layout = "".join([*rest, *(s for s in element_map.inner if s not in rest)])
        index = [
            aligned(packed(element_map.outer[symbol].clone(), element_map.inner), layout)
            if symbol in element_map.outer
            else _positions(graph, symbol, layout)
            for symbol in own
        ]
        everything: tuple[slice | Tensor, ...] = (slice(None), *index)
        return tensor[everything], layout
    raise AssertionError(f"no way from plates {own} to {plates}")


def _positions(graph: FactorGraph, plate: str, layout: str) -> Tensor:
    """Return the number of each element of a plate, along its dim among those of ``layout``."""
    numbers = torch.arange(graph.sizes[plate], device=graph.device)
    return aligned(packed(numbers, plate), layout)


def _draw_step(graph: FactorGraph, step: Elimination, drawn: Drawn, num_draws: int) -> Tensor:
    """Draw the index that one step sums over, given those of later steps: (N, *plates)."""
    plates = graph.tensor_plates(graph.closed(graph.index_plates[step.symbol]))
    sizes = [graph.sizes[symbol] for symbol in (*plates, step.symbol)]
    fixed = torch.zeros((1, *sizes), dtype=torch.double, device=graph.device)
    tables = []
    for term in step.terms:
        assert set(dims_of(term)) - set(graph.index_plates) <= set(plates), "summed in its plates"
        table = _Table(graph, term, step.symbol, plates, num_draws)
        if table.given:
            tables.append(table)
        else:
            fixed += aligned(term, plates + step.symbol)
    if not tables:
        return _categorical(fixed, num_draws)
    size = max(1, DRAW_ELEMENTS // fixed.numel())
    chunks = []
    for start in range(0, num_draws, size):
        part = {symbol: index[start : start + size] for symbol, index in drawn.items()}
        logits = fixed
        for table in tables:
            logits = logits + table.at(part)
        chunks.append(_categorical(logits, min(size, num_draws - start)))
    return torch.cat(chunks)


class _Table:
    """
    A term of a step, to be looked up at the indices drawn already.

    :param symbol: the index to draw.
    :param plates: those of the index to draw.
    """

    def __init__(
        self, graph: FactorGraph, term: Tensor, symbol: str, plates: str, num_draws: int
    ) -> None:
        own = dims_of(term)
        self.graph, self.plates = graph, plates
        self.given = [s for s in own if s in graph.index_plates and s != symbol]
        self.inside = [plate for plate in plates if plate in own]
        self.term = term.permute([own.index(s) for s in (*self.inside, *self.given, symbol)])
        looked_up = num_draws * math.prod(graph.sizes[s] for s in (*plates, symbol))
        if looked_up > self.term.numel():  # then rows of memory are worth a copy
            self.term = self.term.contiguous()

    def at(self, drawn: Drawn) -> Tensor:
        """Return the entries at drawn indices: (N, *plates, the dim to draw)."""
        selection = [_positions(self.graph, plate, self.plates) for plate in self.inside]
        selection += [index_at(self.graph, drawn, s, self.plates) for s in self.given]
        if not self.term.is_contiguous():
            return self.term[tuple(selection)]
        row = selection[0]
        for index, size in zip(selection[1:], self.term.shape[1:], strict=False):
            row = row * size + index
        rows = self.term.flatten(0, -2).index_select(0, row.flatten())
        return rows.reshape((*row.shape, rows.shape[-1]))


def _categorical(logits: Tensor, num_draws: int) -> Tensor:
    """
    Draw from the softmax over the last dim by inverting its distribution function.

    :param logits: ``(num_draws, *plates, categories)`` in float64, or with one for all draws.
    :return: ``(num_draws, *plates)``.
    """
    probs = exp_(logits - logits.amax(-1, keepdim=True))
    if len(logits) == 1:  # one distribution function, looked up by all draws
        cumulative = probs.squeeze(0).cumsum(-1)
        uniform = _uniform(cumulative[..., -1:].expand((*cumulative.shape[:-1], num_draws)))
        choice = torch.searchsorted(cumulative, uniform, right=True).movedim(-1, 0)
    else:  # categories first: a sum along the last dim is slow where there are few of them
        cumulative = probs.movedim(-1, 0).contiguous().cumsum(0)
        choice = (cumulative <= _uniform(cumulative[-1])).sum(0)
    return choice.clamp(max=logits.shape[-1] - 1)


def _uniform(highest: Tensor) -> Tensor:
    """Draw uniformly between zero and given numbers."""
    return torch.rand(highest.shape, dtype=highest.dtype, device=highest.device).mul_(highest)
