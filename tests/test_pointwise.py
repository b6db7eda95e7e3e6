# SPDX-License-Identifier: Apache-2.0
"""Log likelihoods of observations whose latents are summed out: against the sum in plain loops."""

import itertools
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import InferDict
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.results.at_draws import replay_draws
from pyro_mpis.results.pointwise import own_latents

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([-1.0, 0.3, 2.0]).double()
TABLE = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]
SUMMED: InferDict = {"enumerate": "parallel"}


def log_likelihoods(
    model: Callable[[], None], number: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return draws, and log likelihoods at them."""
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=6).run()
    draws, replicate = posterior.sample(number), posterior._sums[0].replicate
    with replicate.environment.entered():
        replayed = replay_draws(
            replicate.structure,
            replicate.programs,
            draws,
            number,
            likelihood=True,
            own=own_latents(replicate),
        )
    return draws, dict(replayed.log_likelihoods)


def two_steps() -> None:
    """Two latents of each observation, the second of which reads the first."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    with pyro.plate("i", 3):
        a = pyro.sample("a", dist.Bernoulli(rate), infer=SUMMED)
        b = pyro.sample(
            "b",
            dist.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[a.long()]),
            infer=SUMMED,
        )
        pyro.sample("y", dist.Normal(mu + a - b, 0.7), obs=Y)


def test_sum_over_two_latents_of_an_observation() -> None:
    draws, found = log_likelihoods(two_steps, 4)
    for s, i in itertools.product(range(4), range(3)):
        total = 0.0
        for a, b in itertools.product(range(2), range(3)):
            rate = float(draws["rate"][s])
            prior = (rate if a else 1 - rate) * TABLE[a][b]
            mean = float(draws["mu"][s]) + a - b
            total += prior * math.exp(float(dist.Normal(mean, 0.7).log_prob(Y[i])))
        assert math.isclose(float(found["y"][s, i]), math.log(total), rel_tol=1e-9)


def test_shared_latents_are_given_by_their_draws() -> None:
    """Of a chain, of a latent outside of the plate, and of one that two observed sites read."""

    def model() -> None:
        regime = pyro.sample("regime", dist.Bernoulli(0.5), infer=SUMMED)
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
            pyro.sample("x", dist.Normal(z + regime, 1.0), obs=Y)
        state = torch.zeros(())
        for t in range(2):
            state = pyro.sample(f"state_{t}", dist.Bernoulli(0.2 + 0.5 * state), infer=SUMMED)
            pyro.sample(f"seen_{t}", dist.Normal(state, 1.0), obs=Y[t])

    draws, found = log_likelihoods(model, 5)
    torch.testing.assert_close(found["y"], dist.Normal(draws["z"], 1.0).log_prob(Y))
    both = draws["z"] + draws["regime"].reshape(5, 1)
    torch.testing.assert_close(found["x"], dist.Normal(both, 1.0).log_prob(Y))
    expected = dist.Normal(draws["state_0"], 1.0).log_prob(Y[0])
    torch.testing.assert_close(found["seen_0"], expected)
    # the last state is read by its own observation alone
    last = torch.stack(
        [
            dist.Bernoulli(0.2 + 0.5 * draws["state_0"]).log_prob(torch.tensor(float(k)))
            + dist.Normal(float(k), 1.0).log_prob(Y[1])
            for k in range(2)
        ]
    )
    torch.testing.assert_close(found["seen_1"], last.logsumexp(0))


def test_waic_of_a_mixture_is_that_of_its_sum() -> None:
    """The same mixture, written with indicators and without, at the same draws."""

    def indicators() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            pyro.sample("y", dist.Normal(mu + 4 * z, 1.0), obs=Y)

    pyro.set_rng_seed(0)
    posterior = MPImportance(indicators, num_samples=50).run()
    draws = posterior._known_draws()
    assert draws is not None
    mu = draws.values["mu"].unsqueeze(-1)
    parts = [
        math.log(p) + dist.Normal(mu + 4 * k, 1.0).log_prob(Y) for k, p in enumerate((0.7, 0.3))
    ]
    each = torch.stack(parts).logsumexp(0)
    penalty = each.var(0).sum()
    expected = -2 * ((each.logsumexp(0) - math.log(50)).sum() - penalty)
    found = posterior.information_criterion()
    torch.testing.assert_close(found["waic"], expected)
    torch.testing.assert_close(found["p_waic"], penalty)
