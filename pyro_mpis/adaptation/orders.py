# SPDX-License-Identifier: Apache-2.0
"""
Find other orders of labels where no order is exactly as good as the one that a guide is in.

If the components of a mixture have priors of their own, or shares of their own, another order of
them is often another mode of the posterior: a better one, one nearly as good, or a negligible one.
The joint density, where a draw has its labels exchanged, says which orders are worth a fit.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import Images
from pyro_mpis.adaptation.labels import (
    MOST_PAIRS,
    Axis,
    axes_of,
    ends_of,
    exchange_of,
    is_far,
    subsets,
)
from pyro_mpis.adaptation.layout import Block
from pyro_mpis.adaptation.log_joint import LogJoint
from pyro_mpis.adaptation.parametrisation import Read
from pyro_mpis.adaptation.start import Start
from pyro_mpis.programs.handlers import isolated
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.tensors import unwrapped

APART = 2.0  # sds between medians of two elements, from which on labels count as such
WORTH = 10.0  # nats of the joint density below the best order, beyond which a fit is not worth it
MOST_AXES = 2  # choices of latents in which labels are exchanged that are looked at
FEW_LABELS = 4  # of which all orders are looked at
DRAWS = (4, 64)  # of a guide, at which joint densities are compared
WORK = 3e5  # densities of these draws, for each order
MOST_ROUNDS = 3  # of exchanges of two, of more labels
STEPS = 17  # on the way from an exchanged place to the guide
BARRIER = 0.1  # nats by which the density falls on the way from one mode to another

Order = tuple[int, ...]


@dataclass(frozen=True)
class Orders:
    """Other orders of the labels of some latents, the most promising first."""

    exchanges: Images  # a row for each, the first of which changes nothing
    gains: tuple[float, ...]  # of the log joint density at a draw; zero for the first


def near_orders(start: Start, guide: AutoPlateNormal) -> list[Orders]:
    """
    Find orders of labels of which the joint density says that they may matter.

    :param guide: which is at one mode, and may be spread over exact images of it.
    """
    axes = axes_of(start)
    if not axes:
        return []
    found: list[Orders] = []
    images, guide = guide.images, guide.at_one()
    ends = ends_of(start, guide)
    draws = guide.draws(_draws_for(start), start.programs.args, start.programs.kwargs)
    for size, group in axes.items():
        choices = [
            (moved, pairs)
            for moved in subsets(group)
            if all(name in start.priors for axis in moved for name, _ in axis)
            if (pairs := _far_pairs(ends, moved, size))
        ]
        if not choices:
            continue
        found += _orders_of(start, images, draws, size, choices)
    return found


Choice = tuple[tuple[Axis, ...], list[tuple[int, int]]]  # axes, and pairs that are far apart there


def _orders_of(
    start: Start,
    images: Images | None,
    draws: Mapping[str, Tensor],
    size: int,
    choices: Sequence[Choice],
) -> list[Orders]:
    """Return the orders of labels of one number that may matter."""
    same = tuple(range(size))
    tried = [(moved, _swapped(same, p)) for moved, pairs in choices for p in pairs[:MOST_PAIRS]]
    gains = _gains(start, draws, tried)
    best: dict[tuple[Axis, ...], float] = {}
    for (moved, _), gain in zip(tried, gains, strict=True):
        best[moved] = max(gain, best.get(moved, gain))
    likely = sorted((moved for moved in best if best[moved] > -WORTH), key=lambda m: -best[m])
    found = []
    for moved, pairs in choices:
        if moved not in likely[:MOST_AXES]:
            continue
        by_order = _all_gains(start, draws, moved, pairs, same)
        known = _images_of(images, moved, same)
        top = max(0.0, *by_order.values())
        orders: list[Order] = []
        for order in sorted(by_order, key=lambda order: -by_order[order]):
            if by_order[order] > top - WORTH and order not in known:
                orders.append(order)
                known |= {tuple(order[n] for n in row) for row in _images_of(images, moved, same)}
        orders = _beyond_a_barrier(start, draws, moved, same, orders)
        if orders:
            exchanges = exchange_of(moved, torch.tensor([same, *orders]))
            found.append(Orders(exchanges, (0.0, *(by_order[order] for order in orders))))
    return sorted(found, key=lambda orders: -max(orders.gains[1:]))


def _beyond_a_barrier(
    start: Start,
    draws: Mapping[str, Tensor],
    moved: tuple[Axis, ...],
    same: Order,
    orders: Sequence[Order],
) -> list[Order]:
    """
    Return the orders from which the density falls somewhere on the straight way back to the guide.

    Where it only rises there is no other mode, as from anywhere if the density is log-concave.
    """
    if not orders:
        return []
    exchanges = exchange_of(moved, torch.tensor([same, *orders]))
    rows = [exchanges.of(draws, n) for n in range(len(orders) + 1)]
    values = {name: torch.cat([row[name] for row in rows]) for name in start.priors}
    ways = []
    for numbers in numbers_of(start, start.blocks, frozenset(), values):
        here, *far = numbers.unflatten(0, (len(rows), -1)).mean(1)
        share = torch.linspace(0.0, 1.0, STEPS, dtype=here.dtype, device=here.device)
        share = share.reshape(-1, *(1,) * here.dim())
        ways.append(torch.cat([torch.lerp(there, here, share) for there in far]))
    heights = log_joint_at(start, ways).reshape(len(orders), STEPS)
    falls = heights.cummax(-1).values - heights
    keep = ~(falls.amax(-1) < BARRIER)  # also where the density is not finite
    return [order for order, is_kept in zip(orders, keep.tolist(), strict=True) if is_kept]


def _images_of(images: Images | None, moved: Sequence[Axis], same: Order) -> set[Order]:
    """Return the orders of these axes that a guide reaches by exact images."""
    dims = {(name, dim) for name, dim in itertools.chain(*moved) if dim is not None}
    if images is None or not dims or dims != images.orders.keys():
        return {same}
    (rows, *_) = images.orders.values()
    return {tuple(row) for row in rows.tolist()}


def _far_pairs(
    ends: Mapping[str, Tensor], moved: Sequence[Axis], size: int
) -> list[tuple[int, int]]:
    every = itertools.combinations(range(size), 2)
    return [pair for pair in every if is_far(ends, moved, pair, APART)]


def _swapped(order: Order, pair: tuple[int, int]) -> Order:
    one, other = pair
    result = list(order)
    result[one], result[other] = order[other], order[one]
    return tuple(result)


def _all_gains(
    start: Start,
    draws: Mapping[str, Tensor],
    moved: tuple[Axis, ...],
    pairs: Sequence[tuple[int, int]],
    same: Order,
) -> dict[Order, float]:
    """Return the gain of each order; of many labels, of those that exchanges lead to."""
    labels = sorted({label for pair in pairs for label in pair})
    if len(labels) <= FEW_LABELS:
        permutations: list[Order] = []
        for permuted in itertools.permutations(labels):
            moved_to = dict(zip(labels, permuted, strict=True))
            permutations.append(tuple(moved_to.get(label, label) for label in same))
        gains = _gains(start, draws, [(moved, order) for order in permutations[1:]])
        return dict(zip(permutations[1:], gains, strict=True))
    found = {same: 0.0}
    at = same
    for _ in range(MOST_ROUNDS):
        around = (_swapped(at, pair) for pair in pairs)
        orders = [order for order in around if order not in found]
        gains = _gains(start, draws, [(moved, order) for order in orders])
        found |= dict(zip(orders, gains, strict=True))
        best = max(found, key=lambda order: found[order])
        if best == at:
            break
        at = best
    del found[same]
    return found


def _gains(
    start: Start, draws: Mapping[str, Tensor], moves: Sequence[tuple[tuple[Axis, ...], Order]]
) -> list[float]:
    """
    Estimate how much more mass of the posterior is where each move leads; -inf where that fails.

    The mean ratio of the joint density after a move to that before is that of the masses, for draws
    of the posterior: a move keeps the volume.
    """
    if not moves:
        return []
    same = tuple(range(len(moves[0][1])))
    rows = [draws]
    rows += [exchange_of(moved, torch.tensor([same, order])).of(draws, 1) for moved, order in moves]
    values = {name: torch.cat([row[name] for row in rows]) for name in start.priors}
    before, *after = log_joints_of(start, values).reshape(len(rows), -1)
    ratios = (torch.stack(after) - before).nan_to_num(-math.inf)
    gains: list[float] = (ratios.logsumexp(-1) - math.log(len(before))).tolist()
    return gains


def log_joints_of(start: Start, values: Mapping[str, Tensor]) -> Tensor:
    """
    Return the log joint density in unconstrained numbers: ``(points,)``; nan where that fails.

    :param values: of each continuous latent: ``(points, *shape)``.
    """
    points = len(next(iter(values.values())))
    try:
        return log_joint_at(start, numbers_of(start, start.blocks, frozenset(), values))
    except (NotMappableError, NotImplementedError, ValueError, RuntimeError, ArithmeticError):
        return torch.full((points,), math.nan, dtype=torch.double)


def log_joint_at(start: Start, numbers: Sequence[Tensor]) -> Tensor:
    """Return the log joint density at numbers of each block: ``(points,)``; nan if that fails."""
    log_joint = LogJoint(
        start.programs,
        start.structure,
        start.blocks,
        frozenset(),
        start.supports,
        start.others,
    )
    try:
        with torch.no_grad():
            return log_joint(numbers)
    except (NotMappableError, NotImplementedError, ValueError, RuntimeError, ArithmeticError):
        return torch.full((len(numbers[0]),), math.nan, dtype=torch.double)


def _draws_for(start: Start) -> int:
    """Return the number of draws that are worth their densities, an even one."""
    rows = sum(block.size for block in start.blocks)
    few, many = DRAWS
    return max(few, min(many, 2 * int(WORK / start.work * rows / 2)))


def numbers_of(
    start: Start,
    blocks: Sequence[Block],
    non_centred: frozenset[str],
    values: Mapping[str, Tensor],
) -> list[Tensor]:
    """
    Return the unconstrained numbers of each block: ``(points, *batch dims, D)``.

    :param values: of each continuous latent: ``(points, *shape)``.
    """
    free: dict[str, Tensor] = {}
    programs = start.programs

    def at_single_values(given: dict[str, Tensor]) -> None:
        with isolated(), Read(given, non_centred, start.others) as read:
            programs.model(*programs.args, **programs.kwargs)
        for name in given:
            free[name] = unwrapped(read.numbers[name]).tensor

    run_mapped(at_single_values, [dict(values)], patched=True)
    points = len(next(iter(values.values())))
    free = {
        name: f if f.dim() and len(f) == points else f.expand(points, *f.shape)
        for name, f in free.items()
    }
    return [block.joined(free) for block in blocks]
