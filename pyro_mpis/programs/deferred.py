# SPDX-License-Identifier: Apache-2.0
"""Distributions that cannot be made of mapped arguments: they are made for each combination."""

import inspect
from typing import Any

import torch
from pyro.distributions import Categorical, OrderedLogistic
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis.programs.tensors import exchange, unwrapped


class Deferred(TorchDistribution):
    """A distribution that cannot be made of mapped arguments: it is made for each combination."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._made_by = cls, args, kwargs
        first = type.__call__(cls, *exchange(args, first_of), **exchange(kwargs, first_of))
        self._support = first.support
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support at the first combination."""
        return self._support

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw for one combination only: raises where arguments are mapped."""
        return self._made().sample(sample_shape)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Evaluate for one combination only: raises where arguments are mapped."""
        return self._made().log_prob(value)  # type: ignore[no-any-return]

    def event_dims(self) -> dict[int, int]:
        """Return how many event dims the arguments have: tensor's id -> number, where known."""
        cls, args, kwargs = self._made_by
        named = inspect.signature(cls).bind(*args, **kwargs).arguments
        return {
            id(named[name]): constraint.event_dim
            for name, constraint in cls.arg_constraints.items()  # type: ignore[attr-defined]
            if isinstance(named.get(name), Tensor) and not constraints.is_dependent(constraint)
        }

    def _made(self) -> Any:
        cls, args, kwargs = self._made_by
        return type.__call__(cls, *args, **kwargs)


def first_of(tensor: Tensor) -> Tensor:
    """Return the value of the first combination."""
    plain = unwrapped(tensor)
    return plain.tensor[(0,) * len(plain.levels)]


def made_or_deferred(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a distribution, in one piece or combination by combination; Pyro calls this."""
    if issubclass(cls, Deferred):
        return None
    if cls is OrderedLogistic:
        return _ordered_logistic(*args, **kwargs)
    try:
        return type.__call__(cls, *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return Deferred(cls, args, kwargs)


def _ordered_logistic(
    predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None
) -> OrderedLogistic:
    """Make the distribution without writing into a tensor, which torch cannot map."""
    below = torch.sigmoid(cutpoints - predictor.unsqueeze(-1))
    between = below[..., 1:] - below[..., :-1]
    probs = torch.cat([below[..., :1], between, 1 - below[..., -1:]], -1)
    fn = OrderedLogistic.__new__(OrderedLogistic)
    fn.predictor = predictor.expand(below.shape[:-1])
    fn.cutpoints = cutpoints.expand(below.shape)
    Categorical.__init__(fn, probs, validate_args=validate_args)
    return fn
