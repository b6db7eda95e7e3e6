# SPDX-License-Identifier: Apache-2.0
"""The global state that programs run in: parameters, dtype, validation, seeds, handlers."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.params.param_store import StateDict
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_mpis.programs.handlers import isolated

PLAIN = (Tensor, torch.nn.Parameter)  # others carry marks of a plain run


def _params() -> StateDict:
    """Return the parameters of the store, in the constraints' unconstrained form."""
    state = pyro.get_param_store().get_state()
    names = [name for name, param in state["params"].items() if type(param) in PLAIN]
    return {
        "params": {name: state["params"][name] for name in names},
        "constraints": {name: state["constraints"][name] for name in names},
    }


def _values() -> dict[str, Tensor]:
    """Copy the values of the parameters, which an optimiser changes in place."""
    return {name: param.detach().clone() for name, param in _params()["params"].items()}


@dataclass(frozen=True)
class Environment:
    """
    The global state that programs run in, as it is when this is made.

    Parameters are kept twice. Programs are given the very objects, since modules hold these too;
    while programs run, the objects have the values that they had when this was made.
    """

    params: StateDict = field(default_factory=_params)
    values: Mapping[str, Tensor] = field(default_factory=_values)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    validate: bool = field(default_factory=is_validation_enabled)
    validate_args: bool = field(default_factory=dist.is_validation_enabled)  # of distributions

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Restore that state, without gradients, autocast or outer handlers; leave no trace."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with (
                isolated(),
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
                pyro.validation_enabled(self.validate),
                pyro.get_param_store().scope(copy.copy(self.params)),
                self._valued(),
            ):
                dist.enable_validation(self.validate_args)
                yield
        finally:
            torch.set_default_dtype(dtype)

    @contextmanager
    def _valued(self) -> Iterator[None]:
        """Give the parameters the values of this state, and afterwards those that they had."""
        params = self.params["params"]
        data = [(params[name], params[name].data) for name in self.values]
        try:
            for name, value in self.values.items():
                params[name].data = value
            yield
        finally:
            for param, now in reversed(data):
                param.data = now

    def with_params(self) -> "Environment":
        """Return this state with the parameters that programs have made since it was entered."""
        return replace(self, params=_params(), values=_values())


def torch_rng_state() -> dict[str, Any]:
    """Return the state of torch's global generators, those of graphics cards in use included."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def rng_state() -> dict[str, Any]:
    """Return the state of all global generators, Python's and NumPy's included."""
    return {**pyro.util.get_rng_state(), **torch_rng_state()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put generators into a state that one of the functions above returned."""
    if "random" in state:
        pyro.util.set_rng_state(dict(state))
    else:
        torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def same_rng_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether no torch generator has drawn between two states."""
    tensors = ([state["torch"], *state.get("cuda", ())] for state in (one, other))
    pairs = zip(*tensors, strict=False)  # a card that was not in use before has no state
    return all(torch.equal(before, now) for before, now in pairs)


@contextmanager
def training() -> Iterator[None]:
    """Run with gradients and the parameters as they are; handlers around see parameters alone."""
    with isolated(params_are_seen=True):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and restore their state afterwards."""
    state = rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
