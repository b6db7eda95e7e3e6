# SPDX-License-Identifier: Apache-2.0
"""What a sample statement is: latent, carried, enumerated; its density and its shapes."""

from typing import cast

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import get_provenance
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_mpis._typing import Distribution, SampleMessage

SCALED_PROPOSAL = "_scaled_proposal"  # in a site's infer: its scale counts in its proposal too


def is_subsample(site: SampleMessage) -> bool:
    """Whether a message comes from a plate, not from a sample statement."""
    return bool(site_is_subsample(cast("Message[..., Tensor]", site)))


def is_latent(site: SampleMessage) -> bool:
    """Whether a message is a sample statement without observation, plates' subsamples aside."""
    return site["type"] == "sample" and not site["is_observed"] and not is_subsample(site)


def is_delta(fn: Distribution) -> bool:
    """Whether a distribution has no randomness of its own."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.Delta)


def has_log_density(fn: Distribution) -> bool:
    """Whether a distribution is a ``Delta`` with a density: that of a change of variables."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    density = getattr(fn, "log_density", None) if is_delta(fn) else None
    return density is not None and (bool(get_provenance(density)) or bool((density != 0).any()))


def is_enumerated(site: SampleMessage) -> bool:
    """
    Whether a site is marked for an exact sum (not for Tensor Monte Carlo's ``num_samples``).

    Pyro's two ways to sum, ``"parallel"`` and ``"sequential"``, have the same result.
    """
    infer = site["infer"]
    return bool(infer.get("enumerate")) and infer.get("num_samples") is None


def is_silent(site: SampleMessage) -> bool:
    """Whether a site adds nothing to the density, as ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic")) or site["mask"] is False


def statements(trace: Trace) -> dict[str, SampleMessage]:
    """Return the sample statements of a trace in order, those of the plates left out."""
    return {
        name: cast(SampleMessage, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def batch_shape_of(fn: Distribution) -> torch.Size:
    """Return a distribution's batch shape, also where it is a plain tuple or not there."""
    return torch.Size(getattr(fn, "batch_shape", ()))


def event_shape_of(fn: Distribution, value: object) -> torch.Size:
    """
    Return a distribution's event shape, also where it is a plain tuple.

    :param value: of the site; all of it is one event if the distribution does not tell.
    """
    if hasattr(fn, "event_shape"):
        return torch.Size(fn.event_shape)
    return value.shape if isinstance(value, Tensor) else torch.Size()


def counted(site: SampleMessage, log_prob: Tensor) -> Tensor:
    """Return a density as the model counts it: masked and scaled."""
    result: Tensor = scale_and_mask(log_prob, site["scale"], site["mask"])
    return result


def drawn_from(site: SampleMessage, log_prob: Tensor) -> Tensor:
    """
    Return the density that a site is drawn from: masked by what is left out, and not scaled.

    It is scaled only where the site says so, as in an objective.

    :param log_prob: of the site's distribution without the masks of ``.mask()``.
    """
    scale = site["scale"] if SCALED_PROPOSAL in site["infer"] else 1.0
    result: Tensor = scale_and_mask(log_prob, scale, site["mask"])
    return result
