# SPDX-License-Identifier: Apache-2.0
"""Make a model ready to be learned: sum what can be summed, lift masks, draw where none can."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis._typing import Program, SampleMessage
from pyro_mpis.programs.masks import unmasked
from pyro_mpis.programs.messages import is_delta, is_enumerated, is_latent

IMPROPER_SD = 5.0  # in unconstrained numbers, of draws in place of those of an improper prior
LARGEST_SUPPORT = 64  # values of a site that is summed without being asked to


class Sum(Messenger):
    """Mark latent sites for an exact sum over their support."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and msg["name"] in self.names:
            msg["infer"]["enumerate"] = "parallel"


class Unmask(Messenger):
    """Lift the masks of latent sites: where they are masked they then have their prior."""

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg):
            msg["mask"], msg["fn"] = None, unmasked(msg["fn"])


class _Improper(dist.ImproperUniform):
    """An improper prior that can be drawn from: a fit has to start somewhere."""

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw normal unconstrained numbers, and map them to the support."""
        transform = biject_to(self.support)
        shape = (*sample_shape, *self.batch_shape, *transform.inverse_shape(self.event_shape))
        value: Tensor = transform(IMPROPER_SD * torch.randn(shape))
        return value


class Drawable(Messenger):
    """Make latent sites with an improper prior ones that can be drawn from."""

    def _pyro_sample(self, msg: SampleMessage) -> None:
        if is_latent(msg) and type(msg["fn"]) is dist.ImproperUniform:
            fn = msg["fn"]
            msg["fn"] = _Improper(  # type: ignore[no-untyped-call]
                fn.support, fn.batch_shape, fn.event_shape
            )


def is_improper(fn: object) -> bool:
    """Whether a distribution is one made by :class:`Drawable`."""
    return isinstance(fn, _Improper)


def summable(sites: Mapping[str, SampleMessage]) -> frozenset[str]:
    """
    Return the discrete latents that can be summed and are not marked for it.

    :param sites: of a plain run of the model.
    """
    result = set()
    for name, site in sites.items():
        fn = site["fn"]
        if not is_latent(site) or is_delta(fn) or is_enumerated(site):
            continue
        if site["infer"].get("num_samples") is not None:
            continue
        if not getattr(fn, "has_enumerate_support", False) or fn.event_shape:
            continue
        if _in_plates(site) and _support_size(fn) <= LARGEST_SUPPORT:
            result.add(name)
    return frozenset(result)


def _in_plates(site: SampleMessage) -> bool:
    """Whether all batch dims of a site are plates."""
    declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    shape = site["fn"].batch_shape
    return all(size == 1 or dim in declared for dim, size in enumerate(shape, -len(shape)))


def _support_size(fn: object) -> int:
    try:
        support: Tensor = fn.enumerate_support(expand=False)  # type: ignore[attr-defined]
    except (NotImplementedError, RuntimeError, ValueError):  # as of a Binomial of several totals
        return LARGEST_SUPPORT + 1
    return len(support)


def prepared(model: Program, summed: frozenset[str], *, masked: bool) -> Program:
    """
    Return a model whose given sites are summed.

    :param masked: whether a latent is masked. Its density then counts all the same, as in a run
        without a guide: where it is masked it has its prior.
    """
    if summed:
        model = Sum(summed)(model)
    if masked:
        model = Unmask()(model)
    return model
