# SPDX-License-Identifier: Apache-2.0
r"""
Whether a posterior is wider than its particles in a direction across several scalars.

A guide whose scalars do not depend on each other is fitted to a posterior in which they do: each
scalar is then as wide as the posterior given all others. In no scalar do the weights rise towards
the outermost particles, but they rise in the direction in which the posterior is longest.

The log weights are fitted to a constant, all scores :math:`u` of the scalars that one index draws,
and all their products: to :math:`a + b^T u + u^T C u`, in coordinates in which the particles have
unit variance in each direction. The highest curvature is the largest eigenvalue of :math:`C`. Of
noise alone, it is that of a matrix of noise (``narrowness.noise_quantile``). As with single
scalars, a parabola along this direction must bend as much where the particles have weight: once
what the fit says of all other directions is taken off, and also with it. The latter is for scalars
that are functions of each other, as those of a simplex: in their directions taken alone, the fit
may find anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis.results.narrowness import Fit, Fits, fitted, heights_of, scores_of

# The products of more scalars are more numbers than there are particles, as a rule.
MOST_SCALARS = 20
# Directions in which the scores have less than this share of a scalar's variance are left out: the
# scalars are functions of each other.
NO_VARIANCE = 1e-3
# Bytes of products that are held at once.
MOST_BYTES = 2**26


@dataclass(frozen=True)
class Direction(Fits):
    """
    The direction across the scalars of an index in which the log weights bend upwards most.

    :param of_all: curvature along it, fitted to all particles: ``batch_shape``; nan where there are
        too few particles, or fewer than two scalars that are not integers.
    :param of_heavy: the same, of particles that have weight: the lower one with and without what
        bends in other directions.
    :param sites: the sites that the scalars belong to.
    :param num_scalars: how many there are.
    :param num_replicates: number of sets of particles.
    """

    sites: tuple[str, ...]
    num_scalars: int
    num_replicates: int

    @property
    def num_particles(self) -> int:
        """The number of particles of all replicates that say anything of so many scalars."""
        return self.num_replicates + self.num_scalars + _num_products(self.num_scalars) + 1

    def is_narrow(self, curvature: float, probability: float) -> Tensor:
        """
        Return whether particles are too narrow: ``batch_shape``.

        :param curvature: more than this, where the noise is of the middling kind.
        :param probability: of what is seen, where nothing bends.
        """
        fits = (self.of_all, self.of_heavy)
        bends = [(f.at_least(probability) > 0) & (f.at_least(0.5) > curvature) for f in fits]
        return bends[0] & bends[1]


def widest_direction(
    sites: tuple[str, ...], scalars: Tensor, log_weights: Tensor, num_replicates: int
) -> Direction:
    """
    Find the direction in which the log weights bend upwards most.

    :param sites: the sites that the scalars belong to.
    :param scalars: the particles, those of a replicate together: ``batch_shape + (K, scalars)``.
    :param log_weights: ``batch_shape + (K,)``.
    """
    batch, (number, num_scalars) = scalars.shape[:-2], scalars.shape[-2:]
    nan = torch.full(batch, math.nan, dtype=torch.double)
    silent = Fit(nan, nan, torch.zeros_like(nan))
    direction = Direction(silent, silent, sites, num_scalars, num_replicates)
    if number < direction.num_particles or not 1 < num_scalars <= MOST_SCALARS:
        return direction
    rows = max(1, MOST_BYTES // (8 * number * (_num_products(num_scalars) + num_scalars)))
    scalars = scalars.detach().double().mT.reshape(-1, num_scalars, number)
    parts = [
        _widest(*part, num_replicates)
        for part in zip(
            scalars.split(rows), log_weights.reshape(-1, number).split(rows), strict=True
        )
    ]
    of_all, of_heavy = (_joined(fits, batch) for fits in zip(*parts, strict=True))
    return replace(direction, of_all=of_all, of_heavy=of_heavy)


def _joined(fits: Sequence[Fit], batch: torch.Size) -> Fit:
    value, error, degrees = (
        torch.cat([getattr(fit, name) for fit in fits]).reshape(batch)
        for name in ("value", "error", "degrees")
    )
    return Fit(value, error, degrees, fits[0].dimension)


def _num_products(num_scalars: int) -> int:
    return num_scalars * (num_scalars + 1) // 2


def _widest(scalars: Tensor, log_weights: Tensor, num_replicates: int) -> tuple[Fit, Fit]:
    """
    Fit all of C, and a parabola along the eigenvector of its largest eigenvalue.

    :param scalars: ``(rows, scalars, K)``.
    :param log_weights: ``(rows, K)``.
    """
    heights, heavy = heights_of(log_weights, num_replicates)
    score, mute = _whitened(scores_of(scalars))
    score = score.unflatten(-1, heights.shape[-2:])  # (rows, scalars, replicates, K)
    size = score.shape[1]
    i, j = torch.triu_indices(size, size, device=score.device)
    regressors = torch.cat([score, score[:, i] * score[:, j]], 1)
    centred = (regressors - regressors.mean(-1, keepdim=True)).flatten(-2)
    height = (heights - heights.mean(-1, keepdim=True)).flatten(-2).unsqueeze(-1)
    inverse = torch.linalg.pinv(centred @ centred.mT, hermitian=True)
    factors = inverse @ (centred @ height)
    residual = (height - centred.mT @ factors).squeeze(-1)
    degrees = residual.shape[-1] - num_replicates - centred.shape[1]
    factors = factors.squeeze(-1)
    products = torch.zeros(len(score), size, size, dtype=score.dtype, device=score.device)
    products[:, i, j] = factors[:, size:] / 2
    highest, vectors = torch.linalg.eigh(products + products.mT)
    value, vector = highest[:, -1], vectors[:, :, -1]
    contrast = (vector[:, i] * vector[:, j]).unsqueeze(-1)
    variance = (contrast.mT @ inverse[:, size:, size:] @ contrast).flatten()
    error = (variance * residual.square().sum(-1) / degrees).sqrt()
    along = (vector[:, :, None, None] * score).sum(1)
    slope = (vector * factors[:, :size]).sum(-1)
    bent = slope[:, None, None] * along + value[:, None, None] * along.square()
    rest = residual.reshape(heights.shape) + bent
    of_heavy, alone = (
        fitted(*(x.unsqueeze(1) for x in (along, along.square(), target, heavy)))
        for target in (rest, heights)
    )
    of_heavy = replace(of_heavy, value=torch.minimum(of_heavy.value, alone.value))
    value, error = value.masked_fill(mute, math.nan), error.masked_fill(mute, math.nan)
    of_all = Fit(value, error, torch.full_like(value, degrees), size)
    return of_all, _joined([of_heavy], value.shape)


def _whitened(score: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return coordinates of unit variance, and where there are fewer than two.

    :param score: ``(rows, scalars, K)``; nan where they say nothing.
    :return: of the same shape, zero in directions without variance; ``(rows,)``.
    """
    score = score.nan_to_num(0.0)
    score = score - score.mean(-1, keepdim=True)
    variances, vectors = torch.linalg.eigh(score @ score.mT / score.shape[-1])
    varied = variances > NO_VARIANCE
    scale = torch.where(varied, variances, math.inf).rsqrt()
    return scale.unsqueeze(-1) * (vectors.mT @ score), varied.sum(-1) < 2
