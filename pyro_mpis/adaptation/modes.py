# SPDX-License-Identifier: Apache-2.0
"""
Make a guide of several Gaussians, where other orders of labels are modes of their own.

From each promising order a fit starts anew, as the mode there has another shape. Those that end
elsewhere than all before are kept; trial runs tell their masses.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import MOST_IMAGES, Modes
from pyro_mpis.adaptation.labels import DRAWS
from pyro_mpis.adaptation.orders import Orders, log_joints_of, near_orders, numbers_of
from pyro_mpis.adaptation.start import Start

APART = 2.0  # sds between two modes
MANY_MODES = 24  # of models of little work: all orders of four labels
LITTLE_WORK = 1e4  # densities times rows of the Hessian
NEGLIGIBLE = 0.003  # share of the mass of orders of which no more are fitted
MOVED = 1024  # draws of a guide that are exchanged
ENOUGH = 15.0  # ESS of their weights for each number, in place of a fit
FEW = 3.0  # where there were many fits
TOLD = 0.02  # share of the posterior that is told if it is left out

Place = tuple[Tensor, Tensor]  # mean and sd of a block's numbers: (*batch dims, D) each
Refit = Callable[[Sequence[Place]], Gaussian | None]


@dataclass(frozen=True)
class Spread:
    """A guide of all modes that were found, and what is left."""

    guide: AutoPlateNormal
    left: float = 0.0  # about which share of the posterior is at orders that were not fitted
    orders: int = 1  # number of orders that may matter


def at_other_orders(start: Start, guide: AutoPlateNormal, refit: Refit) -> Spread:
    """
    Add Gaussians at other orders of labels, where these are other modes; draws random numbers.

    :param guide: of one mode, which may be spread over exact images.
    :param refit: fits a Gaussian from means and sds of all blocks; None where it fails.
    """
    with start.environment.entered():
        found = near_orders(start, guide)
        if not found:
            return Spread(guide)
        gaussians = [guide.gaussian()]
        places = [_places(start, guide, gaussians[0])]
        images = len(places[0])
        most = (MANY_MODES if start.work < LITTLE_WORK else MOST_IMAGES) // images
        draws = guide.at_one().draws(MOVED, start.programs.args, start.programs.kwargs)
        for orders in found:
            left = 1 - _share(orders, 0)
            refits = MOST_IMAGES // images - 1
            for which in range(1, len(orders.gains)):
                if len(gaussians) >= most or not (refits or left > NEGLIGIBLE):
                    break
                moved = orders.exchanges.of(draws, which)
                numbers = numbers_of(start, guide.blocks, guide.non_centred, moved)
                fitted = _weighed(start, draws, moved, numbers, ENOUGH if refits else FEW)
                if fitted is None and refits:
                    refits -= 1
                    fitted = refit(_place(numbers))
                if fitted is None:
                    continue
                left -= _share(orders, which)
                there = _places(start, guide, fitted)
                known = [place for of_mode in places for place in of_mode]
                if all(_apart(there[0], place) > APART for place in known):
                    gaussians.append(fitted)
                    places.append(there)
            if len(gaussians) > 1:
                guide = _told_apart(guide, gaussians, places)
                return Spread(guide, left, images * len(orders.gains))
    return Spread(guide)


def _weighed(
    start: Start,
    draws: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    numbers: Sequence[Tensor],
    enough: float,
) -> Gaussian | None:
    """
    Return the Gaussian of exchanged draws, weighed by the density there, if that is enough.

    It is if the weights are even, so that the mode has about the same shape. Only draws of one
    block outside of plates have joint weights.
    """
    if len(numbers) > 1 or numbers[0][0].numel() > numbers[0].shape[-1]:
        return None
    ratios = log_joints_of(start, moved) - log_joints_of(start, draws)
    weight = ratios.nan_to_num(-math.inf).softmax(0).nan_to_num(0.0)
    size = numbers[0].shape[-1]
    if 1 / float(weight.square().sum().clamp(min=1e-30)) < enough * size:
        return None
    mean = torch.einsum("k,k...->...", weight, numbers[0])
    centred = numbers[0] - mean
    covariance = torch.einsum("k,k...d,k...e->...de", weight, centred, centred)
    scale, info = torch.linalg.cholesky_ex(covariance)
    return None if bool(info.any()) else Gaussian([mean], [scale], {})


def _places(start: Start, guide: AutoPlateNormal, gaussian: Gaussian) -> list[list[Place]]:
    """Return where a Gaussian is, at each image."""
    call = start.programs
    at_one = guide.at_one().with_gaussian(gaussian)
    draws = at_one.draws(DRAWS, call.args, call.kwargs)
    number = 1 if guide.images is None else guide.images.number
    result = []
    for which in range(number):
        moved = draws if guide.images is None else guide.images.of(draws, which)
        result.append(_place(numbers_of(start, guide.blocks, guide.non_centred, moved)))
    return result


def _place(numbers: Sequence[Tensor]) -> list[Place]:
    return [(z.mean(0), z.std(0).clamp(min=1e-30)) for z in numbers]


def _distances(one: Sequence[Place], other: Sequence[Place]) -> list[Tensor]:
    """Return how many sds two places are apart in each element of each block."""
    return [
        ((mean - mean2).abs() / torch.maximum(sd, sd2)).amax(-1)
        for (mean, sd), (mean2, sd2) in zip(one, other, strict=True)
    ]


def _apart(one: Sequence[Place], other: Sequence[Place]) -> float:
    return max(float(distance.max()) for distance in _distances(one, other))


def _share(orders: Orders, which: int) -> float:
    """Return about which share of the mass of all orders one has."""
    highest = max(orders.gains)
    mass = [math.exp(gain - highest) for gain in orders.gains]
    return mass[which] / sum(mass)


def _told_apart(
    guide: AutoPlateNormal,
    gaussians: Sequence[Gaussian],
    places: Sequence[Sequence[Sequence[Place]]],
) -> AutoPlateNormal:
    """Return the guide of all modes, which the best block and element tell apart."""
    pairs = [
        (places[one][0], places[other][image])
        for one, other in itertools.product(range(len(places)), repeat=2)
        for image in range(len(places[0]))
        if (one, 0) != (other, image)
    ]
    of_pairs = [_distances(*pair) for pair in pairs]
    best, result = -math.inf, guide
    for block in guide.blocks:
        if guide.images is not None and not guide.tells_images_apart(block):
            continue
        distance = torch.stack([of_pair[block.number] for of_pair in of_pairs]).amin(0)
        if float(distance.max()) > best:
            best = float(distance.max())
            element = torch.arange(distance.numel(), device=distance.device) == distance.argmax()
            modes = Modes(tuple(gaussians), block.number, element.reshape(block.shape))
            result = guide.with_modes(modes)
    return result


def told_of_orders(spread: Spread) -> list[str]:
    """Say which orders of labels a guide does not reach, if they matter."""
    if spread.left < TOLD:
        return []
    return [
        f"the labels of a mixture have {spread.orders} orders that matter, none of them as good as "
        f"another. The learned proposal has the {spread.guide.num_modes} that seem best; about "
        f"{100 * spread.left:.0f} % of the posterior is at the others, and the log evidence is "
        f"about {-math.log1p(-spread.left):.2f} too low. A prior that puts the labels in order "
        "would leave one mode."
    ]
