# SPDX-License-Identifier: Apache-2.0
"""
Draw from a distribution within a mapped run: one value for each particle.

Torch cannot draw from most distributions under vmap. So the distribution is taken out of the mapped
run: a copy of it holds all particles' arguments, in a batch dim left of all others. If an argument
lacks some batch dims, a dim on its left would meet another dim than that of the particles; then
particles are drawn one after the other.
"""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Transform, TransformedDistribution

from pyro_mpis.programs.stratified import Strata, uniform_shape, value_at
from pyro_mpis.programs.tensors import (
    device_of,
    exchange,
    is_mapped,
    mapped_as,
    tensors_of,
    unwrapped,
)


def draw_of(fn: Any, number: Tensor, strata: Strata) -> Tensor:
    """
    Draw a value for each particle; draws random numbers.

    :param number: the particle's number, mapped at the level of the particles.
    :param strata: how many there are, and which are to be spread evenly.
    :return: the value, mapped at that level: ``(*batch shape, *event shape)``.
    """
    shape = uniform_shape(fn) if strata.spread > 1 else None
    uniforms = None if shape is None else strata.uniforms(shape, device_of(tensors_of(fn)))
    values = _together(fn, strata.number, uniforms)
    if values is None:
        values = torch.stack([_alone(fn, k, uniforms) for k in range(strata.number)])
    return mapped_as(number, values)


def _together(fn: Any, num_samples: int, uniforms: Tensor | None) -> Tensor | None:
    """Draw all particles at once: ``(K, *shape)``; None if that is not possible."""
    if not isinstance(fn, Distribution):
        return None
    shape = torch.Size((num_samples, *fn.batch_shape, *fn.event_shape))
    if not any(map(is_mapped, tensors_of(fn))):
        try:
            values = _drawn(fn.expand(torch.Size((num_samples, *fn.batch_shape))), uniforms)
        except NotImplementedError:
            return None
    elif _has_all_dims(fn):
        values = _drawn(_lifted(fn, num_samples), uniforms)
    else:
        return None
    return values if values.shape == shape else None


def _drawn(fn: Any, uniforms: Tensor | None) -> Tensor:
    """Draw from a distribution, or take its values at uniform numbers."""
    if uniforms is None:
        return fn()  # type: ignore[no-any-return]
    return value_at(fn, uniforms)


def _alone(fn: Any, particle: int, uniforms: Tensor | None) -> Tensor:
    """Draw one particle."""

    def at(tensor: Tensor) -> Tensor:
        mapped = unwrapped(tensor)
        return mapped.tensor[particle] if mapped.levels else tensor

    value = _drawn(exchange(fn, at), None if uniforms is None else uniforms[particle])
    if is_mapped(value):
        raise RuntimeError(f"{type(fn).__name__} holds values of latents out of reach")
    return value


def _has_all_dims(fn: Distribution) -> bool:
    """Whether all tensors of a distribution, and of its parts, have all of its batch dims."""
    if isinstance(fn, Independent | MaskedDistribution):
        return _has_all_dims(fn.base_dist)
    batch = tuple(fn.batch_shape)
    if isinstance(fn, TransformedDistribution):
        shape = (*batch, *fn.event_shape)
        tensors = tensors_of(fn.transforms)
        same = all(tuple(tensor.shape) == shape for tensor in tensors)
        return same and tuple(fn.base_dist.batch_shape) == batch and _has_all_dims(fn.base_dist)
    for name, part in vars(fn).items():
        if isinstance(part, Tensor):
            if batch and name.startswith("_unbroadcasted"):
                return False
            if tuple(part.shape[: len(batch)]) != batch:
                return False
        elif isinstance(part, Distribution) and not _has_all_dims(part):
            return False
        elif isinstance(part, Transform | list | tuple | dict) and tensors_of(part):
            return False
    return True


def _lifted(fn: Any, num_samples: int) -> Any:
    """Copy a distribution with all particles' arguments, in a batch dim on the left."""

    def of_all(tensor: Tensor) -> Tensor:
        mapped = unwrapped(tensor)
        return mapped.tensor if mapped.levels else tensor.expand((num_samples, *tensor.shape))

    copies: dict[int, Any] = {}
    result = exchange(fn, of_all, copies)
    for part in copies.values():
        if isinstance(part, Distribution):
            part._batch_shape = torch.Size((num_samples, *part._batch_shape))
    return result
