# SPDX-License-Identifier: Apache-2.0
"""Masks of latents that differ from step to step: each step's own count."""

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives import gradients, param
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_mpis import TraceMP_ELBO

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor(
    [[0.3, -1.2, 2.1], [1.0, 0.4, -0.7], [0.1, 0.2, 0.9], [-2.0, 1.1, 0.6]], dtype=torch.float64
)
SHORT = torch.tensor([1, 2, 1, 2])
LONG = torch.tensor([3, 1, 2, 3])


def valid(lengths: Tensor) -> Any:
    """Return which steps of each sequence are none of its padding."""
    return torch.arange(3) < lengths.unsqueeze(-1)


def model(lengths: Tensor) -> None:
    """Sequences of several lengths, padded to three steps: nothing reads the padding."""
    mu = pyro.sample("mu", dist.Normal(param("prior", 0.2), 1.5))
    with pyro.plate("sequence", len(Y), dim=-2), pyro.plate("step", 3):
        with poutine.mask(mask=valid(lengths)):
            x = pyro.sample("x", dist.Normal(mu, 0.8))
            pyro.sample("y", dist.Normal(x, 0.7), obs=Y)


def guide(lengths: Tensor) -> None:
    pyro.sample("mu", dist.Normal(param("a", 0.4), param("b", 1.2, positive=True)))
    with pyro.plate("sequence", len(Y), dim=-2), pyro.plate("step", 3):
        with poutine.mask(mask=valid(lengths)):
            pyro.sample("x", dist.Normal(param("c", 0.3), param("d", 1.1, positive=True)))


def test_lengths_of_each_step_count() -> None:
    """A step's padding is its own, not that of the data that the programs were analysed with."""
    loss = TraceMP_ELBO(num_samples=1)
    for lengths in (SHORT, LONG, SHORT):
        value, derivatives = gradients(loss, model, guide, lengths)
        theirs, expected = gradients(Trace_ELBO(), model, guide, lengths)
        assert value == pytest.approx(theirs, rel=1e-9)
        for name, derivative in derivatives.items():
            torch.testing.assert_close(derivative, expected[name])


def one_sequence(lengths: Tensor) -> None:
    """A minibatch of one sequence; states are summed."""
    high = param("high", 1.3)
    with pyro.plate("sequence", len(Y), subsample_size=1, dim=-2) as ind, pyro.plate("step", 3):
        with poutine.mask(mask=valid(lengths[ind])):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(high * z, 0.7), obs=Y[ind])


def test_lengths_of_each_minibatch_count() -> None:
    """Where states are summed, the loss of a minibatch is exact: that of one of the sequences."""
    expected = []
    for y, length in zip(Y, LONG.tolist(), strict=True):
        states = [0.7, 0.0], [0.3, 1.3]
        steps = [
            sum(p * dist.Normal(mean, 0.7).log_prob(value).exp() for p, mean in states)
            for value in itertools.islice(y, length)
        ]
        expected.append(-len(Y) * float(torch.stack(steps).log().sum()))
    loss = TraceMP_ELBO(num_samples=2)
    pyro.set_rng_seed(0)
    found = [loss.loss(one_sequence, no_guide, LONG) for _ in range(20)]
    nearest = [min(expected, key=lambda value: abs(value - one)) for one in found]
    assert found == pytest.approx(nearest, rel=1e-9)
    assert {*nearest} == {*expected}  # all sequences have been met


def no_guide(_: Tensor) -> None:
    """Sample nothing: there is no latent but those that are summed."""
