# SPDX-License-Identifier: Apache-2.0
"""The learned guide: a plate-structured Gaussian, skewed outside of plates."""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis._typing import Distribution, Program
from pyro_mpis.adaptation.gaussian import Gaussian
from pyro_mpis.adaptation.images import (
    IMAGE_SITE,
    MODE_SITE,
    Images,
    Modes,
    end_of,
    particles_of,
    which_image,
)
from pyro_mpis.adaptation.layout import Block, Part, plates_of
from pyro_mpis.adaptation.log_joint import Pair
from pyro_mpis.adaptation.mixture import Mixture, chosen, spread_correction, stacked
from pyro_mpis.adaptation.natural import antithetic
from pyro_mpis.adaptation.parametrisation import Place, from_free
from pyro_mpis.adaptation.skewness import SplitNormal
from pyro_mpis.adaptation.tails import StretchedNormal, TailedNormal, wide_noise
from pyro_mpis.programs.environment import seeded
from pyro_mpis.programs.mapped import run_mapped
from pyro_mpis.programs.tensors import unwrapped

QUANTILE_DRAWS = 4096
LARGEST_WIDE = 10  # numbers outside of plates, up to which some are drawn as wide as the prior
IMPOSSIBLE = 1e30  # log density of a proposal, with which weights are zero
_NUMBERS = itertools.count(1)


