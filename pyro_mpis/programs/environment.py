# SPDX-License-Identifier: Apache-2.0
"""The global state that programs run in: parameters, dtype, validation, seeds, handlers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyro
import torch
from pyro.params.param_store import StateDict
from pyro.poutine.util import is_validation_enabled

from pyro_mpis.programs.handlers import isolated


@dataclass(frozen=True)
class Environment:
    """The global state that programs run in, as it is when this is made."""

    params: StateDict = field(default_factory=lambda: pyro.get_param_store().get_state())
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    validate: bool = field(default_factory=is_validation_enabled)

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
                pyro.get_param_store().scope(self.params),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, and restore its state afterwards."""
    state = pyro.util.get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
