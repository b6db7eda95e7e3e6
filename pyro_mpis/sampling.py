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

DRAW_ELEMENTS = 2**22  # probabilities that are looked at together

Drawn = Mapping[str, Tensor]  # index -> (N, *plates of the index), plates as tensor_plates has them


def sample_indices(graph: FactorGraph, num_draws: int) -> dict[str, Tensor]:
    """
    Draw joint samples of all indices from :math:`P_z(k)`; draws random numbers.

    :return: for each index a long tensor ``(num_draws, *plates)``, with the plates of its ordinal
        as :meth:`~pyro_mpis.factors.FactorGraph.tensor_plates` lists them.
    """
    steps: list[Elimination] = []
    with torch.no_grad():
        contract(graph, graph.factors, LogSpaceRing(graph, record=steps))
        largest = max((_elements(graph, step) for step in steps), default=1)
        size = max(1, DRAW_ELEMENTS // largest)
        chunks = []
        for start in range(0, num_draws, size):
            chunk: dict[str, Tensor] = {}
            for step in reversed(steps):
                number = min(size, num_draws - start)
                chunk[step.symbol] = _draw_step(graph, step, chunk, number)
            chunks.append(chunk)
    drawn = {symbol: torch.cat([chunk[symbol] for chunk in chunks]) for symbol in chunks[0]}
    for symbol, plates in graph.index_plates.items():
        if symbol not in drawn:  # one particle, or an index that no factor distinguishes
            shape = [graph.sizes[s] for s in graph.tensor_plates(graph.closed(plates))]
            size = graph.sizes[symbol]
            drawn[symbol] = torch.randint(size, (num_draws, *shape), device=graph.device)
    return drawn


def sample_sites(graph: FactorGraph, num_draws: int) -> dict[str, Tensor]:
    """
    Draw joint posterior samples of the model's latent sites; draws random numbers.

    :return: for each site ``(num_draws, *shape)``, the shape of an ordinary run.
    """
    return sites_at(graph, sample_indices(graph, num_draws), num_draws)


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


def _elements(graph: FactorGraph, step: Elimination) -> int:
    """Return how many probabilities one draw takes at a step."""
    present = set("".join(dims_of(term) for term in step.terms))
    plates = (graph.sizes[symbol] for symbol in present if symbol not in graph.index_plates)
    return math.prod(plates) * graph.sizes[step.symbol]


def _draw_step(graph: FactorGraph, step: Elimination, drawn: Drawn, num_draws: int) -> Tensor:
    """Draw the index that one step sums over, given those of later steps: (N, *plates)."""
    plates = graph.tensor_plates(graph.closed(graph.index_plates[step.symbol]))
    total = torch.zeros((), device=graph.device)
    for term in step.terms:
        assert set(dims_of(term)) - set(graph.index_plates) <= set(plates), "summed in its plates"
        total = total + _at_drawn(graph, term, step.symbol, plates, drawn)
    sizes = [graph.sizes[symbol] for symbol in (*plates, step.symbol)]
    return _categorical(total.expand((total.shape[0], *sizes)), num_draws)


def _at_drawn(graph: FactorGraph, term: Tensor, symbol: str, plates: str, drawn: Drawn) -> Tensor:
    """Select a factor at the indices drawn already: (N or 1, *plates, the dim to draw)."""
    own = dims_of(term)
    given = [s for s in own if s in graph.index_plates and s != symbol]
    if not given:
        return aligned(term, plates + symbol).unsqueeze(0)
    own_plates = [plate for plate in plates if plate in own]
    term = term.permute([own.index(s) for s in (*given, *own_plates, symbol)])
    selection = [index_at(graph, drawn, s, plates) for s in given]
    selection += [_positions(graph, plate, plates) for plate in own_plates]
    return term[tuple(selection)]


def _categorical(logits: Tensor, num_draws: int) -> Tensor:
    """
    Draw from the softmax over the last dim by inverting its distribution function.

    :param logits: ``(num_draws, *plates, categories)``, or with one for all draws.
    :return: ``(num_draws, *plates)``.
    """
    logits = logits.double()
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    draws = (num_draws, 1) if len(logits) == num_draws else (1, num_draws)
    shape = (draws[0], *logits.shape[1:-1], draws[1])
    uniform = torch.rand(shape, dtype=logits.dtype, device=logits.device) * cumulative[..., -1:]
    choice = torch.searchsorted(cumulative, uniform, right=True)
    choice = choice.clamp(max=logits.shape[-1] - 1)
    return choice.transpose(0, -1).squeeze(-1) if draws[0] == 1 else choice.squeeze(-1)
