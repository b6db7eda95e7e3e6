# SPDX-License-Identifier: Apache-2.0
"""
Draw what a guide transforms one way.

Some normalizing flows (``BlockAutoregressive``, ``Planar``, ``Radial`` and others) have no inverse:
their density is known at the value that they have just made, and nowhere else. So the base of such
a site is drawn, and the site is carried: a ``Delta`` with the density of the transformed value.
"""

from collections.abc import Iterator, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Independent,
    Transform,
    TransformedDistribution,
)
from torch.distributions.utils import _sum_rightmost

from pyro_mpis._typing import SampleMessage
from pyro_mpis.programs.environment import rng_state, set_rng_state
from pyro_mpis.programs.messages import is_latent

_IS_ONE_WAY: dict[type, bool] = {}  # found once for each class of Pyro, or of the user


class DrawBase(Messenger):
    """Draw the base of a latent whose transforms have no inverse, and carry the latent."""

    def _pyro_sample(self, msg: SampleMessage) -> None:
        fn: Distribution = msg["fn"]
        dims = 0
        while isinstance(fn, Independent):
            dims += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        if not isinstance(fn, TransformedDistribution) or not is_latent(msg):
            return
        if all(type(t).__module__.startswith("torch.") for t in _parts(fn.transforms)):
            return
        if _is_one_way(fn.base_dist, tuple(_parts(fn.transforms))):
            base, base_dims = fn.base_dist, dims
            while isinstance(base, Independent):  # of torch, which cannot be sampled from by Pyro
                base_dims += base.reinterpreted_batch_ndims
                base = base.base_dist
            name, of_base = f"{msg['name']}_base", dist.Independent(base, base_dims)
            value: Tensor = pyro.sample(name, of_base, infer={"is_auxiliary": True})
            msg["fn"] = _carried(fn, value, dims)


def _parts(transforms: Sequence[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _parts(transform.parts)
        else:
            yield transform


def _is_one_way(base: Distribution, transforms: Sequence[Transform]) -> bool:
    """Whether some transform has no inverse; tries each class once, at one value."""
    if all(type(transform) in _IS_ONE_WAY for transform in transforms):
        return any(_IS_ONE_WAY[type(transform)] for transform in transforms)
    state = rng_state()
    with torch.no_grad():
        value = base.sample()
        for transform in transforms:
            value = transform(value)
            try:
                transform.inv(value.clone())  # another object, lest it be remembered
                _IS_ONE_WAY[type(transform)] = False
            except (KeyError, NotImplementedError):
                _IS_ONE_WAY[type(transform)] = True
    set_rng_state(state)
    return any(_IS_ONE_WAY[type(transform)] for transform in transforms)


def _carried(fn: TransformedDistribution, value: Tensor, dims: int) -> dist.Delta:
    """Transform a value of the base, with the density of the result but for that of the base."""
    event_dim = len(fn.base_dist.event_shape)
    log_density = value.new_zeros(())
    for transform in fn.transforms:
        result = transform(value)
        change = transform.log_abs_det_jacobian(value, result)
        log_density = log_density - _sum_rightmost(change, event_dim - transform.domain.event_dim)
        event_dim += transform.codomain.event_dim - transform.domain.event_dim
        value = result
    log_density = _sum_rightmost(log_density, dims)
    return dist.Delta(value, log_density=log_density, event_dim=event_dim + dims)
