# SPDX-License-Identifier: Apache-2.0
"""Standard normal vectors with heavy tails: the noise that particles are computed from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.skewness import SplitNormal
from pyro_mpis.programs.stratified import LARGEST, SMALLEST

SHARE = 0.25  # of the draws that have heavy tails, in one coordinate
ALL_SHARE = 0.1  # of these, the share of all draws that have them in all of few coordinates
LARGEST_ALL = 10  # coordinates
WIDTH = 2.0  # of Student's t of two degrees of freedom
FARTHEST = 12.0  # of its draws, beyond which scales would underflow
WIDE_SHARE = 0.1  # of the draws from a wide Gaussian, where there is one


class _Noise(TorchDistribution):
    """
    Vectors that are computed from uniform numbers, by ``value_at``.

    :param loc: zeros, for the shape: ``(*batch_shape, D)``.
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def uniform_shape(self) -> torch.Size:
        """The shape of the uniform numbers that a draw is made of."""
        return self.event_shape

    def value_at(self, uniform: Tensor) -> Tensor:
        """Return the draw at given uniform numbers: ``(*draws, D)``."""
        raise NotImplementedError

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw."""
        shape = (*sample_shape, *self.batch_shape, *self.uniform_shape)
        uniform = torch.rand(shape, dtype=torch.double, device=self.loc.device)
        return self.value_at(uniform.clamp(SMALLEST, LARGEST))


class TailedNormal(_Noise):
    r"""
    Standard normal, or skewed, but for some draws: coordinates with Student's t, a wide Gaussian.

    The posterior of the log of a scale has an exponential tail, under which a Gaussian proposal's
    weights have no variance. A quarter of the draws has one coordinate from Student's t: the
    density of these is :math:`N(x) D^{-1} \sum_d t(x_d) / N(x_d)`. Of few coordinates all are
    from Student's t in a tenth of the draws: where a scale is large, its locations are far too.
    In few dims another tenth comes from a wide Gaussian, such as the prior, so that a mode far
    away is not missed for good.

    :param loc: zeros, for the shape: ``(*batch_shape, D)``.
    :param wide: location and lower triangular scale of the wide Gaussian: ``(D,)``, ``(D, D)``.
    :param skewness: of the other draws: ``(D,)``.
    """

    def __init__(
        self,
        loc: Tensor,
        wide: tuple[Tensor, Tensor] | None = None,
        skewness: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.wide = wide
        self.skewness = skewness
        self._body = None if skewness is None else SplitNormal.of(skewness)
        super().__init__(loc, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> "TailedNormal":
        """Return this distribution for another batch shape."""
        loc = self.loc.expand((*batch_shape, *self.event_shape))
        return TailedNormal(loc, self.wide, self.skewness, validate_args=False)

    @property
    def uniform_shape(self) -> torch.Size:
        """The shape of the uniform numbers that a draw is made of."""
        return torch.Size([self.event_shape[0] + 2])

    @property
    def _shares(self) -> tuple[float, float]:
        """The shares of draws with heavy tails in one coordinate, and in all."""
        of_all = ALL_SHARE if 1 < self.event_shape[0] <= LARGEST_ALL else 0.0
        return SHARE - of_all, of_all

    def value_at(self, uniform: Tensor) -> Tensor:
        """
        Return the draw at given uniform numbers.

        :param uniform: ``(*draws, D + 2)``: of the coordinates, of whether there are heavy tails,
            and in which.
        """
        size = self.event_shape[0]
        normal = torch.special.ndtri(uniform[..., :size])
        chosen, which = uniform[..., size:].split(1, -1)
        of_one, of_all = self._shares
        coordinate = (which * size).long().clamp(max=size - 1)
        at = (torch.arange(size, device=uniform.device) == coordinate) & (chosen < of_one)
        at = at | ((chosen >= of_one) & (chosen < of_one + of_all))
        body = normal if self._body is None else self._body.at(uniform[..., :size])
        value = torch.where(at, _student(uniform[..., :size]), body)
        if self.wide is not None:
            loc, scale = (part.to(value) for part in self.wide)
            far = loc + (scale @ normal.unsqueeze(-1)).squeeze(-1)
            value = torch.where(chosen > 1 - WIDE_SHARE, far, value)
        return value.to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density."""
        if self._body is None:
            normal = -0.5 * value.square() - 0.5 * math.log(2 * math.pi)
        else:
            normal = self._body.log_prob(value)
        student = _log_student(value)
        of_one, of_all = self._shares
        tails = (student - normal).logsumexp(-1) + math.log(of_one / value.shape[-1])
        normal = normal.sum(-1)
        if of_all:
            every = student.sum(-1) - normal + math.log(of_all)
            tails = torch.logaddexp(tails, every)
        if self.wide is None:
            return normal + torch.logaddexp(torch.full_like(tails, math.log1p(-SHARE)), tails)
        body = torch.full_like(tails, math.log(1 - SHARE - WIDE_SHARE))
        loc, scale = self.wide
        far = torch.distributions.MultivariateNormal(loc, scale_tril=scale, validate_args=False)
        wide = far.log_prob(value) + math.log(WIDE_SHARE)
        return torch.logaddexp(normal + torch.logaddexp(body, tails), wide)


