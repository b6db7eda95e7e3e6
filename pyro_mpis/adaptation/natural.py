# SPDX-License-Identifier: Apache-2.0
r"""
Fit a plate-structured Gaussian to a log joint density by natural gradients.

The precision matrix follows the mean Hessian under the Gaussian, and the mean takes Newton steps
with it: the natural-gradient ascent of the ELBO (Khan and Rue 2023). It takes tens of iterations,
where stochastic gradients take thousands. Steps are kept within what the quadratic model can be
trusted for, and taken back if the ELBO falls.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mpis.adaptation.gaussian import Eliminated, Gaussian, eliminated
from pyro_mpis.adaptation.layout import Block
from pyro_mpis.adaptation.log_joint import Derivatives, Pair

FIRST_SCALES = (0.3, 0.03)  # sds at the start, of the prior's: vague priors have wild corners
LONGEST_STEP = 1.5  # of the mean, in sds
LARGEST_RATE, FIRST_RATE, LAST_RATE = 0.3, 0.1, 0.06
SMALLEST_RATE = 1e-4  # below, the fit has failed
WINDOW = 8  # iterations whose mean ELBOs are compared

Evaluate = Callable[[Sequence[Tensor]], Derivatives]


@dataclass(frozen=True)
class Settings:
    """How long to fit."""

    points: int = 8  # at which derivatives are averaged, an even number
    at_least: int = 20
    at_most: int = 150
    tail: int = 22  # iterations with falling rates, which average the noise out


@dataclass(frozen=True)
class Fitted:
    """A fitted Gaussian, and how well it went."""

    gaussian: Gaussian
    elbo: float
    error: float  # standard error of the ELBO
    settled: bool  # whether the fit ended by itself
    elbos: list[float] = field(default_factory=list)
    precision: dict[Pair, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _State:
    gaussian: Gaussian
    precision: dict[Pair, Tensor]
    derivatives: Derivatives
    elbo: float
    error: float

    @property
    def is_finite(self) -> bool:
        """Whether the ELBO and the derivatives are."""
        tensors = (*self.derivatives.gradient, *self.derivatives.hessian.values())
        return math.isfinite(self.elbo) and all(bool(t.isfinite().all()) for t in tensors)


def fit(
    blocks: Sequence[Block],
    evaluate: Evaluate,
    means: Sequence[Tensor],
    prior_sds: Sequence[Tensor],
    widths: Sequence[Tensor],
    coupled: Sequence[Pair],
    settings: Settings,
    tell: Callable[[float], None] = lambda elbo: None,
    resumed: Fitted | None = None,
    scales: Sequence[float] = FIRST_SCALES,
) -> Fitted:
    """
    Fit a Gaussian; draws random numbers.

    :param evaluate: the log joint and its derivatives at given numbers.
    :param means: where to start: ``(*batch dims, D)`` of each block.
    :param prior_sds: the scales of the numbers at the start, in the same shapes.
    :param widths: the sds of the numbers' prior, which those of the fit may exceed by little.
    :param coupled: the pairs of blocks that depend on each other.
    :param tell: called with the ELBO of each iteration.
    :param resumed: a fit of the same numbers to go on from, in place of the start; if it settled,
        only the tail is left to do.
    :param scales: sds to start with, in units of ``prior_sds``; others where the first fails.
    """
    pairs = [*((b.number, b.number) for b in blocks), *coupled]
    for scale in scales:
        precision: dict[Pair, Tensor] = {}
        for block, around in pairs:
            own = torch.diag_embed((scale * prior_sds[block]) ** -2)
            shape = (*blocks[block].shape, blocks[block].size, blocks[around].size)
            precision[block, around] = own if block == around else own.new_zeros(shape)
        if resumed is not None:
            precision = {pair: resumed.precision[pair] for pair in pairs}
            means = resumed.gaussian.means
        made = eliminated(blocks, precision, widths)
        start = Gaussian(list(means), made.scales(), made.couplings)
        state = _evaluated(blocks, evaluate, start, precision, settings.points)
        if state.is_finite:
            break
    rate, elbos, errors, limited = FIRST_RATE, [state.elbo], [state.error], [True]
    tail: int | None = None
    ended = False  # by itself
    if resumed is not None and resumed.settled:
        rate, tail, ended = LARGEST_RATE, settings.tail, True
    for _ in range(settings.at_most + settings.tail):
        if not state.is_finite:
            break
        proposed, was_limited = _next(blocks, evaluate, state, rate, widths, settings.points)
        if proposed is None or proposed.elbo < state.elbo - 1 - 3 * (state.error + proposed.error):
            rate /= 2.5
            if rate < SMALLEST_RATE:
                break
            if tail is None:
                continue
        else:
            state = proposed
            elbos.append(state.elbo)
            errors.append(state.error)
            limited.append(was_limited)
            tell(state.elbo)
        if tail is not None:
            tail -= 1
            rate = max(rate * 0.9, min(rate, LAST_RATE))
            if tail <= 0:
                break
        else:
            rate = min(1.4 * rate, LARGEST_RATE)
            ended = _settled(elbos, errors, limited, settings.at_least)
            if ended or len(elbos) > settings.at_most:
                tail = settings.tail
    settled = ended and not any(limited[-5:])
    last = elbos[-WINDOW:]
    error = max(errors[-WINDOW:]) / math.sqrt(len(last))
    return Fitted(state.gaussian, sum(last) / len(last), error, settled, elbos, state.precision)


def _settled(
    elbos: Sequence[float], errors: Sequence[float], limited: Sequence[bool], at_least: int
) -> bool:
    """Whether the ELBO does not rise any more, and no step was too long for its full length."""
    if len(elbos) < max(at_least, 2 * WINDOW) or any(limited[-5:]):
        return False
    now, before = elbos[-WINDOW:], elbos[-2 * WINDOW : -WINDOW]
    error = math.sqrt(sum(e**2 for e in errors[-WINDOW:])) / WINDOW
    return (sum(now) - sum(before)) / WINDOW < error + 0.05


def _next(
    blocks: Sequence[Block],
    evaluate: Evaluate,
    state: _State,
    rate: float,
    widths: Sequence[Tensor],
    points: int,
) -> tuple[_State | None, bool]:
    """Take a step; None if it leads out of where the density can be evaluated."""
    precision = {
        pair: (1 - rate) * old - rate * state.derivatives.hessian[pair]
        for pair, old in state.precision.items()
    }
    try:
        made: Eliminated = eliminated(blocks, precision, widths)
        scales = made.scales()
    except RuntimeError:  # torch.linalg.LinAlgError: not finite, or not positive definite
        return None, True
    step, own = made.solve(state.derivatives.gradient)
    narrow = Gaussian(state.gaussian.means, scales, made.couplings)
    sds = map(torch.maximum, state.gaussian.sds(), narrow.sds())
    longest = max(float((part.abs() / sd).max()) for part, sd in zip(own, sds, strict=True))
    share = min(1.0, LONGEST_STEP / max(rate * longest, 1e-12))
    means = [m + rate * share * s for m, s in zip(state.gaussian.means, step, strict=True)]
    gaussian = Gaussian(means, scales, made.couplings)
    if not gaussian.is_finite():
        return None, True
    proposed = _evaluated(blocks, evaluate, gaussian, precision, points)
    return (proposed if proposed.is_finite else None), share < 1


def _evaluated(
    blocks: Sequence[Block],
    evaluate: Evaluate,
    gaussian: Gaussian,
    precision: dict[Pair, Tensor],
    points: int,
) -> _State:
    shapes = [(*block.shape, block.size) for block in blocks]
    noise = [antithetic(points, shape).to(gaussian.means[0].device) for shape in shapes]
    derivatives = evaluate(gaussian.at(noise))
    pairs = derivatives.log_joints.reshape(2, -1).mean(0)
    elbo = float(pairs.mean()) + gaussian.entropy()
    error = float(pairs.std() / math.sqrt(len(pairs)))
    return _State(gaussian, precision, derivatives, elbo, error)


def antithetic(number: int, shape: Sequence[int]) -> Tensor:
    """
    Draw standard normal points: a Latin hypercube, and its mirror image.

    :return: ``(number, *shape)``, float64.
    """
    half = number // 2
    cells = torch.rand((half, *shape)).argsort(0)
    uniform = (cells + torch.rand((half, *shape), dtype=torch.double)) / half
    points = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    return torch.cat([points, -points])
