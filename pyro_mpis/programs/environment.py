# SPDX-License-Identifier: Apache-2.0
"""The global state that programs run in: parameters, dtype, validation, seeds, handlers."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pyro
import torch
from pyro.params.param_store import StateDict
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_mpis.programs.handlers import isolated

Function = TypeVar("Function", bound=Callable[..., object])

_LOCK = threading.RLock()


def one_at_a_time(function: Function) -> Function:
    """
    Let a function wait while another thread is in any function that is marked so.

    Pyro's handlers and parameters, and torch's generator, are those of a process: programs that run
    in two threads at once would act on each other.
    """

    @functools.wraps(function)
    def waiting(*args: object, **kwargs: object) -> object:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting  # type: ignore[return-value]


@dataclass(frozen=True)
class Environment:
    """
    The global state that programs run in, as it is when this is made.

    Parameters keep the values that they have then: a step of an optimiser, which writes into them,
    does not change what a posterior answers. Modules hold the very tensors that the param store
    holds, so programs get the same tensors, with those values for the time.
    """

    params: StateDict = field(default_factory=lambda: pyro.get_param_store().get_state())
    values: dict[str, Tensor] = field(default_factory=dict)  # of the parameters, unconstrained
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    validate: bool = field(default_factory=is_validation_enabled)

    def __post_init__(self) -> None:
        """Keep the values of the parameters."""
        self._keep_values()

    def _keep_values(self) -> None:
        """Keep the values of parameters that programs have made since, too."""
        for name, param in self.params["params"].items():
            if name not in self.values:
                self.values[name] = param.detach().clone()

    def __getstate__(self) -> dict[str, object]:
        """Leave out parameters whose values are kept: they are made anew."""
        return {**vars(self), "params": {**self.params, "params": self.values}, "values": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the kept values for parameters."""
        vars(self).update(state)
        params = {
            name: value.clone().requires_grad_(value.is_floating_point())
            for name, value in self.params["params"].items()
        }
        vars(self).update(vars(replace(self, params={**self.params, "params": params})))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Restore that state, without gradients or outer handlers; leave no trace in this one."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with (
                isolated(),
                torch.no_grad(),
                pyro.validation_enabled(self.validate),
                self._valued(),
                pyro.get_param_store().scope(self.params),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)

    @contextmanager
    def _valued(self) -> Iterator[None]:
        """Give the parameters the values that they had, for a time."""
        changed: list[tuple[Tensor, Tensor]] = []
        for name, param in self.params["params"].items():
            if param.shape == self.values[name].shape and not _same(param, self.values[name]):
                changed.append((param, param.detach().clone()))
                param.data.copy_(self.values[name])
        try:
            yield
        finally:
            for param, value in changed:
                param.data.copy_(value)
            self._keep_values()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, nan among them."""
    one = one.detach()
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, those of GPUs too, and restore their states afterwards."""
    state = pyro.util.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
