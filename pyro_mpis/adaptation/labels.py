# SPDX-License-Identifier: Apache-2.0
"""
Find labels that can be exchanged, as those of a mixture's components or of hidden states.

They are elements of a plate, or of vectors, of one size. A probability p may stand for the shares
p and 1 - p of two. Labels are exchanged in some of these at once, and the joint density is
compared, enumerated latents summed out. A learned proposal that has the elements far apart is at
one of many images of the same evidence.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._text import quoted
from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.images import Images, Names
from pyro_mpis.adaptation.mirrors import FAR
from pyro_mpis.adaptation.start import Start
from pyro_mpis.blocks import run_plan
from pyro_mpis.options import Options
from pyro_mpis.planning import plan_of
from pyro_mpis.programs.environment import seeded
from pyro_mpis.programs.messages import statements
from pyro_mpis.workers import Workers

MOST_LABELS = 20  # of more, elements of a plate are data, not labels
MOST_AXES = 4  # that are exchanged together: the joint density is evaluated for each subset
MOST_PAIRS = 3  # of elements that are far apart, after which labels count as fixed
DRAWS = 256  # of a guide, for the medians and sds of its latents
POINTS = 4  # draws of a guide, of which the joint density is compared at the best
TOLERANCE = 1e-5

# sites and dims that are exchanged together, from the right; no dim: p becomes 1 - p
Axis = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Labels:
    """Elements that can be exchanged, and that a guide has far apart."""

    elements: tuple[int, ...]
    size: int  # number of all elements
    axes: tuple[Axis, ...]
    alike: tuple[Names, ...] = ()  # latents that are elements by themselves

    @property
    def orders(self) -> int:
        """In how many orders the elements can be."""
        return math.factorial(len(self.elements))

    @property
    def names(self) -> set[str]:
        """The names of the latents in which they are exchanged."""
        of_axes = {name for axis in self.axes for name, _ in axis}
        return of_axes | {names[label] for names in self.alike for label in self.elements}


def far_labels(start: Start, guide: AutoPlateNormal, far: float = FAR) -> list[Labels]:
    """
    Find labels that a guide has in one order of many that are as good.

    :param far: sds between medians of two elements.
    """
    axes = axes_of(start)
    if not axes:
        return []
    ends = ends_of(start, guide)
    point: Point | None = None
    found = []
    for size, group in axes.items():
        every = itertools.combinations(range(size), 2)
        pairs = [pair for pair in every if is_far(ends, group, pair, far)]
        if not pairs:
            continue
        with seeded(0):
            point = point or best_point(start, guide)
            moved = _exchangeable(start, point, group, pairs[:MOST_PAIRS])
        if moved:
            same = [pair for pair in pairs if is_same(start, point, moved, *pair)]
            elements = sorted({label for pair in same for label in pair})
            found.append(Labels(tuple(elements), size, moved))
    return found


def ends_of(start: Start, guide: AutoPlateNormal) -> dict[str, Tensor]:
    """Return where an interval of one sd starts, its median and its end, of some draws: (3, *)."""
    call = start.programs
    draws = guide.draws(DRAWS, call.args, call.kwargs)
    bounds = (0.16, 0.5, 0.84)
    return {name: draw.quantile(draw.new_tensor(bounds), 0) for name, draw in draws.items()}


def told_of_labels(found: Labels, *, reaches_all: bool, are_latents: bool = False) -> str:
    """
    Say that a guide has labels in one order.

    :param are_latents: whether labels are latents with names of their own, not elements of some.
    :param reaches_all: whether the guide's tails reach all of the prior.
    """
    orders = found.orders
    what = (
        "has them mostly in one, and few of its particles find the others"
        if reaches_all
        else f"has them in one: add up to log {orders} = {math.log(orders):.4f} to the log "
        "evidence, and take moments of these latents as those of one order"
    )
    of_each = "" if are_latents else f"{len(found.elements)} elements of "
    return (
        f"{of_each}{quoted(sorted(found.names))} can change places, and "
        f"the posterior is the same. Of up to {orders} orders, the learned proposal {what}. A "
        "prior that puts them in order would leave one mode of the posterior."
    )


@dataclass(frozen=True)
class Point:
    """Values of the latents, and the log joint density there."""

    values: Mapping[str, Tensor]
    log_joint: float


def _latents(start: Start) -> list[str]:
    """Return the latents that are not summed over."""
    known = start.priors.keys() | start.others.keys() - start.supports.keys()
    return [name for name in start.sites if name in known]


def exchange_of(axes: Sequence[Axis], orders: Tensor, alike: Sequence[Names] = ()) -> Images:
    """Return the exchange of labels in some axes and alike latents, with a row for each order."""
    sites = [(name, dim) for axis in axes for name, dim in axis]
    return Images(
        len(orders),
        0,
        torch.zeros(()),
        orders={(name, dim): orders for name, dim in sites if dim is not None},
        shares={name: orders[:, 0] != 0 for name, dim in sites if dim is None},
        alike=dict.fromkeys(alike, orders),
    )


def axes_of(start: Start) -> dict[int, list[Axis]]:
    """Return the plates and the event dims of latents, by their sizes."""
    found: dict[int, list[Axis]] = {}
    latents = _latents(start)
    for symbol, plate in start.structure.plates.items():
        inside = [name for name in latents if symbol in start.structure.model[name].plates]
        axis = tuple((name, plate.dim - start.structure.model[name].event_dim) for name in inside)
        if any(name in start.priors for name in inside):
            found.setdefault(plate.size, []).append(axis)
    for name in latents:
        site = start.structure.model[name]
        for dim in range(-site.event_dim, 0):
            found.setdefault(site.shape[dim], []).append(((name, dim),))
    if 2 in found:
        found[2] += shares_of(start)
    return {
        size: axes
        for size, axes in found.items()
        if 2 <= size <= MOST_LABELS and len(axes) <= MOST_AXES
    }


def shares_of(start: Start) -> list[Axis]:
    """Return the latents that are one probability: the shares p and 1 - p of two labels."""
    return [((name, None),) for name in _latents(start) if _is_share(start, name)]


def _is_share(start: Start, name: str) -> bool:
    """Whether a latent is one probability."""
    support = getattr(start.sites[name]["fn"], "support", None)
    is_unit = isinstance(support, constraints.interval) and (
        (support.lower_bound, support.upper_bound) == (0, 1)
    )
    return is_unit and math.prod(start.structure.model[name].shape) == 1


def is_far(
    ends: Mapping[str, Tensor], axes: Sequence[Axis], pair: tuple[int, int], far: float
) -> bool:
    """Whether two elements of some latent are many sds apart."""
    one, other = pair
    for name, dim in itertools.chain(*axes):
        if name in ends and dim is not None:
            low, median, high = ends[name]
            if dim + median.dim() < 0:
                continue
            distance = (median.select(dim, one) - median.select(dim, other)).abs()
            width = 0.5 * (high - low)
            width = torch.maximum(width.select(dim, one), width.select(dim, other))
            if bool((distance > far * width).any()):
                return True
    return False


def best_point(start: Start, guide: AutoPlateNormal) -> Point:
    """
    Return values of the latents in the bulk of the posterior: the best of some draws.

    Far from it the joint density is so low that an exchange is lost in its rounding.
    """
    call, names = start.programs, _latents(start)
    known = {name: start.sites[name]["value"].detach() for name in names}
    points = []
    with start.environment.entered():  # which takes the guide's parameters away again
        for _ in range(POINTS):
            sites = statements(poutine.trace(guide).get_trace(*call.args, **call.kwargs))
            drawn = {name: sites[name]["value"] for name in names if name in sites}
            values = {**known, **drawn}
            points.append(Point(values, _log_joint(start, values)))
    return max(points, key=lambda point: point.log_joint)


def _exchangeable(
    start: Start,
    point: Point,
    axes: Sequence[Axis],
    pairs: Sequence[tuple[int, int]],
) -> tuple[Axis, ...]:
    """Return axes in which a pair can be exchanged together; none if there are none."""
    for pair, moved in itertools.product(pairs, subsets(axes)):
        if is_same(start, point, moved, *pair):
            return moved
    return ()


def subsets(axes: Sequence[Axis]) -> Iterator[tuple[Axis, ...]]:
    """Yield all choices of axes, those of the fewest first."""
    for number in range(1, len(axes) + 1):
        yield from itertools.combinations(axes, number)


def is_same(start: Start, point: Point, moved: Sequence[Axis], one: int, other: int) -> bool:
    """Whether the joint density stays the same where two elements change places."""
    exchanged = dict(point.values)
    for name, dim in itertools.chain(*moved):
        value = exchanged[name]
        if dim is None:
            exchanged[name] = 1 - value
            continue
        if dim + value.dim() < 0:
            return False
        order = torch.arange(value.shape[dim], device=value.device)
        order[one], order[other] = other, one
        exchanged[name] = value.index_select(dim, order)
    before, after = point.log_joint, _log_joint(start, exchanged)
    return math.isfinite(before) and abs(after - before) <= TOLERANCE * max(1.0, abs(before))


def _log_joint(start: Start, values: Mapping[str, Tensor]) -> float:
    """Return the log joint density of latents and data, summed over enumerated latents."""
    model = poutine.condition(start.programs.model, data=dict(values))
    try:
        plan, *_ = plan_of(replace(start.programs, model=model), Options(num_samples=2))
        return float(run_plan(plan, Workers(show_progress=False)).log_evidence)
    except (ValueError, RuntimeError, NotImplementedError, ArithmeticError):
        return -math.inf  # as where an order that the model asks for is lost
