# SPDX-License-Identifier: Apache-2.0
"""
Find labels that are latents with names of their own, such as ``loc0`` and ``loc1``.

Latents outside of plates are alike if they have one shape and one prior. Two of them that a guide
has far apart change places, with other such latents and with elements of one axis, and the joint
density is compared.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import Names
from pyro_mpis.adaptation.labels import (
    MOST_AXES,
    MOST_LABELS,
    MOST_PAIRS,
    Axis,
    Labels,
    Point,
    axes_of,
    best_point,
    ends_of,
    is_same,
    shares_of,
)
from pyro_mpis.adaptation.mirrors import FAR
from pyro_mpis.adaptation.start import Start
from pyro_mpis.programs.environment import seeded

MOST_NAMES = 60  # of one type and shape, above which their priors are not compared

Move = tuple[tuple[Names, ...], tuple[Axis, ...]]  # what changes places together


def alike_labels(start: Start, guide: AutoPlateNormal, far: float = FAR) -> list[Labels]:
    """
    Find latents of which any two can change places, and that a guide has in one order.

    :param far: sds between medians of two latents.
    """
    groups = alike(start)
    if not groups:
        return []
    ends = ends_of(start, guide)
    found: list[Labels] = []
    point: Point | None = None
    for names in groups:
        every = itertools.combinations(range(len(names)), 2)
        pairs = [pair for pair in every if _is_far(ends, names, pair, far)]
        if not pairs or any(labels.names.issuperset(names) for labels in found):
            continue
        with seeded(0):
            point = point or best_point(start, guide)
            tried = itertools.product(pairs[:MOST_PAIRS], _moves(start, groups, names))
            move = next((m for pair, m in tried if _is_same(start, point, m, pair)), None)
            if move is not None:
                same = [pair for pair in pairs if _is_same(start, point, move, pair)]
                found.append(_labels_of(names, move, same))
    return found


def alike(start: Start) -> list[Names]:
    """
    Return latents outside of plates that have one shape and one prior.

    Of names that end in numbers, those belong together that are the same but for the number.
    """
    groups: dict[object, list[str]] = {}
    for name in start.priors:
        site, fn = start.structure.model[name], start.sites[name]["fn"]
        if not site.plates:
            stem = re.sub(r"\d+$", "", name)
            key = stem if stem != name else None, type(fn), tuple(site.shape)
            groups.setdefault(key, []).append(name)
    few = [group for group in groups.values() if len(group) <= MOST_NAMES]
    parts = [part for group in few for part in _by_prior(start, group)]
    return [part for part in parts if 2 <= len(part) <= MOST_LABELS]


def _by_prior(start: Start, names: Sequence[str]) -> list[Names]:
    """Divide latents into those that have one prior."""
    parts: list[Names] = []
    for name in names:
        same = next((p for p in parts if _have_one_prior(start, (p[0], name))), None)
        if same is None:
            parts.append((name,))
        else:
            parts[parts.index(same)] = (*same, name)
    return parts


def _have_one_prior(start: Start, names: Sequence[str]) -> bool:
    """Whether each latent's prior has the same density, at the values of all of them."""
    fns = [start.sites[name]["fn"] for name in names]
    values = [start.sites[name]["value"].detach() for name in names]
    try:
        with torch.no_grad():
            densities = torch.stack([torch.stack([fn.log_prob(v) for v in values]) for fn in fns])
    except (ValueError, RuntimeError):  # as where a value is outside of another's support
        return False
    return bool(torch.isclose(densities, densities[:1]).all())


def _is_far(ends: Mapping[str, Tensor], names: Names, pair: tuple[int, int], far: float) -> bool:
    """Whether two latents are many sds apart."""
    (low, median, high), (low2, median2, high2) = (ends[names[label]] for label in pair)
    width = 0.5 * torch.maximum(high - low, high2 - low2)
    return bool(((median - median2).abs() > far * width).any())


def _moves(start: Start, groups: Sequence[Names], names: Names) -> Iterator[Move]:
    """
    Yield what may change places with latents, of the fewest first.

    One move after the other is another such move, so that orders of labels are a group.
    """
    others = [group for group in groups if group != names and len(group) == len(names)]
    axes = axes_of(start).get(len(names), shares_of(start) if len(names) == 2 else [])
    numbers = range(min(len(others) + len(axes), MOST_AXES - 1) + 1)
    for number, of_sites in itertools.product(numbers, numbers):
        of_axes = number - of_sites
        if of_axes >= 0:
            for chosen in itertools.combinations(others, of_sites):
                for moved in itertools.combinations(axes, of_axes):
                    if _treats_alike((names, *chosen), moved):
                        yield (names, *chosen), moved


def _treats_alike(sites: Sequence[Names], axes: Sequence[Axis]) -> bool:
    """Whether axes are exchanged in all of the latents that change places, or in none of them."""
    moved: dict[str, set[int | None]] = {}
    for name, dim in itertools.chain(*axes):
        moved.setdefault(name, set()).add(dim)
    first = {names: moved.get(names[0]) for names in sites}
    return all(moved.get(name) == first[names] for names in sites for name in names)


def _is_same(start: Start, point: Point, move: Move, pair: tuple[int, int]) -> bool:
    """Whether the joint density stays the same where two labels change places."""
    sites, axes = move
    one, other = pair
    values = dict(point.values)
    for names in sites:
        values[names[one]], values[names[other]] = values[names[other]], values[names[one]]
    return is_same(start, replace(point, values=values), axes, one, other)


def _labels_of(names: Names, move: Move, pairs: Sequence[tuple[int, int]]) -> Labels:
    sites, axes = move
    elements = sorted({label for pair in pairs for label in pair})
    return Labels(tuple(elements), len(names), axes, sites)
