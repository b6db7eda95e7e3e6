# SPDX-License-Identifier: Apache-2.0
"""Cut particles into parts, and put together what was found of each."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from pyro_mpis.factor_graph.graph import FactorGraph, SiteValue

Ranges = Mapping[str, slice]  # symbol of an index -> its particles in a part


def split(
    particles: Mapping[str, int], block_sizes: Mapping[str, int], smallest: int = 1
) -> tuple[Ranges, ...]:
    """
    Cut the particles of some indices into blocks, as even as can be.

    :param particles: number of particles of each index.
    :param block_sizes: number in a block, of the indices to cut.
    :param smallest: number below which no block is cut.
    :return: the ranges of each block; one without any where nothing is to be cut.
    """
    cuts = []
    for symbol, size in block_sizes.items():
        whole = particles[symbol]
        number = max(1, min(math.ceil(whole / size), whole // smallest))
        ends = [whole * step // number for step in range(number + 1)]
        cuts.append([(symbol, slice(*ends)) for ends in itertools.pairwise(ends)])
    return tuple(dict(combination) for combination in itertools.product(*cuts))


def put_together(
    graphs: Iterable[FactorGraph], parts: Sequence[Ranges], sizes: Mapping[str, int]
) -> FactorGraph:
    """
    Put the pieces of a block together.

    :param parts: the particles of each piece, two or more of each index that is cut: dims of size
        one are not there to tell whether a factor has them.
    :param sizes: numbers of particles of the block.
    """
    graphs = iter(graphs)
    whole = next(graphs)
    if len(parts) == 1:
        return whole
    sizes = {**whole.sizes, **sizes}
    factors = [
        replace(factor, tensor=_room(factor.tensor, factor.dims, sizes)) for factor in whole.factors
    ]
    values: dict[str, SiteValue] = {}
    for graph, part in zip(itertools.chain([whole], graphs), parts, strict=True):
        for factor, piece in zip(factors, graph.factors, strict=True):
            tensor = piece.tensor.permute([piece.dims.index(symbol) for symbol in factor.dims])
            factor.tensor[at_part(factor.dims, part)] = tensor  # dims are in the order of sizes
        values = with_values(values, sizes, graph.values, part)
    return replace(whole, factors=tuple(factors), sizes=sizes, values=values)


def at_part(symbols: str, ranges: Ranges) -> tuple[slice, ...]:
    """Return where the particles of a part are, among the dims of some indices."""
    return tuple(ranges.get(symbol, slice(None)) for symbol in symbols)


def with_values(
    values: Mapping[str, SiteValue],
    sizes: Mapping[str, int],
    found: Mapping[str, SiteValue],
    ranges: Ranges,
) -> dict[str, SiteValue]:
    """Put a block's values of the sites into their places among all particles."""
    values = dict(values)
    for name, site in found.items():
        if not set(site.indices) & set(ranges):
            values.setdefault(name, site)
            continue
        if name not in values:
            shape = [sizes[symbol] for symbol in site.indices]
            rest = site.tensor.shape[len(shape) :]
            values[name] = replace(site, tensor=site.tensor.new_empty((*shape, *rest)))
        indices = values[name].indices
        order = [site.indices.index(symbol) for symbol in indices]
        tensor = site.tensor.permute(*order, *range(len(order), site.tensor.dim()))
        values[name].tensor[at_part(indices, ranges)] = tensor
    return values


def _room(tensor: Tensor, dims: str, sizes: Mapping[str, int]) -> Tensor:
    return tensor.new_empty([sizes[symbol] for symbol in dims])
