# SPDX-License-Identifier: Apache-2.0
r"""
Spread the particles of a site evenly: Latin hypercubes in place of independent draws.

Of K particles of a scalar, exactly one lies in each K-th part of its distribution, at a random
place of it; which particle lies in which is a random permutation. Particle k alone then has exactly
the distribution, :math:`F^{-1}(u_k)` of a uniform number :math:`u_k`. Every scalar of every site
and plate element has a permutation of its own, so that particle k of one is independent of particle
k of any other, and of all that it is drawn given. This is all that the expected evidence depends on
(docs/design.md).

Quantile functions are those of standard distributions at uniform numbers of float64, in whose tails
float32 has too few numbers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution

SMALLEST, LARGEST = 2.0**-54, 1 - 2.0**-53  # uniform numbers in float64, neither 0 nor 1


@dataclass(frozen=True)
class Strata:
    """
    Which draws of a site are to be spread evenly; all others are independent.

    :ivar number: the number of draws.
    :ivar spread: how many of them, the first ones.
    :ivar kept: in place of the first, the numbers of those draws: ``(spread, *batch shape)``.
    """

    number: int
    spread: int
    kept: Tensor | None = None

    def uniforms(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return uniform numbers between 0 and 1: ``(number, *shape)``, float64."""
        spread = latin_hypercube(self.spread, shape, device)
        if self.spread == self.number:
            return spread
        result = torch.rand((self.number, *shape), dtype=torch.double, device=device)
        result = result.clamp(SMALLEST, LARGEST)
        if self.kept is None:
            result[: self.spread] = spread
            return result
        events = (1,) * (spread.dim() - self.kept.dim())
        kept = self.kept.to(device).reshape((*self.kept.shape, *events))
        return result.scatter(0, kept.expand(spread.shape), spread)


def latin_hypercube(number: int, shape: torch.Size, device: torch.device) -> Tensor:
    """
    Return uniform numbers, one in each stratum of every scalar; draws random numbers.

    :return: ``(number, *shape)``, float64.
    """
    # A row for each scalar, as sorting along the last dim is fastest. In float64, of which no two
    # numbers are equal: equal ones would be sorted by particle.
    rows = torch.rand((math.prod(shape), number), dtype=torch.double, device=device).argsort(1)
    uniforms = torch.rand(rows.shape, dtype=torch.double, device=device)
    uniforms.add_(rows).div_(number).clamp_(SMALLEST, LARGEST)
    # Contiguous: whatever is computed from the particles lies in memory as they do.
    return uniforms.T.contiguous().reshape((number, *shape))


def _normal(uniform: Tensor) -> Tensor:
    result: Tensor = torch.special.ndtri(uniform)
    return result


def _of_location(standard: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda fn, uniform: fn.loc + fn.scale * standard(uniform).to(fn.loc.dtype)


def _of_scale(standard: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda fn, uniform: fn.scale * standard(uniform).to(fn.scale.dtype)


def _exponential(fn: Any, uniform: Tensor) -> Tensor:
    value: Tensor = -(-uniform).log1p().to(fn.rate.dtype) / fn.rate
    return value


def _uniform(fn: Any, uniform: Tensor) -> Tensor:
    """Below the upper bound, at which the density is zero: rounding may reach it."""
    value = (fn.low + (fn.high - fn.low) * uniform).to(fn.low.dtype)
    return torch.minimum(value, torch.nextafter(fn.high, fn.low))


def _multivariate_normal(fn: Any, uniform: Tensor) -> Tensor:
    noise = _normal(uniform).to(fn.loc.dtype)
    value: Tensor = fn.loc + (fn._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return value


def _low_rank_normal(fn: Any, uniform: Tensor) -> Tensor:
    noise = _normal(uniform).to(fn.loc.dtype)
    common, own = noise.split([fn._unbroadcasted_cov_factor.shape[-1], fn.loc.shape[-1]], -1)
    common = (fn._unbroadcasted_cov_factor @ common.unsqueeze(-1)).squeeze(-1)
    value: Tensor = fn.loc + common + fn._unbroadcasted_cov_diag.sqrt() * own
    return value


# Of uniform numbers in the shape of the batch, or of the event where that is a vector.
_QUANTILES: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "Normal": _of_location(_normal),
    "Cauchy": _of_location(lambda u: -1 / (math.pi * u).tan()),
    "Laplace": _of_location(lambda u: torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log())),
    "Logistic": _of_location(lambda u: u.log() - (-u).log1p()),
    "HalfNormal": _of_scale(lambda u: -_normal((1 - u) / 2)),
    "HalfCauchy": _of_scale(lambda u: (math.pi / 2 * u).tan()),
    "Exponential": _exponential,
    "Uniform": _uniform,
    "MultivariateNormal": _multivariate_normal,
    "LowRankMultivariateNormal": _low_rank_normal,
}
# By the very class: a subclass may draw in another way.
_BY_CLASS = {
    getattr(module, name): quantile
    for name, quantile in _QUANTILES.items()
    for module in (dist, torch.distributions)
    if hasattr(module, name)
}


def uniform_shape(fn: Any) -> torch.Size | None:
    """Return the shape of the uniform numbers of one value; None if it is not drawn from such."""
    if hasattr(fn, "uniform_shape"):  # a distribution of this package's own
        return torch.Size(fn.batch_shape + fn.uniform_shape)
    if isinstance(fn, Independent | MaskedDistribution) or _is_transformed(fn):
        return uniform_shape(fn.base_dist)
    if type(fn) not in _BY_CLASS:
        return None
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        return torch.Size((*fn.batch_shape, fn.cov_factor.shape[-1] + fn.event_shape[0]))
    return torch.Size(fn.batch_shape + fn.event_shape)


def value_at(fn: Any, uniform: Tensor) -> Tensor:
    """
    Return the value of a distribution at uniform numbers between 0 and 1.

    :param fn: of any batch shape that has the numbers' dims.
    """
    if hasattr(fn, "value_at"):
        return fn.value_at(uniform)  # type: ignore[no-any-return]
    if type(fn) in _BY_CLASS:
        return _BY_CLASS[type(fn)](fn, uniform)
    value = value_at(fn.base_dist, uniform)
    for transform in fn.transforms if _is_transformed(fn) else ():
        value = transform(value)
    return value


def _is_transformed(fn: Any) -> bool:
    """Whether a distribution draws from its base, and transforms what it drew."""
    ways = (type(fn).sample, type(fn).rsample) if isinstance(fn, TransformedDistribution) else ()
    plain = (TransformedDistribution.sample, TransformedDistribution.rsample)
    return type(fn) not in _BY_CLASS and ways == plain
