# SPDX-License-Identifier: Apache-2.0
"""Other values of latents (of their support, drawn anew, or far away), and other data."""

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.programs.generic import moved
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import is_latent

SPREAD = 3.0  # how much farther, where the support is unbounded
MAX_SUPPORT = 16  # values of a support that are all tried


def small_support(site: SampleMessage) -> Tensor | None:
    """Return the values of a small finite support, of the shape of the site's value."""
    fn, value = unmasked(site["fn"]), detach_provenance(site["value"])
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        with torch._C.DisableTorchFunctionSubclass():
            support = fn.enumerate_support(expand=False)
    except (NotImplementedError, RuntimeError):
        return None
    support = support.reshape((len(support), *(1,) * (value.dim() - fn.event_dim), *fn.event_shape))
    return support.expand((-1, *value.shape)) if len(support) <= MAX_SUPPORT else None


def redrawn(fn: Distribution, value: Tensor, number: int) -> Tensor:
    """Return other values of a latent: random ones, or steps where none can be drawn."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            drawn = [detach_provenance(unmasked(fn)()) for _ in range(number)]
        return torch.stack([one.expand(value.shape) for one in drawn]).detach()
    except (NotImplementedError, RuntimeError, ValueError):
        steps = torch.arange(1, number + 1).to(value.device, value.dtype)
        return value.detach() + steps.reshape((-1,) + (1,) * value.dim())


def far_from(fn: Distribution, values: Tensor) -> Tensor:
    """Return values of the support that are far from some; the same where none are known."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            transform = biject_to(unmasked(fn).support)
            free = transform.inv(values)
            far = transform(SPREAD * free + SPREAD * free.sign())
    except (NotImplementedError, RuntimeError, ValueError):
        return values
    return torch.where(far.isfinite(), far, values)


def differing(values: Tensor) -> Tensor:
    """Change every second value by one where all are the same: a count of none, of no trials."""
    steps = torch.arange(len(values), device=values.device).to(values.dtype) % 2
    steps = steps.reshape((-1,) + (1,) * (values.dim() - 1))
    return torch.where((values == values[:1]).all(0), values + steps, values)


def values_near(site: SampleMessage) -> dict[str, Tensor]:
    """
    Return a site's value, and data moved a little, which do not lie right between two means.

    Moved data may be out of bounds that latents set, where a density tells nothing. Whole numbers
    stay: others may read other latents.
    """
    values = {"log_prob": site["value"]}
    if not is_latent(site) and not _is_whole(site["fn"]):
        values["moved"] = moved(site["value"])
    return values


def _is_whole(fn: Distribution) -> bool:
    """Whether the values of a distribution are whole numbers."""
    try:
        return fn.support is not None and bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False
