# SPDX-License-Identifier: Apache-2.0
r"""
Latents of one plate read in another, through an index array.

The commonest hierarchical model draws effects in one plate and reads them by index in another::

    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", Normal(mu, sigma))
    with pyro.plate("house", 919):
        pyro.sample("y", Normal(alpha[county], 1), obs=y)

The factor of ``y`` has the particles of ``alpha`` and the plate of the houses, but not that of the
counties; multiplied over the houses as it is, it would let all counties share one particle. Summed
over the houses **of each county** it is a factor of ``alpha`` and of its plate, and exact.

Which element each observation reads is found from outside (:mod:`~pyro_mpis.particles.probes`).
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.evidence import over_plates
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor, RaggedPlate
from pyro_mpis.factor_graph.packed import packed
from pyro_mpis.factor_graph.ragged import regroup
from pyro_mpis.particles.checks import differing
from pyro_mpis.particles.mixtures import Mixture
from pyro_mpis.particles.probes import (
    NONE,
    ElementReads,
    SiteReads,
    agree,
    differs_from,
    own_elements,
    several_of,
    unravel,
)
from pyro_mpis.particles.together import (
    ReadTogether,
    crossing,
    foreign_ordinals,
    indices_of,
    plates_named,
    read_together,
    reason_of,
    unknown,
)
from pyro_mpis.programs.tensors import Said


def check_graph(
    graph: FactorGraph,
    reads: SiteReads,
    mixture: Mixture,
    said: tuple[Said, Said],
    least: Callable[[LogFactor], ReadTogether | None],
) -> None:
    """
    Hold a graph against densities that mix the elements of plates.

    :param graph: of the particles that the mixture chooses from, not regrouped.
    :param said: by guide and model, at the mixture.
    :param least: finds the least that a site makes share.
    :raises ReadTogether: if a site reads other elements, or other indices, than the graph says.
    """
    wrong = differing(graph, reads, mixture, said)
    if not wrong:
        return
    factor = wrong[0]
    foreign = foreign_ordinals(graph, factor)
    found = None if foreign else least(factor)
    if found is None:
        inside = (graph.index_plates[symbol] for symbol in indices_of(graph, factor))
        plates = frozenset[str]().union(*(foreign or inside))
        symbols = {s for s in indices_of(graph, factor) if graph.index_plates[s] & plates}
        found = ReadTogether(frozenset(symbols), plates, reason_of(graph, factor, plates))
    found.differs, found.by_index = True, factor.name if foreign else ""
    raise found


def regroup_indexed(graph: FactorGraph, reads: SiteReads) -> FactorGraph:
    """
    Regroup the factors that read latents of other plates by index.

    :raises ReadTogether: if an element reads several elements, or plates cross.
    """
    if not reads and not any(foreign_ordinals(graph, factor) for factor in graph.factors):
        return graph
    factors: list[LogFactor] = []
    for factor in sorted(graph.factors, key=lambda f: (not _has_local(graph, f), len(f.plates))):
        if foreign_ordinals(graph, factor):
            if factor.name not in reads:
                raise unknown(graph, factor)
            graph, factor = _resolve(graph, factor, reads[factor.name])
        factors.append(factor)
    return replace(graph, factors=tuple(factors))


def _has_local(graph: FactorGraph, factor: LogFactor) -> bool:
    """Whether each of the factor's plates holds an index that it reads."""
    inside = {p for symbol in indices_of(graph, factor) for p in graph.index_plates[symbol]}
    return factor.plates <= inside


