# SPDX-License-Identifier: Apache-2.0
"""
Products over plates, ragged ones among them.

A **ragged plate** is one whose every element reads one element of other plates through an index
array. Its ordinal contains those plates too, its tensors do not have their dims, and its product
adds up, for each element of the outer plates, the elements that read it.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, RaggedPlate
from pyro_mpis.factor_graph.logspace import sum_in_double
from pyro_mpis.factor_graph.packed import aligned, dims_of, packed


def product_over(graph: FactorGraph, term: Tensor, ordinal: Ordinal) -> Tensor:
    """Multiply a packed tensor over the plates of ``ordinal``: sum its log, in float64."""
    dims = frozenset(dims_of(term))
    for inner, plate in graph.ragged.items():
        outer = frozenset(plate.outer)
        if inner <= dims and inner & ordinal and graph.with_enclosing(outer) - ordinal:
            term = regroup(term, inner & ordinal, plate, outer, graph.sizes)
            return product_over(graph, term, ordinal)
    positions = [place for place, symbol in enumerate(dims_of(term)) if symbol in ordinal]
    if not positions:
        return term
    result_dims = "".join(symbol for symbol in dims_of(term) if symbol not in ordinal)
    return packed(sum_in_double(term, positions), result_dims)


def regroup(
    term: Tensor,
    summed: Iterable[str],
    plate: RaggedPlate,
    outer: Iterable[str],
    sizes: Mapping[str, int],
) -> Tensor:
    """
    Add up, for each element of the ``outer`` plates, the ``summed`` elements that read it.

    :param term: packed, with every dim of ``plate.inner``.
    :param summed: plates to eliminate; those of ``plate.inner`` that are left stay.
    :param outer: plates around the ragged plate that the result has.
    :return: packed, float64.
    """
    inner = plate.inner
    summed = "".join(symbol for symbol in inner if symbol in set(summed))
    batch = "".join(symbol for symbol in inner if symbol not in summed)
    outer = "".join(sorted(outer))
    rest = "".join(symbol for symbol in dims_of(term) if symbol not in inner)
    target = torch.zeros((), dtype=torch.long, device=term.device)
    for symbol in outer:
        target = target * sizes[symbol] + plate.outer[symbol]
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
