# SPDX-License-Identifier: Apache-2.0
r"""
A Gaussian with the model's plates: blocks, each conditional on the blocks around it.

In every element of its plates block b is

.. math:: z_b = m_b + \sum_{a} B_{ba} (z_a - m_a) + L_b \epsilon_b,

with :math:`\epsilon_b` standard normal and a sum over the blocks a around it. Its precision matrix
has entries only within elements, and between an element and those around it. Eliminating blocks
from the innermost one turns one into the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mpis.adaptation.layout import Block, sum_to
from pyro_mpis.adaptation.log_joint import Pair

SMALLEST_PRECISION = 0.3  # in units of the prior's: no sd above 1.8 prior sds


@dataclass(frozen=True)
class Gaussian:
    """Means, couplings and scales of all blocks, float64."""

    means: list[Tensor]  # (*batch dims, D)
    scales: list[Tensor]  # lower triangular: (*batch dims, D, D)
    couplings: dict[Pair, Tensor]  # (*batch dims, D of the block, D of the one around it)

    def at(self, noise: Sequence[Tensor]) -> list[Tensor]:
        """
        Return the numbers at given standard normal noise.

        :param noise: of each block: ``(*left, *batch dims, D)``.
        """
        deviations: list[Tensor] = []
        for number, (scale, epsilon) in enumerate(zip(self.scales, noise, strict=True)):
            deviation = _times(scale, epsilon)
            for (block, around), coupling in self.couplings.items():
                if block == number:
                    deviation = deviation + _times(coupling, deviations[around])
            deviations.append(deviation)
        return [mean + d for mean, d in zip(self.means, deviations, strict=True)]

    def entropy(self) -> float:
        """Return the entropy, in nats."""
        return sum(
            float(scale.diagonal(dim1=-2, dim2=-1).log().sum())
            + 0.5 * mean.numel() * (1 + math.log(2 * math.pi))
            for mean, scale in zip(self.means, self.scales, strict=True)
        )

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        tensors = (*self.means, *self.scales, *self.couplings.values())
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def sds(self) -> list[Tensor]:
        """Return the sd of each number given the blocks around it: ``(*batch dims, D)``."""
        return [scale.square().sum(-1).sqrt() for scale in self.scales]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the product of a matrix and a vector, of batches of both."""
    columns = vector.unsqueeze(-1)
    if torch.is_grad_enabled():
        return (matrix @ columns).squeeze(-1)
    product: Tensor = _Product.apply(matrix, columns)  # type: ignore[no-untyped-call]
    return product.squeeze(-1)


class _Product(torch.autograd.Function):
    """
    A matrix product in which mapped vectors are columns of one matrix.

    torch copies the other matrix for each of them. Without a gradient.
    """

    @staticmethod
    def forward(matrix: Tensor, columns: Tensor) -> Tensor:
        return matrix @ columns

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, int | None], matrix: Tensor, columns: Tensor
    ) -> tuple[Tensor, int]:
        of_matrix, of_columns = in_dims
        if of_matrix is not None or of_columns is None:
            product = torch.func.vmap(torch.matmul, in_dims)(matrix, columns)
            return product, 0
        columns = columns.movedim(of_columns, -1)
        product = _Product.apply(matrix, columns.flatten(-2))  # type: ignore[no-untyped-call]
        product = product.unflatten(-1, columns.shape[-2:])
        return product.movedim(-1, of_columns).contiguous(), of_columns  # laid out as it came


@dataclass(frozen=True)
class Eliminated:
    """A structured precision matrix, eliminated: what a Gaussian and its steps are made of."""

    blocks: Sequence[Block]
    covariances: list[Tensor]  # of each block given those around it
    couplings: dict[Pair, Tensor]

    def scales(self) -> list[Tensor]:
        """Return the lower Cholesky factors of the covariances."""
        return [torch.linalg.cholesky(covariance) for covariance in self.covariances]

    def solve(self, gradient: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Multiply a vector by the inverse of the precision matrix.

        :return: the result, and the part of it that is a block's own.
        """
        right = list(gradient)
        for block in reversed(self.blocks):
            for around in self._around(block):
                # B = -A^-1 Lam_ba, so that -Lam_ba^T A^-1 g is B^T g
                product = self.couplings[block.number, around].mT @ right[block.number].unsqueeze(
                    -1
                )
                shape = self.blocks[around].shape
                right[around] = right[around] + sum_to(product.squeeze(-1), shape, 1)
        result: list[Tensor] = []
        own = []
        for block in self.blocks:
            step = (self.covariances[block.number] @ right[block.number].unsqueeze(-1)).squeeze(-1)
            own.append(step)
            for around in self._around(block):
                coupling = self.couplings[block.number, around]
                step = step + (coupling @ result[around].unsqueeze(-1)).squeeze(-1)
            result.append(step)
        return result, own

    def _around(self, block: Block) -> list[int]:
        return [a for a in block.parents if (block.number, a) in self.couplings]


def eliminated(
    blocks: Sequence[Block], precision: Mapping[Pair, Tensor], prior_sds: Sequence[Tensor]
) -> Eliminated:
    """
    Eliminate the blocks of a structured precision matrix, the innermost first.

    Eigenvalues are taken by their size, so that a step leads away from a saddle, and none is below
    :data:`SMALLEST_PRECISION` in units of the prior's.

    :param precision: of each block with itself, and of those that are coupled.
    """
    left = dict(precision)
    covariances: list[Tensor] = [torch.empty(0)] * len(blocks)
    couplings: dict[Pair, Tensor] = {}
    for block in reversed(blocks):
        number = block.number
        covariance = _inverse(left[number, number], prior_sds[number])
        covariances[number] = covariance
        around = [a for a in block.parents if (number, a) in left]
        for a in around:
            couplings[number, a] = -covariance @ left[number, a]
        for a in around:
            for b in around:
                if (a, b) in left:
                    product = left[number, a].mT @ couplings[number, b]
                    left[a, b] = left[a, b] + sum_to(product, blocks[a].shape, 2)
    return Eliminated(blocks, covariances, couplings)


def _inverse(precision: Tensor, prior_sd: Tensor) -> Tensor:
    """Invert symmetric matrices, their eigenvalues made positive."""
    unit = prior_sd.unsqueeze(-1) * prior_sd.unsqueeze(-2)
    scaled = 0.5 * (precision + precision.mT) * unit
    values, vectors = torch.linalg.eigh(scaled)
    values = values.abs().clamp(min=SMALLEST_PRECISION)
    inverse: Tensor = (vectors / values.unsqueeze(-2)) @ vectors.mT * unit
    return inverse
