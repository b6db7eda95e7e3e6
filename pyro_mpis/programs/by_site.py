# SPDX-License-Identifier: Apache-2.0
"""
Draw the sites of an ``AutoDiagonalNormal`` one by one.

It draws all latents as one vector, which would have a single particle index. Its elements are
independent, so that the same distribution can be drawn site by site, and each site, or each element
of a plate, has an index of its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch.distributions import biject_to
from torch.nn import Module

from pyro_mpis._typing import Program


def by_site(guide: Program) -> Program:
    """Return the same distribution drawn site by site, where a guide draws a vector that can be."""
    # The very class: others of its kind have covariances.
    return BySite(guide) if type(guide) is AutoDiagonalNormal else guide


def is_ready(guide: Program) -> bool:
    """Whether a guide has its parameters: autoguides make them from the first values they see."""
    guide = guide.guide if isinstance(guide, BySite) else guide
    return not isinstance(guide, Module) or getattr(guide, "prototype_trace", None) is not None


@dataclass(frozen=True)
class BySite:
    """The distribution of an ``AutoDiagonalNormal``, with its parameters, drawn site by site."""

    guide: AutoDiagonalNormal

    def __call__(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw each site in the unconstrained space, and map it to its support."""
        if self.guide.prototype_trace is None:
            self.guide._setup_prototype(*args, **kwargs)
        plates = self.guide._create_plates(*args, **kwargs)
        result = {}
        for site, loc, scale in self._sites():
            name, fn = site["name"], site["fn"]
            event_dim = fn.event_dim + loc.dim() - site["value"].dim()
            transform = biject_to(fn.support)
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                normal = dist.Normal(loc, scale).to_event(event_dim)
                unconstrained = pyro.sample(
                    f"{name}_unconstrained", normal, infer={"is_auxiliary": True}
                )
                value = transform(unconstrained)
                log_density = -transform.log_abs_det_jacobian(unconstrained, value)
                more = log_density.dim() - value.dim() + fn.event_dim
                if more:
                    log_density = log_density.flatten(-more).sum(-1)
                delta = dist.Delta(value, log_density=log_density, event_dim=fn.event_dim)
                result[name] = pyro.sample(name, delta)
        return result

    def _sites(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Return each site with its part of the locations and of the scales."""
        with self.guide._pyro_context:  # so that they are those of the param store
            loc, scale = self.guide.loc, self.guide.scale
        parts = zip(self.guide._unpack_latent(loc), self.guide._unpack_latent(scale), strict=True)
        return ((site, of_loc, of_scale) for (site, of_loc), (_, of_scale) in parts)
