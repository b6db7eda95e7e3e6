# SPDX-License-Identifier: Apache-2.0
"""What each site reads of plated latents: of plates that it is not in, and of its own."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.particles.probes import (
    SEVERAL,
    ElementReads,
    Numbers,
    SiteReads,
    agree,
    numbered,
    own_elements,
    run_probe,
    several_of,
    unravel,
)
from pyro_mpis.particles.proposals import Particles, with_all_outside
from pyro_mpis.particles.together import (
    ReadTogether,
    foreign_ordinals,
    indices_of,
    num_values,
    reason_of,
    unknown,
)
from pyro_mpis.programs.not_mappable import NotMappableError, is_out_of_memory
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Structure


def find_reads(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    drawn: Particles,
    switched: Collection[str] = (),
) -> SiteReads:
    """
    Find which elements of other plates' latents each site reads.

    :param particles: to try; of the graph, or all of them.
    :param drawn: all that were drawn: what an index outside of plates decides is found at each.
    :param switched: sites that read other elements at some particles of an index than at others.
    :return: for each site; empty if no site reads latents of a plate that it is not in.
    :raises ReadTogether: if that could not be found out.
    """
    foreign = [factor for factor in graph.factors if foreign_ordinals(graph, factor)]
    if not foreign:
        return {}
    ordinals = {plates for factor in foreign for plates in foreign_ordinals(graph, factor)}
    numbers = {plates: numbered(graph, plates) for plates in sorted(ordinals, key=sorted)}
    try:
        reads = dict(run_probe(graph, structure, particles, programs, numbers))
        of_switch = with_all_outside(structure, particles, drawn)
        for name in switched:
            found = _switched(graph, structure, of_switch, programs, numbers, name)
            reads[name] = found or reads[name]
            if found is None:
                _share_least(graph, structure, particles, programs, reads[name], name)
        return reads
    except (NotMappableError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise unknown(graph, foreign[0]) from None


def _switched(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    numbers: Mapping[Ordinal, Numbers],
    name: str,
) -> ElementReads | None:
    """Find an index on whose particle alone it depends which elements a site reads, if one does."""
    for symbol in sorted(structure.indices_read(structure.model[name])):
        if structure.by_symbol[symbol].plates or particles.sizes[symbol] == 1:
            continue
        few, which = particles.distinct(structure, symbol)
        found = run_probe(graph, structure, few, programs, numbers, symbol)[name]
        if not any(bool((elements <= SEVERAL).any()) for elements in found.elements.values()):
            elements = {plates: e[which.to(e.device)] for plates, e in found.elements.items()}
            return replace(found, elements=elements)
    return None


def _share_least(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    reads: ElementReads,
    name: str,
) -> None:
    """Share what a site reads several elements of, if it does."""
    (factor,) = (factor for factor in graph.factors if factor.name == name)
    foreign = foreign_ordinals(graph, factor)
    if any(several_of(reads.elements[plates], plates) for plates in foreign):
        found = least_shared(graph, structure, particles, programs, factor)
        if found is not None:
            raise found


def least_shared(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    factor: LogFactor,
) -> ReadTogether | None:
    """
    Find the least that has to be shared, since a site reads several elements of some plates.

    The elements of one index are changed at a time: a site may read one element of each of two
    latents of a plate, as of a team's attack and of another team's defence. One of them then keeps
    its elements.

    :return: None if that could not be found out.
    """
    several: dict[str, Ordinal] = {}
    single: dict[Ordinal, dict[str, Tensor]] = {}  # of plates that a site is not in
    for symbol in indices_of(graph, factor):
        plates = graph.index_plates[symbol]
        if not plates:
            continue
        numbers, only = {plates: numbered(graph, plates)}, frozenset(symbol)
        try:
            reads = run_probe(graph, structure, particles, programs, numbers, only=only)
        except (NotMappableError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return None
        if factor.name not in reads:  # of a guide
            return None
        elements = reads[factor.name].elements[plates]
        shares = several_of(elements, plates)
        if plates <= factor.plates:
            shares |= _not_its_own(graph, reads[factor.name], plates)
        elif not shares:
            single.setdefault(plates, {})[symbol] = elements
        if shares:
            several[symbol] = shares
    if not several:
        several = next(filter(None, (_different(graph, p, single[p]) for p in single)), {})
    if not several:
        return None
    plates = frozenset[str]().union(*several.values())
    if any(graph.index_plates[symbol] & plates != shares for symbol, shares in several.items()):
        plates = min(several.values(), key=sorted)  # the others another time
        several = {symbol: shares for symbol, shares in several.items() if shares == plates}
    return ReadTogether(frozenset(several), plates, reason_of(graph, factor, plates))


def _not_its_own(graph: FactorGraph, reads: ElementReads, plates: Ordinal) -> Ordinal:
    """Return the plates that a site is in of which it reads another element than its own."""
    elements = reads.elements[plates]
    return frozenset(
        symbol
        for symbol, element in unravel(graph, elements, plates).items()
        if bool(((element != own_elements(graph, reads, symbol)) & (elements >= 0)).any())
    )


def _different(
    graph: FactorGraph, plates: Ordinal, elements: Mapping[str, Tensor]
) -> dict[str, Ordinal]:
    """
    Find what to share where a site reads different elements of some plates, one of each index.

    Those indices keep their elements that have the most values and are read at the same elements.
    """
    alike = {
        symbol: [other for other in elements if agree(elements[symbol], elements[other])]
        for symbol in elements
    }
    kept = max(alike, key=lambda symbol: num_values(graph, alike[symbol]))
    at = unravel(graph, elements[kept], plates)
    result = {}
    for symbol in elements:
        other = unravel(graph, elements[symbol], plates)
        differ = frozenset(plate for plate in plates if not agree(at[plate], other[plate]))
        if differ:
            result[symbol] = differ
    return result
