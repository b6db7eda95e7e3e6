# SPDX-License-Identifier: Apache-2.0
"""What each site reads of plated latents: of plates that it is not in, and of its own."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from pyro_mpis._typing import Ordinal
from pyro_mpis.factor_graph.graph import FactorGraph, LogFactor
from pyro_mpis.particles.probes import (
    SEVERAL,
    ElementReads,
    Numbers,
    SiteReads,
    numbered,
    run_probe,
)
from pyro_mpis.particles.proposals import Particles
from pyro_mpis.particles.together import foreign_ordinals, indices_of, unknown
from pyro_mpis.programs.not_mappable import NotMappableError, is_out_of_memory
from pyro_mpis.programs.runs import Programs
from pyro_mpis.programs.structure import Structure


def find_reads(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    switched: Collection[str] = (),
) -> SiteReads:
    """
    Find which elements of other plates' latents each site reads.

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
        for name in switched:
            found = _switched(graph, structure, particles, programs, numbers, name)
            reads[name] = found or reads[name]
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


def own_reads(
    graph: FactorGraph,
    structure: Structure,
    particles: Particles,
    programs: Programs,
    factor: LogFactor,
) -> ElementReads | None:
    """Find which elements of its own plates' latents a site reads; None if that cannot be found."""
    ordinals = {graph.index_plates[symbol] for symbol in indices_of(graph, factor)}
    numbers = {p: numbered(graph, p) for p in ordinals if p and p <= factor.plates}
    try:
        return run_probe(graph, structure, particles, programs, numbers).get(factor.name)
    except (NotMappableError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return None
