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
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Log weights this far below the highest are those of particles without weight.
NO_WEIGHT = 50.0
# Student's t is integrated over values up to this power of e, and this many.
LOG_LARGEST, GRID = 30.0, 200_001


@dataclass(frozen=True)
class Curvature:
    """
    How the log weights of a site bend over its particles.

    nan where it says nothing: of integers, of one value, of too few particles.

    :param value: of each scalar of an event, and of several together: ``batch_shape + (number,)``.
    :param error: its standard error, likewise.
    :param degrees: number of degrees of freedom that the error has.
    """

    value: Tensor
    error: Tensor
    degrees: int

    @property
    def number(self) -> int:
        """How many say something."""
        return int((~self.value.isnan()).sum())

    def at_least(self, probability: float) -> Tensor:
        """Return what each exceeds, unless its error is of a kind that rare."""
        if self.degrees < 1:
            return self.value
        return self.value - student_quantile(probability, self.degrees) * self.error


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
    log_weights = log_weights.detach().double().unsqueeze(-2)
    log_weights = log_weights.clamp(min=log_weights.amax(-1, keepdim=True) - NO_WEIGHT)
    linear, square = _regressors(scalars)
    u, v, y = (_centred(x, num_replicates) for x in (linear, square, log_weights))
    uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    uy, vy = (u * y).sum(-1), (v * y).sum(-1)
    determinant = uu * vv - uv.square()
    slope, value = (vv * uy - uv * vy) / determinant, (uu * vy - uv * uy) / determinant
    residual = y - slope.unsqueeze(-1) * u - value.unsqueeze(-1) * v
    degrees = number - num_replicates - 2
    error = (residual.square().sum(-1) / max(1, degrees) * uu / determinant).sqrt()
    mute = linear.isnan().any(-1) | (degrees < 1)
    return Curvature(value.masked_fill(mute, math.nan), error.masked_fill(mute, math.nan), degrees)


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
    return quantiles[scalars.argsort(-1).argsort(-1)]


def _centred(values: Tensor, num_replicates: int) -> Tensor:
    """Subtract each replicate's mean."""
    parts = values.unflatten(-1, (num_replicates, -1))
    return (parts - parts.mean(-1, keepdim=True)).flatten(-2)


def student_quantile(probability: float, degrees: int) -> float:
    """Return what Student's t exceeds with a probability below a half, to four digits."""
    log_t = torch.linspace(-LOG_LARGEST, LOG_LARGEST, GRID, dtype=torch.double)
    density = (log_t - (degrees + 1) / 2 * (2 * log_t - math.log(degrees)).exp().log1p()).exp()
    tails = density.flip(0).cumsum(0)  # from the largest t on
    position = int(torch.searchsorted(tails, 2 * probability * tails[-1]))
    return float(log_t.flip(0)[position].exp())