def _resolve(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads
) -> tuple[FactorGraph, LogFactor]:
    """Regroup one factor, or note that its plates are ragged parts of others."""
    if reads.switch and graph.sizes[reads.switch] == 1:  # tensors have no dim of it
        reads = reads.of_one_particle()
    foreign = foreign_ordinals(graph, factor)
    graph = _with_nested(graph, reads, foreign)
    deepest = max(foreign, key=lambda plates: len(graph.with_enclosing(plates)))
    maps: dict[str, Tensor] = {}  # NONE where nothing is read
    for plates in sorted(foreign, key=lambda plates: len(graph.with_enclosing(plates))):
        if not graph.with_enclosing(plates) <= graph.with_enclosing(deepest):
            raise crossing(graph, factor, plates, deepest)
        elements = _known_elements(graph, factor, reads, plates)
        for symbol, element in unravel(graph, elements, plates).items():
            if symbol in factor.plates:
                maps[symbol] = own_elements(graph, reads, symbol)
            before = maps.get(symbol, element)
            if not agree(before, element):
                reason = reason_of(graph, factor, frozenset(symbol))
                raise read_together(graph, indices_of(graph, factor), reason)
            maps[symbol] = torch.where(before == NONE, element, before)
    enclosing = graph.with_enclosing(deepest)
    for symbol in _local_plates(graph, factor) & enclosing - maps.keys():
        maps[symbol] = own_elements(graph, reads, symbol)
    _check_nested_maps(graph, factor, maps, deepest)
    outer = graph.tensor_plates(enclosing)
    maps = {s: maps[s] for s in outer if s not in factor.plates}
    held = {p for symbol in indices_of(graph, factor) for p in graph.index_plates[symbol]}
    alone = factor.plates - held
    if not _local_plates(graph, factor) <= enclosing:
        if reads.switch:
            raise crossing(graph, factor, deepest, factor.plates)
        return _ragged(graph, over_plates(graph, factor, alone), reads.inner, maps, alone)
    # plates around the ragged one that is read: its tensors have no dims of them
    alone |= factor.plates & enclosing - set(outer)
    tensor = packed(factor.tensor, factor.dims)
    tensor = regroup(tensor, alone, _element_map(reads.inner, maps), maps, graph.sizes)
    dims: str = tensor._pyro_dims  # type: ignore[attr-defined]
    plates = (factor.plates - alone) | graph.with_enclosing(deepest)
    scale = graph.scale_of(factor.plates - plates)
    if scale != 1.0:
        tensor = tensor * scale
    return graph, LogFactor(factor.name, tensor, dims, plates)


def _with_nested(graph: FactorGraph, reads: ElementReads, foreign: list[Ordinal]) -> FactorGraph:
    """
    Note which plates lie in others by the elements that are read together.

    As classes in schools, where a pupil reads the effect of its class and that of its school.
    """
    for inner, outer in itertools.permutations(sorted(foreign, key=sorted), 2):
        if reads.switch:
            break
        ((inside, *more), (around, *others)) = sorted(inner), sorted(outer)
        related = graph.with_enclosing(inner) | graph.with_enclosing(outer)
        if more or others or len(related) > 2 or any(inner <= key for key in graph.ragged):
            continue
        if inner <= graph.with_enclosing(outer):  # the other lies in it already
            continue
        if _in_both(graph, inner, outer):
            continue
        read, position = reads.elements[outer], reads.elements[inner]
        if bool(((read < 0) | (position < 0)).any()):
            continue
        element = torch.zeros(graph.sizes[inside], dtype=read.dtype, device=read.device)
        element[position.flatten()] = read.flatten()
        if bool((element[position] == read).all()):
            element_map = RaggedPlate(inside, {around: element})
            return replace(graph, ragged={**graph.ragged, inner: element_map})
    return graph


def _in_both(graph: FactorGraph, inner: Ordinal, outer: Ordinal) -> bool:
    """Whether a site has all elements of some plates at each element of another plate."""
    return any(inner <= factor.plates and outer & factor.plates for factor in graph.factors)


def _element_map(inner: str, maps: Mapping[str, Tensor]) -> RaggedPlate:
    """Return a map. Where nothing is read the factor is constant, and element 0 receives it."""
    return RaggedPlate(inner, {s: element.clamp(min=0).contiguous() for s, element in maps.items()})


def _local_plates(graph: FactorGraph, factor: LogFactor) -> Ordinal:
    """Return the plates of the indices that a factor reads inside of them."""
    ordinals = {graph.index_plates[symbol] for symbol in indices_of(graph, factor)}
    return frozenset[str]().union(*(plates for plates in ordinals if plates <= factor.plates))


