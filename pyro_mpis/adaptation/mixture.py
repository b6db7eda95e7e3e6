# SPDX-License-Identifier: Apache-2.0
"""The density of a guide that is a mixture: of several Gaussians, each spread over exact images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis._typing import Distribution
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.images import Images, row_of
from pyro_mpis.adaptation.layout import Block
from pyro_mpis.adaptation.parametrisation import from_free


def stacked(gaussians: Sequence[Gaussian]) -> Gaussian:
    """Return several Gaussians as one, with a dim on the left for them."""

    def of(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts))

    first = gaussians[0]
    return Gaussian(
        [of(g.means[n] for g in gaussians) for n in range(len(first.means))],
        [of(g.scales[n] for g in gaussians) for n in range(len(first.scales))],
        {pair: of(g.couplings[pair] for g in gaussians) for pair in first.couplings},
    )


def chosen(gaussians: Gaussian, which: Tensor) -> Gaussian:
    """Return one of stacked Gaussians; its number may be mapped, so nothing looks at it."""
    return Gaussian(
        [row_of(mean, which) for mean in gaussians.means],
        [row_of(scale, which) for scale in gaussians.scales],
        {pair: row_of(coupling, which) for pair, coupling in gaussians.couplings.items()},
    )


@dataclass(frozen=True)
class Mixture:
    """
    Several Gaussians of one block, and images of them.

    :param fn: the distribution of the block's noise, the same for all.
    :param supports: of the block's sites; needed where there are images.
    """

    gaussians: Sequence[Gaussian]
    block: Block
    fn: Distribution
    supports: Mapping[str, object]
    images: Images | None

    def log_densities(
        self, numbers: Sequence[Tensor], values: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """
        Return the log density under all modes at the first image, then at the others.

        :param numbers: of all blocks.
        :param values: those of each site, and the log derivative of the map to it.
        :return: ``(images * modes, *batch dims)``, up to what all have in common.
        """
        own = self._of_numbers(dict(enumerate(numbers)))
        if self.images is None:
            return own  # the Jacobian is the same for all modes
        parts = self.block.parts
        log_derivative = sum(part.of_elements(values[part.name][1]) for part in parts)
        at = {part.name: values[part.name][0] for part in parts}
        every = range(1, self.images.number)
        others = [self._of_values(self.images.of(at, which)) for which in every]
        return torch.cat([own - log_derivative, *others])

    def _of_values(self, at: Mapping[str, Tensor]) -> Tensor:
        parts, supports = self.block.parts, self.supports
        free = {part.name: biject_to(supports[part.name]).inv(at[part.name]) for part in parts}
        log_derivative = sum(
            part.of_elements(from_free(supports[part.name], free[part.name], part.event_dim)[1])
            for part in parts
        )
        numbers = self.block.joined(free).to(self.gaussians[0].means[0])
        return self._of_numbers({self.block.number: numbers}) - log_derivative

    def _of_numbers(self, numbers: Mapping[int, Tensor]) -> Tensor:
        """
        Return the log densities of the block's numbers: ``(modes, *batch dims)``.

        :param numbers: of the block, and of those around it that it is coupled to.
        """
        of_modes = stacked(self.gaussians)
        own = self.block.number
        shift = (numbers[own] - of_modes.means[own]).unsqueeze(-1)
        for (coupled, around), coupling in of_modes.couplings.items():
            if coupled == own:
                shift = shift - coupling @ (numbers[around] - of_modes.means[around]).unsqueeze(-1)
        scale = of_modes.scales[own]
        epsilon = torch.linalg.solve_triangular(scale, shift, upper=False).squeeze(-1)
        log_scale = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        result: Tensor = self.fn.log_prob(epsilon) - log_scale
        return result


def spread_correction(
    log_densities: Tensor, mode: Tensor | int, drawn: int, element: Tensor
) -> Tensor:
    """
    Return how much higher the log density of a mixture is than that of the mode that was chosen.

    It is zero but for one element of the plates, whose density is enough to tell images apart.

    :param log_densities: of values of a block, under all modes at the first image, then at the
        others: ``(images * modes, *batch dims)``.
    :param drawn: number of images and modes that the values were chosen from.
    """
    none = -math.inf  # where a value is beyond what its inverse can tell
    terms = log_densities.nan_to_num(none, none, none)
    result = terms.logsumexp(0) - row_of(terms, mode) - math.log(drawn)
    return torch.where(element, result, 0.0)
