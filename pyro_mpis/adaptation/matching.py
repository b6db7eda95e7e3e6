# SPDX-License-Identifier: Apache-2.0
"""Move a learned guide to the posterior moments of its noise, as trial runs find them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mpis.adaptation.guide import AutoPlateNormal
from pyro_mpis.adaptation.skewness import SKEWEST

TINY = 1e-30  # for a share of zero


@dataclass(frozen=True)
class Noise:
    """Posterior moments of a block's noise: of some runs, and of all together."""

    shares: Tensor  # (runs, *batch dims), of each run in the weights; they sum to one
    means: Tensor  # (runs, *batch dims, D)
    covariances: Tensor  # (runs, *batch dims, D, D), around the mean of all runs
    cubes: Tensor  # (runs, *batch dims, D): third moments, around the mean of all runs
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
        return (self.share_of(of_runs) * of_runs).sum(0)

    def share_of(self, of_runs: Tensor) -> Tensor:
        """Return the shares, with dims of size one at the end, as many as ``of_runs`` has more."""
        return self.shares.reshape(self.shares.shape + (1,) * (of_runs.dim() - self.shares.dim()))


def pooled(shares: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Noise:
    """
    Take moments of several runs, with weights that are cut off (Ionides 2008).

    A few particles of large weight would be most of the moments. The weights are cut off at the
    root of the number of particles, times the mean weight: moments are then nearer to those of the
    proposal, and have less noise.

    :param shares: of the runs in the evidence: ``(runs,)``; they sum to one.
    :param runs: weights and values of each: ``(K, *batch dims)``, ``(K, *batch dims, D)``.
    """
    weights = [share * weight for share, (weight, _) in zip(shares, runs, strict=True)]
    largest = sum(len(weight) for weight in weights) ** -0.5
    weights = [weight.clamp(max=largest) for weight in weights]
    of_runs = torch.stack([weight.sum(0) for weight in weights])
    total = of_runs.sum(0)
    weights = [
        weight / of_run.clamp(min=TINY) for weight, of_run in zip(weights, of_runs, strict=True)
    ]
    noise_shares = of_runs / total
    means = torch.stack(
        [(w.unsqueeze(-1) * v).sum(0) for w, (_, v) in zip(weights, runs, strict=True)]
    )
    mean = (noise_shares.unsqueeze(-1) * means).sum(0)
    covariances, cubes = [], []
    for weight, (_, value) in zip(weights, runs, strict=True):
        shift = value - mean
        covariances.append(torch.einsum("k...,k...d,k...e->...de", weight, shift, shift))
        cubes.append((weight.unsqueeze(-1) * shift**3).sum(0))
    squares = torch.stack([weight.square().sum(0) for weight in weights])
    ess = 1 / (noise_shares.square() * squares).sum(0)
    return Noise(noise_shares, means, torch.stack(covariances), torch.stack(cubes), ess)


def matched(guide: AutoPlateNormal, noise: Mapping[int, Noise]) -> AutoPlateNormal:
    """
    Move a guide to the posterior moments of its noise, as far as trial runs are sure of them.

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
    if guide.num_modes > 1 or 0 not in noise or not guide.blocks[0].is_outer:
        return guide.with_gaussian(moved)
    return guide.with_gaussian(moved, _sure_skewness(noise[0], guide.skewness))


def _sure_part(noise: Noise) -> tuple[Tensor, Tensor]:
    """
    Return mean and covariance of the noise, moved some way back to those of standard noise.

    Means, variances and correlations keep a share each of what trial runs found.
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


def _sure_skewness(noise: Noise, known: Tensor) -> Tensor:
    """Return the skewness of the noise outside of plates, moved some way back to the known one."""
    variance = noise.covariance.diagonal(dim1=-2, dim2=-1)
    cubed = variance**1.5
    has_spread = cubed > TINY  # not where one particle has all of the weight
    change = torch.where(has_spread, noise.cubes / cubed - known.to(cubed), 0.0)
    share = _trust(noise, change, 6 / noise.ess.unsqueeze(-1))
    result = known.to(cubed) + share * noise.together(change).reshape(known.shape)
    return result.clamp(-SKEWEST, SKEWEST).to(known)


def _trust(noise: Noise, of_runs: Tensor, variance: Tensor) -> float:
    """
    Return which share of deviations is more than sampling error: the smaller of two estimates.

    The first is that of James and Stein (1961), with the variance that particles of equal weight
    would have. Large weights belong to far particles, whose moments have larger variances. So the
    second asks what the runs have in common: the product of one run's deviations with those of the
    others is free of it on average.

    :param of_runs: deviations that each run finds: ``(runs, *shape)``.
    :param variance: of the deviations of all runs together; it broadcasts to ``(*shape)``.
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
    own = noise.share_of(of_runs) * of_runs
    others = (own.sum(0) - own) / (1 - noise.share_of(of_runs)).clamp(min=TINY)
    return float((own * others).sum())
