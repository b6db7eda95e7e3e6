# SPDX-License-Identifier: Apache-2.0
"""
Values at chosen particles: :math:`z^k` of one k, or of many draws of k.

An index is chosen for each element of its own plates. A site in deeper plates sees it from there:
along plates that enclose its own the choice is the same, and through a ragged plate it is that of
the element which is read.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_mpis.factor_graph.graph import FactorGraph, SiteValue
from pyro_mpis.factor_graph.packed import aligned, packed

Drawn = Mapping[str, Tensor]  # index -> (N, *plates of the index), plates as tensor_plates has them


def sites_at(graph: FactorGraph, drawn: Drawn, num_draws: int) -> dict[str, Tensor]:
    """Return the values of the model's latent sites at given particles, as ordinary runs do."""
    return {name: _select(graph, value, drawn, num_draws) for name, value in graph.values.items()}


def index_at(graph: FactorGraph, drawn: Drawn, symbol: str, plates: str) -> Tensor:
    """
    Return an index as seen from a deeper ordinal: (N, *plates), size one where it is the same.

    :param plates: the dims of the tensors of the deeper ordinal.
    """
    present = graph.tensor_plates(graph.with_enclosing(graph.index_plates[symbol]))
    return at_plates(graph, drawn[symbol], present, plates)


def at_plates(graph: FactorGraph, tensor: Tensor, present: str, plates: str) -> Tensor:
    """
    Bring ``(N, *present, *right)`` to ``(N, *plates, *right)``, gathering through ragged plates.

    :param present: the plates that the tensor has dims for.
    :param plates: those that the result has, of size one where it is the same for all elements.
    """
    while not set(present) <= set(plates):
        tensor, present = _step_inwards(graph, tensor, present, plates)
    order = [1 + present.index(symbol) for symbol in plates if symbol in present]
    tensor = tensor.permute((0, *order, *range(1 + len(present), tensor.dim())))
    for position, symbol in enumerate(plates):
        if symbol not in present:
            tensor = tensor.unsqueeze(1 + position)
    return tensor


def positions_in(graph: FactorGraph, plate: str, layout: str) -> Tensor:
    """Return the number of each element of a plate, along its dim among those of ``layout``."""
    numbers = torch.arange(graph.sizes[plate], device=graph.device)
    return aligned(packed(numbers, plate), layout)


def _select(graph: FactorGraph, site: SiteValue, drawn: Drawn, num_draws: int) -> Tensor:
    """Select a site's value at the drawn indices."""
    plates = graph.tensor_plates(graph.with_enclosing(site.plates))
    value = graph.to_plates(site.tensor, plates, left=len(site.indices), right=site.event_dim)
    if site.indices:
        selection = [index_at(graph, drawn, symbol, plates) for symbol in site.indices]
        selection += [positions_in(graph, symbol, plates) for symbol in plates]
        value = value[tuple(selection)]
    else:
        value = value.unsqueeze(0)
    value = value.expand((num_draws, *value.shape[1:]))
    return site.ordinary(graph.to_batch(value, plates, site.batch_shape, left=1), left=1)


def _step_inwards(
    graph: FactorGraph, tensor: Tensor, present: str, plates: str
) -> tuple[Tensor, str]:
    """Replace the plates around one ragged plate by the ragged plate."""
    deep = graph.with_enclosing(frozenset(plates))
    for inner, plate in graph.ragged.items():
        around = [symbol for symbol in present if symbol in plate.outer]
        if not inner <= deep or not around or inner <= set(present):
            continue
        rest = [symbol for symbol in present if symbol not in plate.outer]
        layout = "".join([*rest, *(s for s in plate.inner if s not in rest)])
        index = [
            aligned(packed(plate.outer[symbol].clone(), plate.inner), layout)
            if symbol in plate.outer
            else positions_in(graph, symbol, layout)
            for symbol in present
        ]
        everything: tuple[slice | Tensor, ...] = (slice(None), *index)
        return tensor[everything], layout
    raise AssertionError(f"no way from plates {present} to {plates}")
