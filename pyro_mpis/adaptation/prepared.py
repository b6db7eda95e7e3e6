# SPDX-License-Identifier: Apache-2.0
"""Make a model ready to be learned: sum what can be summed, lift masks, draw where none can."""

from collections.abc import Collection, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_mpis._text import quoted
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
        if _is_to_be_drawn(site):
            continue
        size = _values_to_sum(site)
        if size is not None and size <= LARGEST_SUPPORT:
            result.add(name)
    return frozenset(result)


def left_to_prior(sites: Mapping[str, SampleMessage], learned: Collection[str]) -> list[str]:
    """
    Say which discrete latents are drawn from their prior, though nobody asked for it.

    :param sites: the latents, of a plain run of the model.
    :param learned: those that are summed, or that a guide has.
    """
    large, others = {}, []
    for name, site in sites.items():
        if name in learned or is_delta(site["fn"]) or _is_to_be_drawn(site):
            continue
        size = _values_to_sum(site)
        if size is None:
            others.append(name)
        else:
            large[name] = size
    more = "Give a guide of your own that has them, or draw more particles of them: "
    more += "posterior.num_samples = {**posterior.num_samples, 'site': 500}."
    told = []
    if large:
        sizes = ", ".join(f"'{name}' ({size} values)" for name, size in large.items())
        told.append(
            f"{sizes}: adapt sums discrete latents of up to {LARGEST_SUPPORT} values, and leaves "
            "these to their prior, which is poor if data say much of them. Mark the sites with "
            f'infer={{"enumerate": "parallel"}} to have them summed all the same. {more}'
        )
    if others:
        told.append(
            f"{quoted(others)}: discrete latents that cannot be summed. adapt leaves them to their "
            f"prior, which is poor if data say much of them. {more}"
        )
    return told


def _is_to_be_drawn(site: SampleMessage) -> bool:
    """Whether the user has asked for draws in place of a sum."""
    return site["infer"].get("num_samples") is not None


def _in_plates(site: SampleMessage) -> bool:
    """Whether all batch dims of a site are plates."""
    declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    shape = site["fn"].batch_shape
    return all(size == 1 or dim in declared for dim, size in enumerate(shape, -len(shape)))


def _values_to_sum(site: SampleMessage) -> int | None:
    """Return the number of values of a discrete latent; none if they cannot be summed."""
    fn = site["fn"]
    if not getattr(fn, "has_enumerate_support", False) or fn.event_shape or not _in_plates(site):
        return None
    try:
        support: Tensor = fn.enumerate_support(expand=False)
    except (NotImplementedError, RuntimeError, ValueError):  # as of a Binomial of several totals
        return None
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
