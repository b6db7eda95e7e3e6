# SPDX-License-Identifier: Apache-2.0
"""
Elements of a plate that cannot have a particle index each.

Where elements of a plate are read together, or plates cross, the sum over an index for each element
is exponential in the size of the plate. Such indices are to be shared: one for the whole plate.
"""

from pyro_mpis._text import quoted
from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor


class ReadTogether(Exception):
    """
    Elements of a plate cannot have an index each.

    :param symbols: the indices to be shared.
    :param plates: by which plates' elements.
    :param reason: what reads them together: a part of a sentence.
    :param differs: whether it was found because a density is not the entry of its factor. A read
        that the plain run missed could explain that too.
    :param by_index: the site, if it reads elements of a plate that it is not in.
    """

    def __init__(
        self,
        symbols: Ordinal,
        plates: Ordinal,
        reason: str,
        differs: bool = False,
        by_index: str = "",
    ) -> None:
        super().__init__(symbols, plates, reason, differs, by_index)
        self.by_index = by_index
        self.symbols = symbols
        self.plates = plates
        self.reason = reason
        self.differs = differs


def unknown(graph: FactorGraph, factor: LogFactor) -> ReadTogether:
    """Say that the elements that a factor reads could not be found out."""
    plates = frozenset[str]().union(*foreign_ordinals(graph, factor))
    symbols = {s for s in indices_of(graph, factor) if graph.index_plates[s] & plates}
    return ReadTogether(
        frozenset(symbols),
        plates,
        f"site '{factor.name}' reads latents of {plates_named(graph, plates)} from outside of "
        "it, and it could not be found out which element",
    )


def crossing(graph: FactorGraph, factor: LogFactor, one: Ordinal, other: Ordinal) -> ReadTogether:
    """Say that two plates whose latents a factor reads cross."""
    ordinals = [graph.index_plates[symbol] for symbol in indices_of(graph, factor)]
    return read_together(
        graph,
        factor,
        [plates for plates in ordinals if plates],
        f"site '{factor.name}' reads latents of {plates_named(graph, one)} and of "
        f"{plates_named(graph, other)}, which cross",
    )


def read_together(
    graph: FactorGraph, factor: LogFactor, ordinals: list[Ordinal], reason: str
) -> ReadTogether:
    """Share the indices of that ordinal which has the fewest numbers to be drawn together."""
    plates = cheapest(graph, [plates for plates in ordinals if plates])
    symbols = {s for s in indices_of(graph, factor) if graph.index_plates[s] == plates}
    return ReadTogether(frozenset(symbols), plates, reason)


def cheapest(graph: FactorGraph, ordinals: list[Ordinal]) -> Ordinal:
    """
    Return the ordinal whose indices cost least to share.

    An index that is shared by a plate is as ordinary importance sampling of all its elements
    together, whose error grows with the number of latent values. So the ordinal with the fewest
    values of latents is shared; of several, the one whose plates' names come first.
    """

    def cost(plates: Ordinal) -> tuple[int, list[str]]:
        symbols = {s for s, inside in graph.index_plates.items() if inside == plates}
        values = sum(
            site.tensor[(0,) * len(site.indices)].numel()
            for site in graph.values.values()
            if symbols & set(site.indices)
        )
        return values, sorted(graph.plate_names[symbol] for symbol in plates)

    return min(ordinals, key=cost)


def indices_of(graph: FactorGraph, factor: LogFactor) -> list[str]:
    """Return the particle indices that a factor reads."""
    return [symbol for symbol in factor.dims if symbol in graph.index_plates]


def foreign_ordinals(graph: FactorGraph, factor: LogFactor) -> list[Ordinal]:
    """Return the plates of the indices that a factor reads from outside of them."""
    ordinals = {graph.index_plates[symbol] for symbol in indices_of(graph, factor)}
    return [plates for plates in sorted(ordinals, key=sorted) if not plates <= factor.plates]


def plates_named(graph: FactorGraph, plates: Ordinal) -> str:
    """Return the names of plates, for a message."""
    names = quoted({graph.plate_names[symbol] for symbol in plates})
    return f"plate {names}" if len(plates) == 1 else f"plates {names}"