def _ragged(
    graph: FactorGraph, factor: LogFactor, inner: str, maps: Mapping[str, Tensor], alone: Ordinal
) -> tuple[FactorGraph, LogFactor]:
    """
    Note that the plates of a factor are ragged parts of others.

    Plates along which the map is constant are left out of it (the occasions, if every house stays
    in one county). If all could be left out, those stay that another site's map has or that hold
    an index.

    :param maps: the elements that are read, NONE where nothing is, by plate: ``(*inner)``.
    :param alone: plates that the factor has been summed over, which must be among these.
    """
    implied = [
        known
        for key, known in graph.ragged.items()
        if key <= factor.plates and known.outer.keys() == maps.keys()
    ]
    local = [plates for plates in graph.index_plates.values() if plates <= factor.plates]
    kept = set(implied[0].inner) if implied else min(filter(None, local), key=len)
    for symbol in sorted(inner, key=lambda symbol: (symbol not in alone, symbol in kept)):
        dim = inner.index(symbol)
        some = {s: element.amax(dim) for s, element in maps.items()}
        constant = all(agree(maps[s], element.unsqueeze(dim)) for s, element in some.items())
        if constant and len(inner) > 1:
            inner, maps = inner.replace(symbol, ""), some
        elif symbol in alone:
            raise crossing(graph, factor, frozenset(maps), factor.plates)
    key = frozenset(inner)
    outer = graph.with_enclosing(frozenset(maps))
    if key & outer or _in_both(graph, key, outer):  # each would lie in the other, or they cross
        raise crossing(graph, factor, frozenset(maps), key)
    known = graph.ragged.get(key)
    both = [key | k for k, other in graph.ragged.items() if other.outer.keys() & maps.keys()]
    if known is None and not any(p <= f.plates for p in both for f in graph.factors):
        graph = replace(graph, ragged={**graph.ragged, key: _element_map(inner, maps)})
    elif (
        known is None
        or known.outer.keys() != maps.keys()
        or not all(agree(known.outer[s], maps[s]) for s in known.outer)
    ):
        raise read_together(
            graph,
            indices_of(graph, factor),
            f"site '{factor.name}' reads elements of {plates_named(graph, frozenset(maps))} by an "
            f"index array that differs from that of another site in {plates_named(graph, key)}",
        )
    return graph, factor


def _known_elements(
    graph: FactorGraph, factor: LogFactor, reads: ElementReads, plates: Ordinal
) -> Tensor:
    """Return the element that each element reads, or NONE."""
    elements = reads.elements[plates]
    several = several_of(elements, plates)
    if several:
        symbols = {s for s in indices_of(graph, factor) if graph.index_plates[s] == plates}
        raise ReadTogether(
            frozenset(symbols),
            several,
            reason_of(graph, factor, several),
            by_index=factor.name,
        )
    none = elements == NONE
    if bool(none.any()):
        tensor = factor.tensor
        for symbol in indices_of(graph, factor):
            if graph.index_plates[symbol] == plates:
                first = tensor.select(factor.dims.index(symbol), 0)
                varies = differs_from(tensor, first.unsqueeze(factor.dims.index(symbol)))
                others = [d for d, s in enumerate(factor.dims) if s not in reads.inner]
                varies = varies.permute(
                    (*others, *(factor.dims.index(s) for s in reads.inner))
                ).reshape(-1, *elements.shape)
                if bool((varies.any(0) & none).any()):
                    raise unknown(graph, factor)
    return elements


def _check_nested_maps(
    graph: FactorGraph,
    factor: LogFactor,
    maps: Mapping[str, Tensor],
    deepest: Ordinal,
) -> None:
    """Check that reading a ragged plate and the plate around it agrees with its own nesting."""
    for ragged, element_map in graph.ragged.items():
        if not ragged <= set(maps):
            continue
        position = tuple(maps[symbol].clamp(min=0) for symbol in element_map.inner)
        for symbol, around in element_map.outer.items():
            if symbol in maps and not agree(around[position], maps[symbol]):
                raise crossing(graph, factor, frozenset(symbol), deepest)
