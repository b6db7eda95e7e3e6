# SPDX-License-Identifier: Apache-2.0
r"""
From unconstrained numbers to the values of a model's sites, and the Jacobians.

A site is **centred** if its numbers are its value, mapped to the real line by the bijection of its
support. It is **non-centred** if they are that value standardised by its prior's location and scale
given the other latents: :math:`u = \mu + \sigma z`. Locations and scales are taken from the model
as it runs, so that the model need not be rewritten, and the moments are those of its own sites.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ExpTransform

from pyro_mpis._typing import Distribution, Program, SampleMessage
from pyro_mpis.programs.handlers import AllMet, Stop, isolated
from pyro_mpis.programs.messages import is_latent, is_subsample


@dataclass(frozen=True)
class Scaling:
    """The location and scale of a prior, in the unconstrained numbers of its site."""

    loc: Tensor
    scale: Tensor  # of a matrix: lower triangular
    is_matrix: bool = False

    def standard(self, free: Tensor) -> Tensor:
        """Undo :meth:`scaled`."""
        shift = free - self.loc
        if not self.is_matrix:
            return shift / self.scale
        solved = torch.linalg.solve_triangular(self.scale, shift.unsqueeze(-1), upper=False)
        result: Tensor = solved.squeeze(-1)
        return result

    def scaled(self, standard: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``loc + scale * standard`` and the log of its derivative, not summed."""
        if self.is_matrix:
            value = self.loc + (self.scale @ standard.unsqueeze(-1)).squeeze(-1)
            diagonal = self.scale.diagonal(dim1=-2, dim2=-1)
            return value, diagonal.log().expand(value.shape)
        value = self.loc + self.scale * standard
        return value, self.scale.log().expand(value.shape)


def _log_scale(name: str, sign: int = 1) -> Callable[[Distribution], Scaling]:
    def scaling(fn: Distribution) -> Scaling:
        scale = getattr(fn, name)
        return Scaling(sign * scale.log(), torch.ones_like(scale))

    return scaling


def _loc_scale(fn: Distribution) -> Scaling:
    return Scaling(fn.loc, fn.scale)


# Of each family, in the numbers that biject_to maps to its support.
_SCALINGS: dict[type, Callable[[Distribution], Scaling]] = {
    torch.distributions.Normal: _loc_scale,
    torch.distributions.StudentT: _loc_scale,
    torch.distributions.Cauchy: _loc_scale,
    torch.distributions.Laplace: _loc_scale,
    torch.distributions.Gumbel: _loc_scale,
    torch.distributions.LogNormal: _loc_scale,
    torch.distributions.HalfNormal: _log_scale("scale"),
    torch.distributions.HalfCauchy: _log_scale("scale"),
    torch.distributions.Exponential: _log_scale("rate", -1),
    torch.distributions.Weibull: _log_scale("scale"),
    torch.distributions.Gamma: _log_scale("rate", -1),
    dist.InverseGamma: _log_scale("rate"),
    torch.distributions.MultivariateNormal: lambda fn: Scaling(fn.loc, fn.scale_tril, True),
}


def scaling_of(fn: Distribution) -> Scaling | None:
    """Return a prior's location and scale; None if its family has none."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    for family, scaling in _SCALINGS.items():
        if isinstance(fn, family):
            return scaling(fn)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        transforms = fn.transforms
        if len(transforms) == 1 and isinstance(transforms[0], ExpTransform):
            base = scaling_of(fn.base_dist)
            real = getattr(fn.base_dist, "support", None) is constraints.real
            return base if real else None
    return None


def is_gaussian(fn: Distribution) -> bool:
    """Whether a prior is Gaussian in the unconstrained numbers of its site."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, _GAUSSIAN)


_GAUSSIAN = (
    torch.distributions.Normal,
    torch.distributions.LogNormal,
    torch.distributions.MultivariateNormal,
)


def constrained(fn: Distribution, numbers: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """
    Map a site's numbers to its value.

    :param fn: its prior, given the other latents.
    :param numbers: ``(*batch_shape, *free_shape)``.
    :return: the value, and the log derivative of the map: ``(*batch_shape)``.
    """
    log_scale: Tensor | float = 0.0
    event_dim = fn.event_dim
    free = numbers
    if not centred:
        scaling = scaling_of(fn)
        assert scaling is not None
        free, log_scale = scaling.scaled(numbers)
    value, log_derivative = from_free(fn.support, free, event_dim)
    if not centred:
        assert isinstance(log_scale, Tensor)
        dims = log_scale.dim() - log_derivative.dim()
        log_derivative = log_derivative + sum_rightmost(log_scale, dims)
    return value, log_derivative


def from_free(support: object, free: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    """Map unconstrained numbers to a support; return the value and the log derivative."""
    transform = biject_to(support)
    value = transform(free)
    log_derivative = transform.log_abs_det_jacobian(free, value)
    dims = log_derivative.dim() - (value.dim() - event_dim)
    return value, sum_rightmost(log_derivative, dims) if dims else log_derivative


class Place(Messenger):
    """
    Give a model's latent sites values made of unconstrained numbers, and note the derivatives.

    :param numbers: of continuous sites: ``(*batch_shape, *free_shape)``.
    :param non_centred: the sites that are standardised by their prior.
    :param values: of other latent sites.
    """

    def __init__(
        self,
        numbers: Mapping[str, Tensor],
        non_centred: Collection[str],
        values: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.non_centred = non_centred
        self.values = values
        self.log_derivatives: dict[str, Tensor] = {}
        self.placed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_subsample(msg) or not is_latent(msg):
            return
        name = msg["name"]
        if name in self.numbers:
            centred = name not in self.non_centred
            value, log_derivative = constrained(msg["fn"], self.numbers[name], centred=centred)
            self.log_derivatives[name] = log_derivative
            self.placed[name] = value
            msg["value"], msg["done"] = value, True
        elif name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        if msg["done"]:
            msg["is_observed"] = False

    def run(
        self, model: Program, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run a model up to the last of the sites; return their values and log derivatives."""
        names = self.numbers.keys()
        with isolated(), contextlib.suppress(AllMet), Stop(set(names)), self:
            model(*args, **kwargs)
        return {name: (self.placed[name], self.log_derivatives[name]) for name in names}


class Read(Messenger):
    """
    Give a model's latent sites values, and note the unconstrained numbers that these are made of.

    :param values: of continuous sites.
    :param non_centred: the sites that are standardised by their prior.
    :param others: values of other latent sites.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        non_centred: Collection[str],
        others: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.values = values
        self.non_centred = non_centred
        self.others = others
        self.numbers: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: SampleMessage) -> None:
        given = self.values.keys() | self.others.keys()
        if is_subsample(msg) or not is_latent(msg) or msg["name"] not in given:
            return
        name, fn = msg["name"], msg["fn"]
        msg["done"], msg["is_observed"] = True, False
        if name in self.others:
            msg["value"] = self.others[name]
            return
        msg["value"] = self.values[name]
        free = biject_to(fn.support).inv(self.values[name])
        if name in self.non_centred:
            scaling = scaling_of(fn)
            assert scaling is not None
            free = scaling.standard(free)
        self.numbers[name] = free


def is_fixed(support: object, is_mapped: Callable[[Tensor], bool]) -> bool:
    """Whether a support is the same for all values of the other latents."""
    base = getattr(support, "base_constraint", None)
    parts = [part for part in vars(support).values() if isinstance(part, Tensor)]
    return not any(map(is_mapped, parts)) and (base is None or is_fixed(base, is_mapped))
