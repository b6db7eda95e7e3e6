# SPDX-License-Identifier: Apache-2.0
"""Move a learned guide to the posterior moments of its noise, as trial runs find them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis.adaptation.guide import AutoPlateNormal


@dataclass(frozen=True)
class Noise:
    """Posterior moments of a block's noise: of some runs, and of all together."""

    shares: Tensor  # (runs,), of the runs in the evidence; they sum to one
    means: Tensor  # (runs, *batch dims, D)
    covariances: Tensor  # (runs, *batch dims, D, D), around the mean of all runs
    ess: Tensor  # (*batch dims), of all runs

    @property
    def mean(self) -> Tensor:
        """The mean over all runs: ``(*batch dims, D)``."""
        return self.together(self.means)

    @property
    def covariance(self) -> Tensor:
        """The covariance over all runs: ``(*batch dims, D, D)``."""
        return self.together(self.covariances)

    def together(self, of_runs: Tensor) -> Tensor:
        """Return the weighted mean over the first dim, that of the runs."""
        result: Tensor = torch.tensordot(self.shares.to(of_runs), of_runs, 1)
        return result


def pooled(shares: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Noise:
    """
    Take moments of several runs.

    :param shares: of the runs in the evidence.
    :param runs: weights and values of each: ``(K, *batch dims)``, ``(K, *batch dims, D)``.
    """
    means = torch.stack([(weight.unsqueeze(-1) * value).sum(0) for weight, value in runs])
    mean = torch.tensordot(shares.to(means), means, 1)
    covariances = torch.stack(
        [
            torch.einsum("k...,k...d,k...e->...de", weight, value - mean, value - mean)
            for weight, value in runs
        ]
    )
    squares = sum(
        share.square() * weight.square().sum(0)
        for share, (weight, _) in zip(shares, runs, strict=True)
    )
    return Noise(shares, means, covariances, 1 / torch.as_tensor(squares))


def matched(guide: AutoPlateNormal, noise: Mapping[int, Noise]) -> AutoPlateNormal:
    """
    Move a guide to the posterior moments of its noise, as far as these are no noise themselves.

    :param noise: of the blocks to be moved.
    """
    gaussian = guide.gaussian()
    shifts, scales = [], []
    for block, mean, scale in zip(guide.blocks, gaussian.means, gaussian.scales, strict=True):
        if block.number not in noise:
            shifts.append(torch.zeros_like(mean))
            scales.append(scale)
            continue
        shift, covariance = _sure_part(noise[block.number])
        shifts.append(shift.to(mean))
        scales.append(scale @ torch.linalg.cholesky(covariance).to(scale))
    moved = replace(gaussian, means=gaussian.at(shifts), scales=scales)
    return guide.with_gaussian(moved)


def _sure_part(noise: Noise) -> tuple[Tensor, Tensor]:
    """
    Return mean and covariance of the noise, nearer to those of standard noise.

    Means, variances and correlations have a share each by which they move.
    """
    variance = 1 / noise.ess.unsqueeze(-1)  # of a mean
    of_means = _trust(noise, noise.means, variance)
    unit = torch.eye(noise.means.shape[-1], dtype=noise.means.dtype, device=noise.means.device)
    excess = noise.covariances - unit
    own = torch.diag_embed(excess.diagonal(dim1=-2, dim2=-1))
    others = excess - own
    of_own = _trust(noise, own, 2 * variance.unsqueeze(-1) * unit)
    of_others = min(of_own, _trust(noise, others, variance.unsqueeze(-1) * (1 - unit)))
    covariance = unit + noise.together(of_own * own + of_others * others)
    return of_means * noise.mean, covariance


def _trust(noise: Noise, of_runs: Tensor, variance: Tensor) -> float:
    """
    Return the share of deviations that is more than their noise: by two measures, the smaller one.

    The first is that of James and Stein (1961), with the variance that particles of equal weight
    would have. Large weights belong to far particles, whose moments have larger variances. So the
    second asks what the runs have in common: the product of one run's deviations with those of the
    others has no noise on average.

    :param of_runs: deviations that each run finds: ``(runs, *shape)``.
    :param variance: of those of all runs, with room for ``(*shape)``.
    """
    found = noise.together(of_runs)
    total = float(found.square().sum())
    if total == 0:
        return 0.0
    share = max(0.0, 1 - float(variance.expand_as(found).sum()) / total)
    if len(of_runs) > 1:
        share = min(share, max(0.0, _in_common(noise, of_runs) / total))
    return share


def _in_common(noise: Noise, of_runs: Tensor) -> float:
    """Return the mean product of the deviations of one run and those of the others."""
    found = noise.together(of_runs)
    result = 0.0
    for share, own in zip(noise.shares, of_runs, strict=True):
        others = (found - share * own) / (1 - share).clamp(min=torch.finfo(share.dtype).eps)
        result += float((share * own * others).sum())
    return result