class AutoPlateNormal(PyroModule):
    r"""
    A guide with the model's plates, Gaussian in unconstrained numbers.

    All latents outside of plates are one vector with a full covariance matrix, Gaussian or skewed.
    The latents of the same plates are a Gaussian vector in each element, given the latents around
    the plates. Each vector is computed from a site of standard noise, ``_mpis_noise_0`` and so on.
    The model's sites are ``Delta``, as in Pyro's :class:`~pyro.infer.autoguide.AutoContinuous`. So
    there is one particle index for each set of plates, and every particle of the latents around a
    plate has particles of its own inside the plate.

    A posterior may have exact images: a site ``_mpis_image`` then chooses one of them for all
    latents. Orders of labels that are not equally good have a Gaussian each, which a site
    ``_mpis_mode`` chooses. The density is that of the mixture, as far as one block tells these
    apart.

    :meth:`MPImportance.adapt <pyro_mpis.MPImportance.adapt>` makes and fits it. It works in
    :class:`~pyro.infer.Importance`, :class:`~pyro.infer.Predictive` and :class:`~pyro.infer.SVI`;
    its state is in ``state_dict()``.

    :cvar is_learned: always true: ``adapt`` makes it. Its heavy tails reach places where arguments
        of the model overflow, so densities there that are nan or infinite count as zero.
    :ivar latents: names of the model's sites that it has.
    :ivar non_centred: the sites that are standardised by the prior's location and scale.
    """

    is_learned = True

    def __init__(
        self,
        model: Program,
        blocks: Sequence[Block],
        gaussian: Gaussian,
        *,
        non_centred: frozenset[str] = frozenset(),
        supports: Mapping[str, object],
        others: Mapping[str, Tensor],
        tails: bool = True,
        prior: tuple[Tensor, Tensor] | None = None,
        stretches: Mapping[int, float] | None = None,
        skewness: Tensor | None = None,
        images: Images | None = None,
        modes: Modes | None = None,
        only: int | None = None,
        name: str = "",
    ) -> None:
        name = name or f"AutoPlateNormal_{next(_NUMBERS)}"  # so that no two share parameters
        super().__init__(name)
        self._model = (model,)  # in a tuple: its parameters are not the guide's
        self.blocks = tuple(blocks)
        self._supports = dict(supports)  # of the sites for which it is always the same
        self._others = dict(others)
        self._tails = tails
        self._prior = prior  # location and sd of the first block's numbers
        self._stretches = dict(stretches or {})  # of the noise of blocks in plates
        none = gaussian.means[0].detach().new_zeros(self.blocks[0].size)
        self.register_buffer("skewness", none if skewness is None else skewness)  # of block 0
        self.images = images
        self._pairs: tuple[Pair, ...] = tuple(gaussian.couplings)
        self.non_centred = non_centred
        self.latents = tuple(part.name for block in blocks for part in block.parts)
        self.modes = modes
        self.only = only  # the mode to which the guide keeps, of several
        for mode, of_mode in enumerate([gaussian] if modes is None else modes.gaussians):
            self._keep(of_mode, mode)

    def _keep(self, gaussian: Gaussian, mode: int) -> None:
        """Make parameters of a Gaussian."""
        end, dtype = end_of(mode), torch.get_default_dtype()
        for number, (mean, scale) in enumerate(zip(gaussian.means, gaussian.scales, strict=True)):
            setattr(self, f"loc_{number}{end}", PyroParam(mean.detach().to(dtype)))
            positive = PyroParam(scale.detach().to(dtype), constraints.lower_cholesky)
            setattr(self, f"scale_tril_{number}{end}", positive)
        for (block, around), coupling in gaussian.couplings.items():
            name = f"coupling_{block}_{around}{end}"
            setattr(self, name, PyroParam(coupling.detach().to(dtype)))

    @property
    def model(self) -> Program:
        """The model that it is a guide for."""
        return self._model[0]

    def with_gaussian(
        self, gaussian: Gaussian, skewness: Tensor | None = None
    ) -> "AutoPlateNormal":
        """
        Return a guide that differs in its Gaussian alone; of several modes, in that of one.

        :param skewness: of the noise outside of plates, if it differs too; of a single mode.
        """
        if self.modes is None:
            skewness = self.skewness if skewness is None else skewness
            return self._with(gaussian, skewness=skewness)
        gaussians = self._gaussians()
        gaussians[self.only or 0] = gaussian
        modes = replace(self.modes, gaussians=tuple(gaussians))
        return self._with(gaussians[0], modes=modes, only=self.only)

    def with_images(self, images: Images) -> "AutoPlateNormal":
        """Return a guide that is spread evenly over the images of a posterior."""
        return self._with(self.gaussian(), images=images)

    def with_modes(self, modes: Modes) -> "AutoPlateNormal":
        """Return a guide of several Gaussians; its images are told apart as the modes are."""
        if len(modes.gaussians) == 1:
            return self._with(modes.gaussians[0])
        return self._with(modes.gaussians[0], modes=modes)

    def at_mode(self, mode: int) -> "AutoPlateNormal":
        """Return the guide of one mode; its target is the posterior times this mode's share."""
        if self.modes is None:
            return self
        modes = replace(self.modes, gaussians=tuple(self._gaussians()))
        return self._with(self.gaussian(0), modes=modes, only=mode)

    def at_one(self) -> "AutoPlateNormal":
        """Return the guide of the first mode alone, at one image."""
        return self._with(self.gaussian(0), images=None)

    def _gaussians(self) -> list[Gaussian]:
        """Return the Gaussians of all modes."""
        return [self.gaussian(mode) for mode in range(self.num_modes)]

    @property
    def num_modes(self) -> int:
        """The number of Gaussians."""
        return 1 if self.modes is None else len(self.modes.gaussians)

    def _with(self, gaussian: Gaussian, **changes: Any) -> "AutoPlateNormal":
        """Return a guide of another Gaussian, of one mode if nothing else is said."""
        kept = {
            "non_centred": self.non_centred,
            "supports": self._supports,
            "others": self._others,
            "tails": self._tails,
            "prior": self._prior,
            "stretches": self._stretches,
            "skewness": self.skewness,
            "images": self.images,
            "name": self._pyro_name,
        }
        return AutoPlateNormal(self.model, self.blocks, gaussian, **{**kept, **changes})

    def tells_images_apart(self, block: Block) -> bool:
        """Whether the density of a block depends on no other latent, so that images can use it."""
        names = {part.name for part in block.parts}
        alone = all(number != block.number for number, _ in self._pairs)
        return alone and names <= self._supports.keys() and not names & self.non_centred

    @property
    def is_skewed(self) -> bool:
        """Whether the noise outside of plates is skewed; that of several modes is not."""
        return self._tails and self.num_modes == 1 and bool(self.skewness.any())

    @property
    def reaches_prior(self) -> bool:
        """Whether some draws of the latents outside of plates are as wide as the prior."""
        return self._tails and self._wide(self.blocks[0]) is not None

    def choices(self, *, is_final: bool) -> dict[str, int]:
        """Return the numbers of particles of the sites that choose an image and a mode."""
        modes = self.num_modes if self.only is None else 1
        return particles_of(self.images, modes, is_final=is_final)

    @property
    def noise_sites(self) -> tuple[str, ...]:
        """The names of the noise sites, one of each block."""
        return tuple(f"_mpis_noise_{block.number}" for block in self.blocks)

    def gaussian(self, mode: int | None = None) -> Gaussian:
        """Return the Gaussian of the unconstrained numbers; of several, that of one mode."""
        end = end_of(self.only or 0 if mode is None else mode)
        return Gaussian(
            [getattr(self, f"loc_{b.number}{end}") for b in self.blocks],
            [getattr(self, f"scale_tril_{b.number}{end}") for b in self.blocks],
            {pair: getattr(self, "coupling_{}_{}".format(*pair) + end) for pair in self._pairs},
        )

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample all of the latents: the guide as a Pyro program."""
        mode = self._mode()
        gaussian = self._chosen(mode)
        plates = plates_of(self.blocks)
        noise = [block.padded(self._noise(block, plates)) for block in self.blocks]
        numbers = gaussian.at(noise)
        values = self._values(numbers, args, kwargs)
        corrections = self._corrections(mode, numbers, values)
        values = self._at_image(values)
        for block, scale in zip(self.blocks, gaussian.scales, strict=True):
            log_scale = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_scale = log_scale - corrections.get(block.number, 0.0)
            for number, part in enumerate(block.parts):
                value, log_derivative = values[part.name]
                if number == 0:  # of the block's noise: counted at one of its sites
                    shape = block.shape[len(block.shape) - len(part.batch_shape) :]
                    log_derivative = log_derivative + (log_scale / part.own_elements).reshape(shape)
                log_density = (-log_derivative).clamp(max=IMPOSSIBLE)  # where a scale underflows
                fn = dist.Delta(value, log_density=log_density, event_dim=part.event_dim)
                with contextlib.ExitStack() as entered:
                    for frame in part.frames:
                        entered.enter_context(plates[frame.name])
                    pyro.sample(part.name, fn)
        return {name: value for name, (value, _) in values.items()}

    def _mode(self) -> Tensor | int:
        """Choose one of the modes."""
        if self.modes is None or self.only is not None:
            return self.only or 0
        return which_image(self._uniform(MODE_SITE), self.num_modes)

    def _uniform(self, site: str) -> Tensor:
        one = self.loc_0.detach().new_ones(())
        return pyro.sample(site, dist.Uniform(0 * one, one), infer={"is_auxiliary": True})

    def _chosen(self, mode: Tensor | int) -> Gaussian:
        """Return the Gaussian of one mode, whose number may be mapped."""
        if isinstance(mode, int):
            return self.gaussian(mode)
        return chosen(stacked(self._gaussians()), mode)

    def _corrections(
        self,
        mode: Tensor | int,
        numbers: Sequence[Tensor],
        values: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[int, Tensor]:
        """Return how much higher a block's log density is as a mixture over images and modes."""
        teller = self.modes if self.modes is not None else self.images
        if teller is None:
            return {}
        block = self.blocks[teller.block]
        fn = self._noise_fn(block)
        mixture = Mixture(self._gaussians(), block, fn, self._supports, self.images)
        drawn = math.prod(self.choices(is_final=True).values())
        terms = mixture.log_densities(numbers, values)
        return {block.number: spread_correction(terms, mode, drawn, teller.element)}

    def _at_image(
        self, values: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Choose an image, and bring the values there."""
        if self.images is None:
            return dict(values)
        which = which_image(self._uniform(IMAGE_SITE), self.images.number)
        moved = self.images.of({name: value for name, (value, _) in values.items()}, which)
        return {name: (moved[name], values[name][1]) for name in values}

    def _noise_fn(self, block: Block) -> Distribution:
        """Return the distribution of the standard noise of a block."""
        zeros = getattr(self, f"loc_{block.number}").detach().new_zeros(block.size)
        if self._tails and block.is_outer:
            return TailedNormal(zeros, self._wide(block), self.skewness if self.is_skewed else None)
        if self._tails and block.number in self._stretches:
            return StretchedNormal(zeros, self._stretches[block.number])
        fn: Distribution = dist.Normal(zeros, 1.0).to_event(1)
        return fn

    def _noise(self, block: Block, plates: Mapping[str, pyro.plate]) -> Tensor:
        """Sample the standard noise of a block."""
        fn = self._noise_fn(block)
        with contextlib.ExitStack() as entered:
            for plate in block.plates:
                entered.enter_context(plates[plate.name])
            return pyro.sample(self.noise_sites[block.number], fn, infer={"is_auxiliary": True})

    def _wide(self, block: Block) -> tuple[Tensor, Tensor] | None:
        """Return location and scale of the prior of a block of few numbers, as its noise."""
        if self._prior is None or block.size > LARGEST_WIDE:
            return None
        loc, sd = (part.to(self.loc_0) for part in self._prior)
        return wide_noise(self._gaussians(), loc, sd)

    def _values(
        self, numbers: Sequence[Tensor], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """
        Return each site's value and the log derivative of the map to it.

        :param numbers: of each block: ``(*left, *batch dims, D)``.
        """
        free: dict[str, Tensor] = {}
        parts: dict[str, Part] = {}
        for block, z in zip(self.blocks, numbers, strict=True):
            free |= block.split(z)
            parts |= {part.name: part for part in block.parts}
        values = {
            name: from_free(support, free[name], parts[name].event_dim)
            for name, support in self._supports.items()
            if name not in self.non_centred
        }
        missing = {name: free[name] for name in parts if name not in values}
        if missing:
            given = {**self._others, **{name: value for name, (value, _) in values.items()}}
            place = Place(missing, self.non_centred, given)
            values |= place.run(self.model, args, kwargs)
        return values

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """
        Return each latent's value at the Gaussian's mean, as Pyro's autoguides do.

        :param args: what the model was called with.
        """
        with torch.no_grad():
            values = self._values(self.gaussian().means, args, kwargs)
        return {name: value.detach() for name, (value, _) in values.items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """
        Return quantiles of each latent under the guide, of draws that are always the same.

        :param quantiles: probabilities.
        :param args: what the model was called with.
        :return: ``{site: (quantiles, *shape)}``.
        """
        draws = self.draws(QUANTILE_DRAWS, args, kwargs)
        probabilities = torch.as_tensor(quantiles)
        return {name: value.quantile(probabilities.to(value), 0) for name, value in draws.items()}

    def draws(
        self, number: int, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """
        Return draws of each latent that are always the same: ``(number, *shape)``.

        :param number: an even one.
        """
        draws: dict[str, Tensor] = {}

        def at_single_values(numbers: dict[str, Tensor]) -> None:
            which = numbers.pop(IMAGE_SITE, None)
            mode = numbers.pop(MODE_SITE, self.only or 0)
            found = self._values(self._chosen(mode).at(list(numbers.values())), args, kwargs)
            values = {name: value for name, (value, _) in found.items()}
            if which is not None and self.images is not None:
                values = self.images.of(values, which)
            for name, value in values.items():
                draws[name] = unwrapped(value).tensor.detach()

        with torch.no_grad(), seeded(0):
            shapes = [(*block.shape, block.size) for block in self.blocks]
            noise = [antithetic(number, shape).to(self.loc_0) for shape in shapes]
            if self.is_skewed:
                noise[0] = SplitNormal.of(self.skewness).of_normal(noise[0])
            level = {str(block): epsilon for block, epsilon in enumerate(noise)}
            every = torch.arange(number)
            if self.modes is not None and self.only is None:
                level[MODE_SITE] = every % self.num_modes
                every = every // self.num_modes
            if self.images is not None:
                level[IMAGE_SITE] = every % self.images.number
            run_mapped(at_single_values, [level], patched=True)
        return draws
