# SPDX-License-Identifier: Apache-2.0
r"""
How masks of latents count.

``poutine.mask`` around a latent that is summed over its support does not count, as in Pyro's
TraceEnum_ELBO. Any other latent that a mask hides is drawn all the same. Element by element:

* where something that no mask hides reads it, its prior is flat (on its support), as in Pyro's SVI
  and HMC: the density of the model is one, that of the proposal counts in full;
* where nothing of the kind reads it, as at the padded end of a sequence, it is left out. If the
  guide draws it, neither density counts. If it is drawn from the prior, or summed, both count, as
  if there were no mask: they sum to one. It is then a forecast.

So a guide's own masks mean nothing. In a site's message, once changed by this module, masks within
the distribution are those of a flat prior, and the message's own mask is of what is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis._typing import Distribution, SampleMessage
from pyro_mpis.programs.messages import is_delta, is_latent, statements
from pyro_mpis.programs.tensors import is_mapped

Mask = Tensor | bool


@dataclass(frozen=True)
class Parts:
    """A distribution without its masks, and all of them in one."""

    inner: Distribution
    event_dims: int  # batch dims of the inner one that are event dims of the site
    mask: Mask | None  # broadcasts to the inner one's batch shape; None if there is none

    def masked(self, mask: Mask) -> Distribution:
        """Put the distribution together again, under another mask."""
        fn = self.inner if mask is True else MaskedDistribution(self.inner, mask)
        return fn.to_event(self.event_dims) if self.event_dims else fn


def taken_apart(fn: torch.distributions.Distribution, mask: Mask | None = None) -> Parts:
    """
    Take the masks of ``.mask()`` out of a distribution.

    :param mask: one more, of the message.
    """
    found = [] if mask is None or mask is True else [(mask, 0)]
    part: Any = fn
    dims = 0
    inner, event_dims = part, 0
    while isinstance(part, MaskedDistribution | Independent):
        if isinstance(part, MaskedDistribution):
            found += [] if part._mask is True else [(part._mask, dims)]
            inner, event_dims = part.base_dist, dims
        else:
            dims += part.reinterpreted_batch_ndims
        part = part.base_dist
    total: Mask | None = None
    for one, outer in found:
        one = one if isinstance(one, bool) else widened(one.bool(), event_dims - outer)
        total = one if total is None else total & one
    return Parts(inner, event_dims, total)


def unmasked(fn: Distribution) -> Distribution:
    """Return a distribution without the masks of ``.mask()``."""
    parts = taken_apart(fn)
    return fn if parts.mask is None else parts.masked(True)


def widened(mask: Tensor, dims: int) -> Tensor:
    """Add dims of size one on the right."""
    return mask.reshape((*mask.shape, *(1,) * dims))


@dataclass(frozen=True)
class Masks:
    """How the masks of a model's latents, and of its guide's sites, count; True where they do."""

    seen: Mapping[str, Tensor] = field(default_factory=dict)  # in a plain run: (*inner batch shape)
    lifted: Mapping[str, Tensor] = field(default_factory=dict)  # counts although masked, likewise
    left_out: Mapping[str, Tensor] = field(default_factory=dict)  # of the model: (*batch shape)
    not_proposed: Mapping[str, Tensor] = field(default_factory=dict)  # of the guide, likewise

    def of_model(self, site: SampleMessage) -> SampleMessage:
        """
        Return a message of the model with its masks as they count.

        :raises NotImplementedError: if the mask differs between particles, or the distribution has
            no batch shape.
        """
        name = site["name"]
        if name not in self.seen or not is_latent(site):
            return site
        parts = taken_apart(site["fn"], site["mask"])
        mask: Mask = True if parts.mask is None else parts.mask
        if isinstance(mask, Tensor) and is_mapped(mask):
            raise NotImplementedError(f"latent site '{name}' is under a mask computed from latents")
        if not hasattr(parts.inner, "batch_shape"):
            raise NotImplementedError(
                f"latent site '{name}' is under a mask, and {type(parts.inner).__name__} has no "
                "batch_shape"
            )
        left_out = self.left_out.get(name)
        mask = mask | self.lifted.get(name, False)
        if left_out is not None:
            mask = mask | widened(left_out, parts.event_dims)
        fn = parts.masked(_simplified(mask))
        return _changed(site, fn, None if left_out is None else ~left_out)

    def of_guide(self, site: SampleMessage) -> SampleMessage:
        """Return a message of the guide without its masks, but for what is left out."""
        if not is_latent(site):
            return site
        left_out = self.not_proposed.get(site["name"])
        fn = unmasked(site["fn"])
        return _changed(site, fn, None if left_out is None else ~left_out)


def _simplified(mask: Mask) -> Mask:
    """Return a mask that is the same everywhere as a number."""
    if isinstance(mask, Tensor) and bool(mask.all()):
        return True
    if isinstance(mask, Tensor) and not bool(mask.any()):
        return False
    return mask


def _changed(site: SampleMessage, fn: Distribution, mask: Mask | None) -> SampleMessage:
    return cast(SampleMessage, {**site, "fn": fn, "mask": mask})


class ModelMasks(Messenger):
    """Let the masks of a model's latents count as they are to."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: SampleMessage) -> None:
        msg.update(self.masks.of_model(msg))


class GuideMasks(Messenger):
    """Likewise of a guide's sites."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: SampleMessage) -> None:
        msg.update(self.masks.of_guide(msg))

    def _pyro_inspect(self, msg: SampleMessage) -> None:
        """Autoguides ask for the mask, and compute no density where all is masked."""
        msg["mask"] = None


def is_masked(site: SampleMessage) -> bool:
    """Whether a latent is under any mask."""
    return is_latent(site) and taken_apart(site["fn"], site["mask"]).mask is not None


def mask_of(site: SampleMessage) -> Tensor | None:
    """Return a latent's mask over the inner batch shape, expanded; None if it has none."""
    parts = taken_apart(site["fn"], site["mask"])
    if parts.mask is None:
        return None
    value = site["value"]
    mask = torch.as_tensor(parts.mask, device=value.device)
    shape = torch.Size(getattr(parts.inner, "batch_shape", ()))
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"site '{site['name']}': its mask has shape {tuple(mask.shape)}, which does not "
            f"broadcast to the batch shape {tuple(shape)} of its distribution. Give it the shape "
            "of the site's plates."
        ) from error


def masks_seen(model_trace: Trace) -> dict[str, Tensor]:
    """Return the masks of a model's latents, True where they count; none of ``Delta`` sites."""
    result = {}
    for name, site in statements(model_trace).items():
        if is_latent(site) and isinstance(site["value"], Tensor):
            mask = None if is_delta(site["fn"]) else mask_of(site)
            if mask is not None:
                result[name] = mask
    return result
