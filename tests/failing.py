# SPDX-License-Identifier: Apache-2.0
"""What the tests of refusals share: a program that is right, and the check of an error."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

from pyro_mpis import MPImportance

Program = Callable[..., object]


def chain(y: float = 0.5) -> None:
    """Two latents and an observation."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(y))


def fails(
    error: type[Exception],
    match: str,
    model: Program,
    guide: Program | None = None,
    K: int = 3,
    memory_limit: int | None = None,
) -> None:
    """Check the error, and that it leaves the handlers' stack and the param store as they were."""
    pyro.get_param_store().clear()
    pyro.param("kept", torch.tensor(1.0))
    with pytest.raises(error, match=match):
        MPImportance(model, guide, num_samples=K, memory_limit=memory_limit).run()
    assert _PYRO_STACK == []
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.is_grad_enabled()
    assert torch.distributions.Distribution._validate_args
    # and the next run works
    assert bool(MPImportance(chain, num_samples=2).run().evidence().isfinite())
