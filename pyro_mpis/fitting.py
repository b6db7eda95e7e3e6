# SPDX-License-Identifier: Apache-2.0
"""
What fits into memory, and which latents share a particle index where nothing does.

Latents that are read together share one first, then elements of a plate. What still does not fit
runs once for each particle.
"""

import itertools
from dataclasses import replace

from pyro_mpis._text import quoted
from pyro_mpis._typing import Ordinal
from pyro_mpis.options import Options
from pyro_mpis.particles import memory
from pyro_mpis.particles.footprint import Footprint
from pyro_mpis.programs.structure import Index, Obstacle, Structure


def fitted(
    structure: Structure,
    options: Options,
    device: str,
    limit: int | None,
    footprint: Footprint | None = None,
) -> tuple[Structure, memory.Cut, list[str]]:
    """
    Find what fits into memory.

    Where nothing does, and the user has set no limit, latents share an index: two after the other
    of those that the largest factor reads, the ones with the fewest values first. If no two of
    them can, the elements of the plates that are summed for each of their combinations share.

    :param limit: in bytes; None where nothing is known.
    :param footprint: of the programs; see :func:`~pyro_mpis.particles.memory.fit`.
    :return: the structure, how its particles are cut, and what the user is to be told.
    :raises MemoryError: if the user has set a limit that nothing fits into.
    """
    merged: list[str] = []
    notices: list[str] = []
    while True:
        try:
            cut = memory.fit(structure, limit, device, footprint)
            if not merged or not memory.takes_long(structure):
                break
            largest, _ = memory.largest_factor(structure)
            site, read = largest.name, structure.indices_read(largest)
            plates = frozenset[str]()
        except memory.TooLargeError as error:
            if options.memory_limit is not None:
                raise
            site, read, plates = error.site, error.symbols, error.plates
        pair = _mergeable(structure, read)
        if pair is None:
            plates = plates.difference(*(structure.by_symbol[symbol].plates for symbol in read))
            symbols = _inside(structure, read, plates)
            if not symbols:
                return _one_by_one(structure, site), memory.Cut({}, {}), []
            notices.append(_shared_notice(structure, symbols, plates))
            structure = structure.sharing(symbols, plates)
            continue
        merged += [name for index in pair for name in index.sites if name not in merged]
        structure = structure.merging(*pair)
    if not merged:
        return structure, cut, notices
    notice = (
        f"too many latents are read together to combine the particles of each: {quoted(merged)} "
        "share particle indices, so more particles are needed for the same accuracy. To choose "
        "yourself which latents share: groups=[(...), ...]. Or draw fewer particles."
    )
    return structure, cut, [*notices, notice]


def _inside(structure: Structure, read: Ordinal, plates: Ordinal) -> Ordinal:
    """Return the indices in some plates that a site reads together with others outside of them."""
    together = [structure.indices_read(site) for site in structure.model.values()]
    beside = frozenset[str]().union(*(symbols for symbols in together if symbols & read))
    return frozenset(s for s in beside - read if structure.by_symbol[s].plates & plates)


def _shared_notice(structure: Structure, symbols: Ordinal, plates: Ordinal) -> str:
    names = {structure.plates[symbol].name for symbol in plates}
    sites = structure.named(symbols)
    word = "plate" if len(names) == 1 else "plates"
    return (
        f"many latents outside of {word} {quoted(names)} decide together which of its elements are "
        f"read, too many to sum over {quoted(sites)} for each of their combinations. So there is "
        "one particle index for all of these elements, and more particles are needed for the same "
        "accuracy. What helps: a guide near the posterior for these sites, or a larger "
        "num_samples. To silence this: shared_plates=[...]."
    )


def _one_by_one(structure: Structure, site: str) -> Structure:
    """Return a structure that is to be run once for each particle."""
    obstacle = Obstacle(
        f"site '{site}' reads too many latents to combine their particles",
        "draw fewer particles, or split the site into several, each of which reads few latents",
    )
    model = {**structure.model, site: replace(structure.model[site], obstacle=obstacle)}
    return replace(structure, model=model)


def _mergeable(structure: Structure, read: Ordinal) -> tuple[Index, Index] | None:
    """Return two of some indices that may become one: those with the fewest values."""

    def size(index: Index) -> int:
        return sum(structure.proposal_site(site).shape.numel() for site in index.sites)

    indices = [i for i in structure.indices if i.symbol in read and not i.enumerated]
    pairs = [
        (one, other)
        for one, other in itertools.combinations(sorted(indices, key=size), 2)
        if one.plates == other.plates and structure.detour((*one.sites, *other.sites)) is None
    ]
    return min(pairs, key=lambda pair: size(pair[0]) + size(pair[1]), default=None)
