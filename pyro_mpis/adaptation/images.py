# SPDX-License-Identifier: Apache-2.0
"""
A group of maps of latents under which a posterior stays the same: turned signs, exchanged labels.

A guide that is at one of these images can be spread evenly over all of them (docs/design.md).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mpis.adaptation.gaussian import Gaussian

MOST_IMAGES = 8  # of one posterior: three signs, or three labels; each costs as much as one
IMAGE_SITE = "_mpis_image"  # of a guide: which image
MODE_SITE = "_mpis_mode"  # of a guide: which of its Gaussians

Names = tuple[str, ...]  # of latents that are alike, and change places with each other


@dataclass(frozen=True)
class Images:
    """
    Maps of the values of latents, of which the first changes nothing.

    They are a group: one after the other they are one of these maps.
    """

    number: int
    block: int  # by whose density images are told apart
    element: Tensor  # whether it is that element of the block's plates: ``(*batch dims)``
    signs: Mapping[str, Tensor] = field(default_factory=dict)  # 1 or -1: ``(number,)``
    orders: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)  # ``(number, size)``
    shares: Mapping[str, Tensor] = field(default_factory=dict)  # whether p becomes 1 - p
    alike: Mapping[Names, Tensor] = field(default_factory=dict)  # ``(number, size)``

    def of(self, values: Mapping[str, Tensor], which: Tensor | int) -> dict[str, Tensor]:
        """Return the values at one image."""
        result = dict(values)
        for name in values.keys() & self.signs.keys():
            value = values[name]
            result[name] = value * row_of(self.signs[name], which).to(value)
        for name in values.keys() & self.shares.keys():
            value = values[name]
            result[name] = torch.where(row_of(self.shares[name], which), 1 - value, value)
        for (name, dim), orders in self.orders.items():
            if name in values:
                row = row_of(orders, which).to(result[name].device)
                result[name] = result[name].index_select(dim, row)
        for names, orders in self.alike.items():
            if values.keys() >= set(names):
                stacked = torch.stack([result[name] for name in names])
                moved = stacked.index_select(0, row_of(orders, which).to(stacked.device))
                result |= dict(zip(names, moved.unbind(0), strict=True))
        return result

    def reaches(self, names: Iterable[str]) -> bool:
        """Whether it changes all of these latents by themselves."""
        changed = {*self.signs, *self.shares, *(name for name, _ in self.orders)}
        return changed.issuperset(names)


@dataclass(frozen=True)
class Modes:
    """Gaussians of a guide, each at another mode of the posterior."""

    gaussians: tuple[Gaussian, ...]
    block: int  # by whose density they are told apart
    element: Tensor  # whether it is that element of the block's plates: ``(*batch dims)``


def end_of(mode: int) -> str:
    """Return the end of the names of a mode's parameters."""
    return f"_{mode}" if mode else ""


def particles_of(images: Images | None, modes: int, *, is_final: bool) -> dict[str, int]:
    """
    Return the numbers of particles of a guide's images and modes: one of each.

    The evidence of any image is the same, so one is enough for trials.

    :param modes: number of modes that the guide chooses from.
    """
    result = {} if modes == 1 else {MODE_SITE: modes}
    if images is not None:
        result[IMAGE_SITE] = images.number if is_final else 1
    return result


def which_image(uniform: Tensor, number: int) -> Tensor:
    """Return the number of an image, from a uniform number between 0 and 1."""
    return (uniform * number).long().clamp(max=number - 1)


def row_of(table: Tensor, which: Tensor | int) -> Tensor:
    """Return a row of a table; its number may be mapped, so nothing looks at it."""
    index = torch.as_tensor(which, device=table.device).reshape(1)
    return table.index_select(0, index).squeeze(0)


def signs_of(generators: Sequence[frozenset[str]]) -> dict[str, Tensor]:
    """Return the signs of latents in each image, where sets of them turn together."""
    every = itertools.product((False, True), repeat=len(generators))
    chosen = [list(zip(takes, generators, strict=True)) for takes in every]
    names = sorted(frozenset().union(*generators))
    return {
        name: torch.tensor(
            [
                math.prod(-1 if take and name in turned else 1 for take, turned in row)
                for row in chosen
            ]
        )
        for name in names
    }


def orders_of(size: int, labels: Sequence[int]) -> Tensor:
    """Return all orders of some of the elements: ``(orders, size)``, the first as they are."""
    rows = []
    for moved in itertools.permutations(labels):
        row = list(range(size))
        for label, other in zip(labels, moved, strict=True):
            row[label] = other
        rows.append(row)
    return torch.tensor(rows)
