# SPDX-License-Identifier: Apache-2.0
"""
Elements of a plate that cannot have a particle index each.

Where elements of a plate are read together, or plates cross, the sum over an index for each element
is exponential in the size of the plate. Such indices are to be shared: one for the whole plate.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

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


def reason_of(graph: FactorGraph, factor: LogFactor, plates: Ordinal) -> str:
    """Say that a site reads elements of some plates together: a part of a sentence."""
    named = plates_named(graph, plates)
    if foreign_ordinals(graph, factor):
        return f"site '{factor.name}' reads several elements of {named} together"
    return f"site '{factor.name}' reads other elements of {named} than its own"


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
    return read_together(
        graph,
        indices_of(graph, factor),
        f"site '{factor.name}' reads latents of {plates_named(graph, one)} and of "
        f"{plates_named(graph, other)}, which cross",
    )


def read_together(graph: FactorGraph, symbols: Iterable[str], reason: str) -> ReadTogether:
    """
    Share those indices that cost least to share, of some whose plates cross.

    An index that is shared by a plate is as ordinary importance sampling of all its elements
    together, whose error grows with the number of latent values. So those indices are shared, and
    by those of their plates, that leave the fewest values to be drawn together; of several choices,
    the one whose plates' names come first. If no two of the plates cross, and they cannot have
    indices of their own for another reason, those with the fewest values are shared.
    """
    inside: dict[Ordinal, set[str]] = {}
    for symbol in symbols:
        if graph.index_plates[symbol]:
            inside.setdefault(graph.index_plates[symbol], set()).add(symbol)
    values = {plates: num_values(graph, symbols) for plates, symbols in inside.items()}
    _, shared = _cheapest(graph, {plates: plates for plates in inside}, values)
    shared = shared or [
        min((number, _names(graph, plates), plates, plates) for plates, number in values.items())
    ]
    *_, chosen, plates = min(shared)
    return ReadTogether(frozenset(inside[chosen]), plates, reason)


Shared: TypeAlias = tuple[int, list[str], Ordinal, Ordinal]  # values, names, of which plates, by


def _cheapest(
    graph: FactorGraph, left: Mapping[Ordinal, Ordinal], values: Mapping[Ordinal, int]
) -> tuple[tuple[int, list[list[str]]], list[Shared]]:
    """
    Find what to share so that of any two indices' plates one lies in the other.

    :param left: the plates of each index, and those that it has of its own by now.
    :return: the values that are then drawn together, with the plates' names; what is shared.
    """
    around = {plates: graph.with_enclosing(own) for plates, own in left.items()}
    choices = []
    for deepest in _maximal(around):
        shares: list[Shared] = []
        rest = {}
        for plates, own in left.items():
            common = own & around[deepest]
            if common != own:
                number = values[plates] // math.prod(graph.sizes[symbol] for symbol in common)
                shares.append((number, _names(graph, own - common), plates, own - common))
            if plates != deepest and common:
                rest[plates] = common
        (number, names), others = _cheapest(graph, rest, values)
        total = number + sum(share[0] for share in shares)
        choices.append(((total, sorted([*names, *(s[1] for s in shares)])), [*shares, *others]))
    return min(choices, key=lambda choice: choice[0], default=((0, []), []))


def _maximal(around: Mapping[Ordinal, Ordinal]) -> list[Ordinal]:
    """Return the ordinals that lie in no other; of equal ones each."""
    return [one for one, own in around.items() if not any(own < other for other in around.values())]


def num_values(graph: FactorGraph, symbols: Collection[str]) -> int:
    """Count the latent values of some indices, of all elements of their plates."""
    return sum(
        site.tensor[(0,) * len(site.indices)].numel()
        for site in graph.values.values()
        if set(symbols) & set(site.indices)
    )


def _names(graph: FactorGraph, plates: Ordinal) -> list[str]:
    return sorted(graph.plate_names[symbol] for symbol in plates)


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
