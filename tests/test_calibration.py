# SPDX-License-Identifier: Apache-2.0
"""
Simulation-based calibration of ``adapt`` and ``run`` (Talts et al. 2018).

Values and data are drawn from a model. Among draws of the posterior of these data the rank of each
value is then uniform. Every quantity has a chi-square test; together they reject a right program
once in ten thousand.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7_200)]

FALSE_ALARM = 1e-4
SIMULATIONS, DRAWS, BINS = 200, 19, 5  # 20 ranks, four to a bin
REPLICATES = 4
QUANTITIES = {"mu", "tau", "theta", "slope", "spread", "own", "stay"}
Model = Callable[..., None]


def hierarchy(y: Tensor | None = None, noise: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(1.5)))
    with pyro.plate("group", 6):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def noisier(y: Tensor | None = None) -> None:
    """The hierarchy, with data that are noisier than it is told."""
    hierarchy(y, noise=1.0 if y is not None else 2.0)


X = torch.linspace(-1.5, 1.5, 8)


def logistic(y: Tensor | None = None) -> None:
    """A logistic regression with intercepts of groups."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
    spread = pyro.sample("spread", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("group", 5, dim=-2):
        own = pyro.sample("own", dist.Normal(0.0, spread))
        with pyro.plate("row", 8, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=own + slope * X), obs=y)


def hidden_states(y: Tensor | None = None) -> None:
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 0.7).to_event(1))
    z = torch.tensor(0.0)
    for step in range(6):
        z = pyro.sample(f"z{step}", dist.Bernoulli(torch.where(z == 1, stay, 1 - stay)))
        data = None if y is None else y[step]
        pyro.sample(f"y{step}", dist.Normal(torch.where(z == 1, mu[1], mu[0]), 0.5), obs=data)


def ranks(model: Model, simulation: int) -> Tensor:
    """Simulate, infer, and rank every value among draws: ``(quantities,)``."""
    pyro.set_rng_seed(simulation)
    trace = poutine.trace(model).get_trace()
    sites: dict[str, Any] = {name: site["value"] for name, site in trace.iter_stochastic_nodes()}
    data = [value for name, value in sites.items() if name.startswith("y")]
    y = data[0] if len(data) == 1 else torch.stack(data)
    truth = {n: v for n, v in sites.items() if n in QUANTITIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)  # of a proposal that may be poor
        posterior = MPImportance(model, disable_progbar=True).adapt(y)
        posterior.num_replicates = REPLICATES  # few draws need no more
        draws = posterior.run(y).sample(DRAWS)
    below = [(draws[name] < value).sum(0).flatten() for name, value in truth.items()]
    return torch.cat(below)


def p_value(statistic: float) -> float:
    """Return the upper tail of chi-square of four degrees of freedom, which has a closed form."""
    half = torch.tensor(statistic / 2, dtype=torch.double)
    return float((1 + half) * (-half).exp())


@pytest.mark.parametrize(
    ("model", "accepted"),
    [(hierarchy, True), (logistic, True), (hidden_states, True), (noisier, False)],
)
def test_ranks_are_uniform(model: Model, accepted: bool) -> None:
    found = torch.stack([ranks(model, simulation) for simulation in range(SIMULATIONS)])
    bins = found * BINS // (DRAWS + 1)
    counts = torch.nn.functional.one_hot(bins, BINS).sum(0).double()  # (quantities, BINS)
    expected = len(found) / BINS
    statistics = ((counts - expected).square() / expected).sum(-1)
    smallest = min(p_value(float(statistic)) for statistic in statistics)
    assert (smallest > FALSE_ALARM / len(statistics)) == accepted, (counts, smallest)