def wide_noise(gaussians: Sequence[Gaussian], loc: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return location and scale of a wide Gaussian, as the noise of narrow ones.

    Of several they are those of all together.

    :param gaussians: their first blocks count, which are outside of plates.
    :param loc: of the wide Gaussian's numbers.
    :param sd: of these.
    """
    size = sd.numel()
    locs, scales = [], []
    for gaussian in gaussians:
        scale = gaussian.scales[0].detach().reshape((size, size))
        shift = (loc - gaussian.means[0].detach()).reshape((size, 1))
        wide = torch.linalg.solve_triangular(
            scale, torch.cat([shift, torch.diag(sd.flatten())], -1), upper=False
        )
        locs.append(wide[:, 0])
        scales.append(wide[:, 1:])
    if len(locs) == 1:
        return locs[0], scales[0]
    middle = torch.stack(locs).mean(0)
    shifts = [(own - middle).unsqueeze(-1) for own in locs]
    covariances = [s @ s.mT + d @ d.mT for s, d in zip(scales, shifts, strict=True)]
    return middle, torch.linalg.cholesky(torch.stack(covariances).mean(0))


class StretchedNormal(_Noise):
    r"""
    Standard normal numbers, stretched to :math:`x = z + a z^3`.

    The tails are heavier than those of any exponential, so that weights have a variance under
    posteriors like that of the log of a Gamma. In the middle there is little difference: few
    particles have even weights.

    :param loc: zeros, for the shape: ``(*batch_shape, D)``.
    :param stretch: the number a.
    """

    def __init__(self, loc: Tensor, stretch: float, validate_args: bool | None = None) -> None:
        self.stretch = stretch
        super().__init__(loc, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> "StretchedNormal":
        """Return this distribution for another batch shape."""
        loc = self.loc.expand((*batch_shape, *self.event_shape))
        return StretchedNormal(loc, self.stretch, validate_args=False)

    def value_at(self, uniform: Tensor) -> Tensor:
        """Return the draw at given uniform numbers: ``(*draws, D)``."""
        z = torch.special.ndtri(uniform)
        result: Tensor = (z + self.stretch * z**3).to(self.loc.dtype)
        return result

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density; the cubic equation has one root, by hyperbolic functions."""
        root = math.sqrt(3 * self.stretch)
        z = 2 / root * torch.sinh(torch.asinh(1.5 * root * value) / 3)
        normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return (normal - torch.log1p((root * z).square())).sum(-1)


_OUTSIDE = 1 - FARTHEST / math.hypot(FARTHEST, math.sqrt(2) * WIDTH)  # of Student's t


def _student(uniform: Tensor) -> Tensor:
    """Return the quantile of Student's t, cut off at both ends; it has a closed form."""
    uniform = 0.5 * _OUTSIDE + (1 - _OUTSIDE) * uniform
    return WIDTH * (2 * uniform - 1) / (2 * uniform * (1 - uniform)).sqrt()


def _log_student(value: Tensor) -> Tensor:
    """Return the log density of Student's t, cut off at both ends."""
    log_prob = -1.5 * torch.log1p(0.5 * (value / WIDTH).square())
    log_prob = log_prob - math.log(2 * math.sqrt(2) * WIDTH * (1 - _OUTSIDE))
    return torch.where(value.abs() <= FARTHEST, log_prob, -math.inf)
