# SPDX-License-Identifier: Apache-2.0
"""A standard normal vector with heavy tails along its axes: what globals are proposed from."""

import math
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

SHARE = 0.25  # of the draws that have a coordinate with heavy tails
DEGREES, WIDTH = 4.0, 1.3  # of that coordinate's Student's t


class TailedNormal(TorchDistribution):
    r"""
    Standard normal, but that one coordinate of a quarter of the draws has Student's t.

    The posterior of the log of a scale has an exponential tail, under which a Gaussian proposal's
    weights have no variance. The density is
    :math:`N(x) (3/4 + 1/4 D^{-1} \sum_d t(x_d) / N(x_d))`.

    :param loc: zeros, for the shape: ``(*batch_shape, D)``.
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: object = None) -> "TailedNormal":
        """Return this distribution for another batch shape."""
        return TailedNormal(self.loc.expand((*batch_shape, *self.event_shape)), validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw."""
        shape = self._extended_shape(sample_shape)
        normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return with_tails(normal)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density."""
        normal = -0.5 * value.square() - 0.5 * math.log(2 * math.pi)
        scaled = value / WIDTH
        student = _STUDENT - 0.5 * (DEGREES + 1) * torch.log1p(scaled.square() / DEGREES)
        tails = (student - normal).logsumexp(-1) + math.log(SHARE / value.shape[-1])
        body = torch.full_like(tails, math.log1p(-SHARE))
        return normal.sum(-1) + torch.logaddexp(body, tails)


_STUDENT = (
    math.lgamma((DEGREES + 1) / 2)
    - math.lgamma(DEGREES / 2)
    - 0.5 * math.log(DEGREES * math.pi)
    - math.log(WIDTH)
)


def with_tails(normal: Tensor) -> Tensor:
    """
    Give one coordinate of some standard normal draws heavy tails; draws random numbers.

    :param normal: ``(*draws, D)``.
    """
    chosen = torch.rand(normal.shape[:-1], device=normal.device) < SHARE
    coordinate = torch.randint(normal.shape[-1], normal.shape[:-1], device=normal.device)
    student = torch.distributions.StudentT(DEGREES).sample(normal.shape[:-1])
    student = (WIDTH * student).to(normal)
    at = torch.nn.functional.one_hot(coordinate, normal.shape[-1]).bool() & chosen.unsqueeze(-1)
    return torch.where(at, student.unsqueeze(-1), normal)
