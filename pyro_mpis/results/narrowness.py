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
# Student's t is integrated over values up to this power of e, and this many. Of more degrees of
# freedom than the last, it is hardly another.
LOG_LARGEST, GRID, MOST_DEGREES = 30.0, 40_001, 60


@dataclass(frozen=True)
class Fit:
    """
    A parabola fitted to log weights; nan where it says nothing.

    :param value: the curvature of each scalar of an event, and of several together:
        ``batch_shape + (number,)``.
    :param error: its standard error, likewise.
    :param degrees: number of degrees of freedom that the error has, likewise.
    """

    value: Tensor
    error: Tensor
    degrees: Tensor

    def at_least(self, probability: float) -> Tensor:
        """Return what each curvature exceeds, unless its error is of a kind that rare."""
        degrees = self.degrees.floor().clamp(1, MOST_DEGREES)
        quantiles = torch.zeros_like(degrees)
        for number in degrees.unique().tolist():
            quantiles[degrees == number] = student_quantile(probability, number)
        return self.value - quantiles * self.error


@dataclass(frozen=True)
class Curvature:
    """
    How the log weights of a site bend over its particles.

    Nothing is said, by nan, of integers, of one value, of too few particles.
    """

    of_all: Fit
    of_heavy: Fit  # of particles that have weight

    @property
    def value(self) -> Tensor:
        """The lower one of each scalar, and of several together: ``batch_shape + (number,)``."""
        return torch.minimum(self.of_all.value, self.of_heavy.value)

    @property
    def number(self) -> int:
        """How many say something."""
        return int((~self.value.isnan()).sum())

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
    heights = log_weights.detach().double().unsqueeze(-2)
    heights = heights.clamp(min=heights.amax(-1, keepdim=True) - NO_WEIGHT)
    linear, square, heights = (
        values.unflatten(-1, (num_replicates, -1)) for values in (*_regressors(scalars), heights)
    )
    relative = heights.softmax(-1) * (number // num_replicates)  # of mean one
    heavy = (ENOUGH * relative).clamp(max=1.0)
    return Curvature(
        of_all=_fit(linear, square, heights, torch.ones_like(relative)),
        of_heavy=_fit(linear, square, heights, heavy),
    )


def _fit(linear: Tensor, square: Tensor, heights: Tensor, share: Tensor) -> Fit:
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
    score = _normal_scores(scalars)
    integers = (scalars == scalars.round()).all(-1, keepdim=True)
    same = (scalars == scalars[..., :1]).all(-1, keepdim=True)
    score = score.masked_fill(integers | same, math.nan)
    if scalars.shape[-2] == 1:
        return score, score.square()
    together = [x.nansum(-2, keepdim=True) for x in (score, score.square())]
    together = [x.masked_fill(score.isnan().all(-2, keepdim=True), math.nan) for x in together]
    return torch.cat([score, together[0]], -2), torch.cat([score.square(), together[1]], -2)


def _normal_scores(scalars: Tensor) -> Tensor:
    """Return standard normal quantiles of the ranks, after Blom: the shape of the particles."""
    number = scalars.shape[-1]
    ranks = torch.arange(number, dtype=scalars.dtype, device=scalars.device)
    quantiles = torch.special.ndtri((ranks + 0.625) / (number + 0.25))
    scores: Tensor = quantiles[scalars.argsort(-1).argsort(-1)]
    return scores


@cache
def student_quantile(probability: float, degrees: float) -> float:
    """Return what Student's t exceeds with a probability below a half, to two digits or more."""
    log_t = torch.linspace(-LOG_LARGEST, LOG_LARGEST, GRID, dtype=torch.double)
    density = (log_t - (degrees + 1) / 2 * (2 * log_t - math.log(degrees)).exp().log1p()).exp()
    tails = density.flip(0).cumsum(0)  # from the largest t on
    position = int(torch.searchsorted(tails, 2 * probability * tails[-1]))
    return float(log_t.flip(0)[position].exp())
