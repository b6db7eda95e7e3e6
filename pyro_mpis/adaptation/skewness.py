# SPDX-License-Identifier: Apache-2.0
r"""
Skewed numbers of mean zero and variance one: two halves of normals, of unequal scales.

.. math:: q(x) = \frac{2}{s_- + s_+} N\Big(\frac{x - m}{s_\pm}\Big)

with :math:`s_-` on the left of the mode m and :math:`s_+` on the right of it (Fechner; Wallis
2014). The log of a scale that data say little of has such a posterior: far on the left the data
are indifferent, far on the right they are not.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SKEWEST = 0.9  # a half normal has 0.995
_TO_MEAN = math.sqrt(2 / math.pi)  # distance of mean and mode, in differences of the scales
_TO_VARIANCE = 1 - 2 / math.pi
_CUBIC = 2 - 6 / math.pi


@dataclass(frozen=True)
class SplitNormal:
    """Numbers of given skewness, each by itself; zero is the standard normal."""

    left: Tensor  # scales: (D,)
    right: Tensor
    mode: Tensor

    @classmethod
    def of(cls, skewness: Tensor) -> "SplitNormal":
        """Return the one of a skewness, which is cut off at both ends."""
        # s+ - s- = d and s+ s- = 1 - (1 - 2 / pi) d^2, so that the variance is one. The skewness
        # is then sqrt(2 / pi) (d - b d^3): a cubic equation with a root by sines.
        wanted = skewness.double().clamp(-SKEWEST, SKEWEST) / _TO_MEAN
        third = torch.asin(1.5 * math.sqrt(3 * _CUBIC) * wanted) / 3
        difference = 2 / math.sqrt(3 * _CUBIC) * third.sin()
        product = 1 - _TO_VARIANCE * difference.square()
        total = (difference.square() + 4 * product).sqrt()
        scales = (total - difference) / 2, (total + difference) / 2
        parts = (*scales, -_TO_MEAN * difference)
        return cls(*(part.to(skewness.dtype) for part in parts))

    def at(self, uniform: Tensor) -> Tensor:
        """Return quantiles: ``(*draws, D)``."""
        left, right, mode = (part.to(uniform) for part in (self.left, self.right, self.mode))
        share = left / (left + right)
        below = left * torch.special.ndtri((uniform / (2 * share)).clamp(max=0.5))
        above = -right * torch.special.ndtri(((1 - uniform) / (2 - 2 * share)).clamp(max=0.5))
        return mode + torch.where(uniform < share, below, above)

    def of_normal(self, noise: Tensor) -> Tensor:
        """Return the quantiles at which standard normal noise is: ``(*draws, D)``."""
        # in float32 the uniform number of 5.5 sds is one
        return self.at(torch.special.ndtr(noise.double())).to(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each number."""
        left, right, mode = (part.to(value) for part in (self.left, self.right, self.mode))
        shift = value - mode
        scaled = shift / torch.where(shift < 0, left, right)
        log_total = ((left + right) / 2).log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * scaled.square() - log_total
