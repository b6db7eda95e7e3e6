# SPDX-License-Identifier: Apache-2.0
"""
The factor graph of a model and its guide, drawn with Graphviz before anything is sampled.

Ellipses are particle indices, boxes are log factors. An arrow goes from each index that a factor
reads to the factor, and from a latent site's factor to the index of the site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro_mpis._typing import Ordinal
from pyro_mpis.programs.structure import Index, Site, Structure

if TYPE_CHECKING:
    from graphviz import Digraph

OBSERVED = "#d9d9d9"  # fills the factors of observed sites
LARGEST = "#c44e52"  # outlines the largest factor


@dataclass(frozen=True)
class Node:
    """A node of the picture, and the plates around it."""

    key: str
    lines: tuple[str, ...]
    plates: Ordinal
    style: Mapping[str, str]


def render(structure: Structure) -> "Digraph":
    """
    Draw the indices and factors of a structure.

    :raises ImportError: without the Python package graphviz.
    """
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(
            "render needs the Python package graphviz, which is not installed: pip install "
            "graphviz. To show or save the picture, it calls the program 'dot' of Graphviz: "
            "apt install graphviz, brew install graphviz, or conda install graphviz."
        ) from error
    sites = [site for site in structure.model.values() if not site.silent]
    shapes = {site.name: _shape(structure, site) for site in sites}
    largest = max(sites, key=lambda site: math.prod(shapes[site.name]), default=None)
    indices = [_index_node(index) for index in structure.indices]
    factors = [
        _factor_node(structure, number, site, shapes[site.name], site is largest)
        for number, site in enumerate(sites)
    ]
    entries = sum(map(math.prod, shapes.values()))
    graph = graphviz.Digraph(graph_attr={"label": f"{entries:,} log densities"})
    _add(graph, structure, [*indices, *factors], frozenset())
    for node, site in zip(factors, sites, strict=True):
        own = structure.index_of.get(site.name)
        for symbol in sorted(structure.indices_read(site)):
            if own is None or symbol != own.symbol:
                graph.edge(f"index_{symbol}", node.key)
        if own is not None:
            graph.edge(node.key, f"index_{own.symbol}")
    return graph


def _shape(structure: Structure, site: Site) -> list[int]:
    """Return the sizes whose product is the number of log densities of a site."""
    reads = sorted(structure.indices_read(site))
    indices = [structure.by_symbol[symbol].size for symbol in reads]
    plates = [structure.plates[symbol].size for symbol in sorted(site.plates)]
    rest = [site.batch_shape[dim] for dim in site.undeclared] + [site.event_size]
    return [*indices, *plates, *(size for size in rest if size > 1)]


def _index_node(index: Index) -> Node:
    number = f"{index.size} values" if index.enumerated else f"K = {index.size}"
    return Node(f"index_{index.symbol}", (", ".join(index.sites), number), index.plates, {})


def _factor_node(
    structure: Structure, number: int, site: Site, shape: list[int], is_largest: bool
) -> Node:
    style = {"shape": "box"}
    if site.name not in structure.origins:
        style |= {"style": "filled", "fillcolor": OBSERVED}
    if is_largest:
        style |= {"color": LARGEST, "penwidth": "2"}
    size = " x ".join(map(str, shape)) or "1"
    return Node(f"factor_{number}", (site.name, size), site.plates, style)


def _add(graph: "Digraph", structure: Structure, nodes: list[Node], around: Ordinal) -> None:
    """Add the nodes that lie in the given plates, and a cluster for each set of plates inside."""
    from graphviz import escape

    for node in nodes:
        if node.plates == around:
            label = r"\n".join(map(escape, node.lines))
            graph.node(node.key, label, **node.style)
    ordinals = {node.plates for node in nodes}
    for inner in sorted(ordinals - {around}, key=sorted):
        if _parent(inner, ordinals) != around:
            continue
        plates = [structure.plates[symbol] for symbol in sorted(inner - around)]
        label = " x ".join(f"{escape(plate.name)}: {plate.size}" for plate in plates)
        with graph.subgraph(name="cluster_" + "".join(sorted(inner))) as cluster:
            cluster.attr(label=label, labeljust="r", labelloc="b")
            _add(cluster, structure, nodes, inner)


def _parent(inner: Ordinal, ordinals: set[Ordinal]) -> Ordinal:
    """Return the plates that a box is drawn in: none for crossed plates, which cannot be nested."""
    within = [other for other in ordinals if other < inner]
    largest = max(within, key=len, default=frozenset[str]())
    return largest if all(other <= largest for other in within) else frozenset()
