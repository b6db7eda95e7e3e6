# SPDX-License-Identifier: Apache-2.0
"""Plates that cross: whose latents meet in one sum, though neither plate is in the other."""

from collections.abc import Mapping

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.particles.together import indices_of, plates_named, read_together


def check_crossing(graph: FactorGraph) -> None:
    """
    Find plates that cross: whose latents meet in one sum, though neither plate is in the other.

    Takes the steps that :func:`pyro.ops.contract.contract_tensor_tree` will take, on names alone:
    eliminate the innermost plates' indices, multiply over the plate, go outwards.

    :raises ReadTogether: if plates cross; names those that are the cheapest to share.
    """
    dims = {s: graph.with_enclosing(plates) for s, plates in graph.index_plates.items()}
    tree: dict[Ordinal, list[tuple[frozenset[str], str]]] = {}
    for factor in graph.factors:
        read = frozenset(indices_of(graph, factor))
        tree.setdefault(graph.with_enclosing(factor.plates), []).append((read, factor.name))
    while tree:
        leaf = max(tree, key=len)
        if not leaf:
            return
        for read, name in _components(tree.pop(leaf), dims, leaf):
            pending = frozenset(s for s in read if dims[s] != leaf)
            if not pending:
                continue
            parent = frozenset[str]().union(*(dims[symbol] for symbol in pending))
            largest = max((dims[symbol] for symbol in pending), key=len)
            if parent != largest or parent == leaf or not parent <= leaf:
                ordinals = sorted({graph.index_plates[s] for s in pending}, key=sorted)
                names = " and of ".join(plates_named(graph, p) for p in ordinals if p)
                reason = f"site '{name}' reads latents of {names}, which cross"
                raise read_together(graph, pending, reason)
            tree.setdefault(parent, []).append((pending, name))


def _components(
    terms: list[tuple[frozenset[str], str]], dims: Mapping[str, Ordinal], leaf: Ordinal
) -> list[tuple[frozenset[str], str]]:
    """Put terms together that share an index of the leaf."""
    components: list[tuple[frozenset[str], str]] = []
    for read, name in terms:
        local = {symbol for symbol in read if dims[symbol] == leaf}
        apart = []
        for other, other_name in components:
            if local & other:
                name = max((len(read), name), (len(other), other_name))[1]  # that tells most
                read = read | other
                local = {symbol for symbol in read if dims[symbol] == leaf}
            else:
                apart.append((other, other_name))
        components = [*apart, (read, name)]
    return components
