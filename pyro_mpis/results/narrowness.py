# SPDX-License-Identifier: Apache-2.0
r"""
Whether a posterior is wider than the particles that it is told from.

The weights of particles that are much too narrow are nearly even: all particles lie where the guide
put them. But they are not flat. The posterior hardly changes over such particles and the guide's
density falls, so that their ratio, the weight, rises towards the outermost particles.

Let :math:`u` be the normal score of a particle, the standard normal quantile of its rank, so that
the particles are standard normal in :math:`u`, whatever they were drawn from. A posterior that is
:math:`N(m, s^2)` there has log weights :math:`b u + c u^2` with :math:`c = (1 - s^{-2}) / 2`. The
**curvature** :math:`c` is fitted to the marginal log weights by least squares. It is negative for a
proposal that is wider than the posterior, zero for one of the same width, and a half at most for a
normal posterior. From a quarter on, where :math:`s^2 = 2`, the weights have no variance.

The weights of one replicate are a smooth function of the particle, since all combinations with the
other sites' particles are summed. So a few particles tell a curvature. Replicates have other
particles of the other sites, and so each a constant of its own. The scalars of a vector share their
weights, and each is noise to the others: they are also looked at together, by :math:`\sum u^2`.

A step is no parabola, though a parabola that is fitted to it may bend upwards: the posterior may be
in one tail of a prior, or end where its support ends. So two fits must agree, one to all particles
and one to those that have weight.

Scalars that one index draws may each be as wide as the posterior while a direction across them is
not: ``directions`` looks at these.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Log weights this far below the highest are those of particles without weight.
NO_WEIGHT = 50.0
# Of the particles that have weight, those of one part in so many of the mean weight count in full.
ENOUGH = 2.0
# Quantiles are found on a grid of numbers between these powers of e, of this size. An error of more
# degrees of freedom than the last hardly has others.
LOG_SMALLEST, LOG_LARGEST, GRID, MOST_DEGREES = -10.0, 30.0, 40_001, 60


@dataclass(frozen=True)
class Fit:
    """
    A parabola fitted to log weights; nan where it says nothing.

    :param value: the curvature of each scalar of an event, and of several together:
        ``batch_shape + (number,)``.
    :param error: its standard error, likewise.
    :param degrees: number of degrees of freedom that the error has, likewise.
    :param dimension: the highest curvature of all directions across so many scalars; 1 if the
        direction was not chosen.
    """

    value: Tensor
    error: Tensor
    degrees: Tensor
    dimension: int = 1

    def at_least(self, probability: float) -> Tensor:
        """Return what each curvature exceeds, unless its error is of a kind that rare."""
        degrees = self.degrees.floor().clamp(1, MOST_DEGREES)
        quantiles = torch.zeros_like(degrees)
        for number in degrees.unique().tolist():
            quantiles[degrees == number] = noise_quantile(probability, number, self.dimension)
        return self.value - quantiles * self.error


@dataclass(frozen=True)
class Fits:
    """The same parabolas, fitted to all particles and to those that have weight."""

    of_all: Fit
    of_heavy: Fit

    @property
    def value(self) -> Tensor:
        """The lower curvature of each."""
        return torch.minimum(self.of_all.value, self.of_heavy.value)

    @property
    def number(self) -> int:
        """How many say something."""
        return int((~self.value.isnan()).sum())


class Curvature(Fits):
    """
    How the log weights of a site bend over its particles: ``batch_shape + (number,)``.

    Each scalar has a parabola, and several have one together. Nothing is said, by nan, of integers,
    of one value, of too few particles.
    """

    def at_least(self, probability: float) -> Tensor:
        """Return what each exceeds, unless the errors are of a kind that rare."""
        return torch.minimum(self.of_all.at_least(probability), self.of_heavy.at_least(probability))


def times_as_wide(curvature: Tensor) -> Tensor:
    """Return how many times as wide as its particles a normal posterior is; inf from a half on."""
    return (1 - 2 * curvature).clamp(min=0.0).rsqrt()


def curvature_of(samples: Tensor, log_weights: Tensor, num_replicates: int) -> Curvature:
    """
    Fit the curvature of the log weights.

    :param samples: the particles, those of a replicate together: ``batch_shape + (K,) + event``.
    :param log_weights: ``batch_shape + (K,)``.
    """
    batch, number = log_weights.shape[:-1], log_weights.shape[-1]
    scalars = samples.detach().double().reshape((*batch, number, -1)).movedim(-1, -2)
    linear, square = (x.unflatten(-1, (num_replicates, -1)) for x in _regressors(scalars))
    heights, heavy = heights_of(log_weights.unsqueeze(-2), num_replicates)
    return Curvature(
        of_all=fitted(linear, square, heights, torch.ones_like(heavy)),
        of_heavy=fitted(linear, square, heights, heavy),
    )


def heights_of(log_weights: Tensor, num_replicates: int) -> tuple[Tensor, Tensor]:
    """
    Return what is fitted, and how much each particle counts in the fit to those with weight.

    :param log_weights: ``(*batch, K)``, of all replicates.
    :return: ``(*batch, replicates, K)`` each.
    """
    heights = log_weights.detach().double()
    heights = heights.clamp(min=heights.amax(-1, keepdim=True) - NO_WEIGHT)
    heights = heights.unflatten(-1, (num_replicates, -1))
    relative = heights.softmax(-1) * heights.shape[-1]  # of mean one
    return heights, (ENOUGH * relative).clamp(max=1.0)


def fitted(linear: Tensor, square: Tensor, heights: Tensor, share: Tensor) -> Fit:
    """
    Fit ``heights`` to a constant of each replicate and a multiple of each of the others.

    :param share: how much each particle counts; all are ``(*batch, number, replicates, K)``.
    """
    u, v, y = (
        (x - (share * x).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)).flatten(-2)
        for x in (linear, square, heights)
    )
    share = share.flatten(-2)
    uu, uv, vv = (share * u * u).sum(-1), (share * u * v).sum(-1), (share * v * v).sum(-1)
    uy, vy = (share * u * y).sum(-1), (share * v * y).sum(-1)
    determinant = uu * vv - uv.square()
    slope, value = (vv * uy - uv * vy) / determinant, (uu * vy - uv * uy) / determinant
    residual = y - slope.unsqueeze(-1) * u - value.unsqueeze(-1) * v
    degrees = (share.sum(-1) - linear.shape[-2] - 2).expand(value.shape)
    error = ((share * residual.square()).sum(-1) / degrees * uu / determinant).sqrt()
    mute = linear.flatten(-2).isnan().any(-1) | (degrees < 1)
    return Fit(value.masked_fill(mute, math.nan), error.masked_fill(mute, math.nan), degrees)


def _regressors(scalars: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return what log weights are fitted to: scores and their squares, of each scalar and of all.

    :param scalars: ``(*batch, scalars, K)``.
    :return: ``(*batch, number, K)`` each; nan where particles are integers, or all the same.
    """
    score = scores_of(scalars)
    if scalars.shape[-2] == 1:
        return score, score.square()
    together = [x.nansum(-2, keepdim=True) for x in (score, score.square())]
    together = [x.masked_fill(score.isnan().all(-2, keepdim=True), math.nan) for x in together]
    return torch.cat([score, together[0]], -2), torch.cat([score.square(), together[1]], -2)


