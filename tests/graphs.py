# SPDX-License-Identifier: Apache-2.0
"""Graphs of log factors written by hand."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate


def graph_of(
    tables: Iterable[tuple[str, Tensor]],
    index_plates: Mapping[str, str],
    ragged: Mapping[str, RaggedPlate] | None = None,
) -> FactorGraph:
    """
    Make a graph of tables, each with a letter for each of its dims.

    :param index_plates: the letters of the indices, and the plates that each sits in; all other
        letters are plates.
    """
    factors = []
    sizes: dict[str, int] = {}
    for dims, table in tables:
        plates = frozenset(dims) - frozenset(index_plates)
        factors.append(LogFactor(dims, table, dims, plates))
        sizes |= dict(zip(dims, table.shape, strict=True))
    plate_symbols = sorted(sizes.keys() - index_plates.keys())
    return FactorGraph(
        factors=tuple(factors),
        sizes=sizes,
        index_plates={symbol: frozenset(plates) for symbol, plates in index_plates.items()},
        plate_dims={symbol: -1 - number for number, symbol in enumerate(plate_symbols)},
        max_plate_nesting=len(plate_symbols),
        values={},
        plate_names={symbol: f"plate {symbol}" for symbol in plate_symbols},
        index_sites={symbol: (f"site {symbol}",) for symbol in index_plates},
        dtype=factors[0].tensor.dtype,
        device=torch.get_default_device(),
        ragged={frozenset(inner): plate for inner, plate in (ragged or {}).items()},
    )


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return normal numbers in float64."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
