# SPDX-License-Identifier: Apache-2.0
"""Which random sites share a particle index, and in which plates an index differs."""

from collections.abc import Mapping, Sequence

from pyro_mpis._text import quoted
from pyro_mpis.programs.structure import Origin, Site


def clusters_of(
    origins: Mapping[str, Origin],
    guide: Mapping[str, Site],
    carried: Mapping[str, frozenset[str]],
    guide_factors: Sequence[str],
    groups: Sequence[Sequence[str]],
) -> list[tuple[str, ...]]:
    """Return the random sites that need an index, those of one group together."""
    carriers = frozenset[str]().union(*carried.values(), *(guide[f].reads for f in guide_factors))
    names = [name for name in guide if name in carriers and origins.get(name) != "enumerated"]
    names += [
        name
        for name, origin in origins.items()
        if origin in ("guide", "prior", "enumerated") and name not in names
    ]
    cluster_of: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    grouped: dict[str, tuple[str, ...]] = {}
    for group in groups:
        if isinstance(group, str):
            raise ValueError(f"groups: expected a sequence of site names, but found '{group}'.")
        members: list[str] = []
        for name in group:
            if name not in origins:
                raise ValueError(
                    f"groups: the model has no latent site '{name}'. Its latent sites are "
                    f"{quoted(set(origins))}."
                )
            if origins[name] in ("enumerated", "model_delta"):
                raise ValueError(
                    f"groups: site '{name}' has no particles to share: it is summed over its "
                    "support, or a Delta. Leave it out of the group."
                )
            own = sorted(carried.get(name, {name}), key=names.index)
            members += [site for site in own if site not in members]
        for site in members:
            if site in grouped and grouped[site] != tuple(group):
                raise ValueError(
                    f"groups: site '{site}' is in {grouped[site]} and in {tuple(group)}. A site "
                    "has one particle index: merge the two groups."
                )
            grouped[site] = tuple(group)
            cluster_of[site] = tuple(members)
    return list(dict.fromkeys(cluster_of[name] for name in names))


def index_plates(
    name: str,
    guide: Mapping[str, Site],
    model: Mapping[str, Site],
    carried: Mapping[str, frozenset[str]],
    origins: Mapping[str, Origin],
) -> frozenset[str]:
    """Return the plates in which a random site is drawn independently, in guide and in model."""
    inside = [model[name].plates] if name in model else []
    if origins.get(name) not in ("prior", "enumerated"):
        inside.append(guide[name].plates)
        for carried_site, carriers in carried.items():
            if name in carriers:
                inside += [model[carried_site].plates, guide[carried_site].plates]
    return frozenset.intersection(*inside)