def scores_of(scalars: Tensor) -> Tensor:
    """
    Return standard normal quantiles of the ranks, after Blom: the shape of the particles.

    :param scalars: ``(*batch, scalars, K)``.
    :return: of the same shape; nan where particles are integers, or all the same.
    """
    number = scalars.shape[-1]
    ranks = torch.arange(number, dtype=scalars.dtype, device=scalars.device)
    quantiles = torch.special.ndtri((ranks + 0.625) / (number + 0.25))
    scores: Tensor = quantiles[scalars.argsort(-1).argsort(-1)]
    integers = (scalars == scalars.round()).all(-1, keepdim=True)
    same = (scalars == scalars[..., :1]).all(-1, keepdim=True)
    return scores.masked_fill(integers | same, math.nan)


@cache
def noise_quantile(probability: float, degrees: float, dimension: int = 1) -> float:
    r"""
    Return what noise alone exceeds this rarely: above zero, in estimated standard errors.

    Of one number it is Student's t. The highest curvature of all directions is the largest
    eigenvalue of a symmetric matrix of noise: variances 1 on its diagonal, 1/2 off it, so that 1 in
    each direction. A threshold t is exceeded by an odd number of eigenvalues with probability

    .. math:: \int_t^\infty c_d 2^{1-d} H_{d-1}(x) e^{-x^2/2} dx, \quad
              c_d = d \, \Gamma(3/2) / (\sqrt{2 \pi} \, \Gamma(1 + d/2)),

    since the mean of :math:`\det(x - A)` is a Hermite polynomial. That is the probability of the
    largest one but for that of two or more, which is far smaller where the first is small. Each
    power of x becomes one of Student's kind if the standard error is an estimate.
    """
    log_x = torch.linspace(LOG_LARGEST, LOG_SMALLEST, GRID, dtype=torch.double)
    density = torch.zeros_like(log_x)
    for power, factor in enumerate(_hermite(dimension - 1)):
        count = power + 1
        log_mean = math.lgamma((degrees + count) / 2) - math.lgamma(degrees / 2)
        log_mean += count / 2 * math.log(2 / degrees)
        spread = (2 * log_x - math.log(degrees)).exp().log1p() * (degrees + count) / 2
        density += factor * (log_mean + count * log_x - spread).exp()
    log_front = math.log(dimension) + math.lgamma(1.5) - math.lgamma(1 + dimension / 2)
    front = math.exp(log_front) / math.sqrt(2 * math.pi) * 2.0 ** (1 - dimension)
    tails = front * density.cumsum(0) * (LOG_LARGEST - LOG_SMALLEST) / (GRID - 1)
    rarer = tails > probability
    return float(log_x[int(rarer.int().argmax())].exp()) if bool(rarer.any()) else 0.0


def _hermite(degree: int) -> list[float]:
    """Return the coefficients of a Hermite polynomial (the physicists'), of rising powers."""
    before, last = [0.0], [1.0]
    for number in range(degree):
        raised = [0.0, *(2 * factor for factor in last)]
        lowered = [2 * number * factor for factor in before] + [0.0] * len(raised)
        before, last = last, [a - b for a, b in zip(raised, lowered, strict=False)]
    return last
