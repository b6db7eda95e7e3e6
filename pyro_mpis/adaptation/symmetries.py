# SPDX-License-Identifier: Apache-2.0
"""Spread a guide over exact images of the posterior; say which it does not reach."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_mpis.adaptation.alike import alike_labels
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import MOST_IMAGES, Images, orders_of, signs_of
from pyro_mpis.adaptation.labels import (
    Labels,
    ends_of,
    exchange_of,
    far_labels,
    told_of_labels,
)
from pyro_mpis.adaptation.layout import Block, Part
from pyro_mpis.adaptation.mirrors import halves, mirrors, told_of_halves
from pyro_mpis.adaptation.start import Start
from pyro_mpis.programs.environment import seeded

APART = 2.0  # sds between medians of two images, from which on a guide is spread over both


class Symmetries:
    """Maps under which a model's posterior stays the same."""

    def __init__(self, start: Start) -> None:
        self._start = start

    @cached_property
    def _turning(self) -> list[frozenset[str]]:
        return mirrors(self._start)

    def spread(self, guide: AutoPlateNormal) -> AutoPlateNormal:
        """Return a guide that is spread over images, if it is at one; else the guide itself."""
        if guide.images is not None:
            return guide
        with seeded(0):
            ends: dict[str, Tensor] = {}
            for images in self._candidates(guide):
                ends = ends or ends_of(self._start, guide)
                found = _told_apart(guide, images, ends)
                if found is not None:
                    return guide.with_images(found)
        return guide

    def _candidates(self, guide: AutoPlateNormal) -> Iterator[Images]:
        """Yield groups of images, of most signs first; which block tells is not yet known."""
        generators = halves(self._turning, self._start, guide, APART / 2)
        nothing = torch.zeros(())
        most = MOST_IMAGES.bit_length() - 1
        for number in range(min(most, len(generators)), 0, -1):
            yield Images(2**number, 0, nothing, signs=signs_of(generators[:number]))
        for find in (far_labels, alike_labels):
            for labels in find(self._start, guide, APART):
                if labels.orders <= MOST_IMAGES and self._share_an_index(labels, guide):
                    orders = orders_of(labels.size, labels.elements)
                    yield exchange_of(labels.axes, orders, labels.alike)

    def _share_an_index(self, labels: Labels, guide: AutoPlateNormal) -> bool:
        """Whether labels are exchanged within events, or between elements of one particle."""
        blocks = [{part.name for part in block.parts} for block in guide.blocks]
        if not all(any(block.issuperset(names) for block in blocks) for names in labels.alike):
            return False
        plates = {part.name: block.plates for block in guide.blocks for part in block.parts}
        model = self._start.structure.model
        sites = [(name, dim) for axis in labels.axes for name, dim in axis]
        return all(
            dim is None or -dim <= model[name].event_dim or not plates.get(name, (None,))
            for name, dim in sites
        )

    def told(self, guide: AutoPlateNormal, *, is_sure: bool) -> list[str]:
        """
        Say which images a guide does not reach, or hardly.

        :param is_sure: whether trial runs agree. Then a guide whose tails reach all of the prior
            has found all orders of labels.
        """
        with seeded(0):
            return self._told(guide, is_sure=is_sure)

    def _told(self, guide: AutoPlateNormal, *, is_sure: bool) -> list[str]:
        is_global = len(guide.blocks) == 1 and not guide.blocks[0].plates
        reaches_all = is_global and guide.reaches_prior
        images = guide.images
        told = []
        if not reaches_all:
            missed = halves(self._turning, self._start, guide)
            if images is not None:
                missed = [names for names in missed if not images.reaches(names)]
            told += [told_of_halves(missed)] if missed else []
        if reaches_all and is_sure:
            return told
        for labels in far_labels(self._start, guide):
            if guide.num_modes >= labels.orders:
                continue  # each order is a mode of the guide
            if images is None or not images.reaches(labels.names):
                told.append(told_of_labels(labels, reaches_all=reaches_all))
        for labels in alike_labels(self._start, guide):
            told.append(told_of_labels(labels, reaches_all=reaches_all, are_latents=True))
        return told


def _told_apart(
    guide: AutoPlateNormal, images: Images, ends: Mapping[str, Tensor]
) -> Images | None:
    """
    Return images with the block, and its element, that tells them apart best; None if none.

    :param ends: of the guide's intervals of one sd, see :func:`ends_of`.
    """
    best, result = APART, None
    for block in guide.blocks:
        if not guide.tells_images_apart(block):
            continue
        distance = torch.stack(
            [_distance(block, images, which, ends) for which in range(1, images.number)]
        ).amin(0)
        if float(distance.max()) > best:
            best = float(distance.max())
            element = torch.arange(distance.numel(), device=distance.device) == distance.argmax()
            result = replace(images, block=block.number, element=element.reshape(block.shape))
    return result


def _distance(block: Block, images: Images, which: int, ends: Mapping[str, Tensor]) -> Tensor:
    """Return how many sds an image is away, in each element of a block: ``(*batch dims)``."""
    medians = {name: median for name, (_, median, _) in ends.items()}
    widths = {name: 0.5 * (high - low) for name, (low, _, high) in ends.items()}
    moved, wide = images.of(medians, which), images.of(widths, which)
    result = torch.zeros(block.shape, device=ends[block.parts[0].name].device)
    for part in block.parts:
        median, width = medians[part.name], widths[part.name]
        other = width if part.name in images.shares else wide[part.name].abs()
        distance = (median - moved[part.name]).abs()
        distance = distance / torch.maximum(width, other).clamp(min=1e-30)
        result = torch.maximum(result, _largest(block, part, distance))
    return result


def _largest(block: Block, part: Part, tensor: Tensor) -> Tensor:
    """Take the maximum over all numbers of a site that are in the same element of its block."""
    tensor = tensor.reshape((*part.batch_shape, -1)).amax(-1)
    if part.own_dims:
        tensor = tensor.amax(part.own_dims, keepdim=True)
    return tensor.reshape(block.shape)
