# SPDX-License-Identifier: Apache-2.0
"""Give each particle index its number of particles."""

from collections.abc import Mapping
from dataclasses import replace

from pyro_mpis._text import quoted
from pyro_mpis.programs.structure import Structure


def with_numbers(structure: Structure, rest: int, numbers: Mapping[str, int]) -> Structure:
    """
    Give each index its number of particles.

    :param rest: number of each index that none of the sites below names.
    :param numbers: by site: a random site, any member of a group, or a carried site, for what it is
        computed from.
    :raises ValueError: if a site has no particles, or an index is given two numbers.
    """
    named: dict[str, dict[str, int]] = {}
    for name, number in numbers.items():
        named.setdefault(index_named(structure, name), {})[name] = number
    for by_site in named.values():
        if len(set(by_site.values())) > 1:
            raise different_numbers(by_site)
    indices = [
        replace(index, num_samples=next(iter(named.get(index.symbol, {"": rest}).values())))
        for index in structure.indices
    ]
    return replace(structure, indices=tuple(indices))


def different_numbers(by_site: Mapping[str, int]) -> ValueError:
    """Refuse different numbers of sites that share an index."""
    given = ", ".join(f"'{name}': {number}" for name, number in by_site.items())
    return ValueError(
        f"num_samples: {quoted(by_site)} share one particle index, but have different "
        f"numbers of particles ({given}). Give one number, to any of them."
    )


def index_named(structure: Structure, name: str) -> str:
    """
    Return the symbol of the index that a site names.

    A carried site names what it is computed from; of several indices, that in its own plates.

    :raises ValueError: if there is none, or are several.
    """
    if name in structure.index_of:
        return structure.index_of[name].symbol
    if name not in structure.carried:
        what = "has no particles" if name in structure.origins else "no such latent site"
        raise ValueError(
            f"num_samples: '{name}': {what}. The sites with particles are "
            f"{quoted({*structure.index_of, *_carried_by_one(structure)}) or 'none'}."
        )
    indices = [structure.by_symbol[s] for s in structure.indices_read(structure.guide[name])]
    if len(indices) > 1:
        plates = structure.model[name].plates
        inside = [index for index in indices if index.plates == plates]
        indices = inside if len(inside) == 1 else indices
    if len(indices) != 1:
        sites = quoted({site for index in indices for site in index.sites})
        raise ValueError(
            f"num_samples: '{name}' has no particles of its own: the guide computes it from "
            f"{sites or 'no random site'}. Give numbers for these."
        )
    return indices[0].symbol


def _carried_by_one(structure: Structure) -> list[str]:
    """Return the carried sites that are computed from one index."""
    return [n for n in structure.carried if len(structure.indices_read(structure.guide[n])) == 1]


def unnumbered(structure: Structure, numbers: Mapping[str, int], rest: int) -> list[str]:
    """
    Say which sites have no number of particles given, if there are any.

    :param rest: the number that they get.
    """
    named = {index_named(structure, name) for name in numbers}
    sites = {
        site
        for index in structure.indices
        if not index.enumerated and index.symbol not in named
        for site in index.sites
    }
    if not sites:
        return []
    return [
        f"num_samples gives no number for {quoted(sites)}: {rest} particles of each are drawn, "
        "which is few. Give one to all others: num_samples={..., None: 100}."
    ]
