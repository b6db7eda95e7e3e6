# SPDX-License-Identifier: Apache-2.0
"""Posteriors that several tests of results share."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_mpis import Diagnosis, Marginal, MPImportance

# --- to export to ArviZ, and what stands in an export

SIGMA = torch.tensor([1.0, 2.0, 0.5, 1.5])
Y = torch.tensor([0.3, -1.2, 0.9, 2.5])
MASK = torch.tensor([True, False, True])


def effects(sigma: Tensor, y: Tensor | None = None) -> None:
    """A global, effects in a plate of four."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("group", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fitted(num_samples: int = 50, **options: Any) -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(effects, num_samples=num_samples, **options).run(SIGMA, Y)


def values(data: object, group: str) -> dict[str, Tensor]:
    """Return the variables of a group without the chain's dim."""
    dataset = data[group]  # type: ignore[index]
    arrays = {name: torch.as_tensor(dataset[name].values) for name in dataset.data_vars}
    return {n: a[0] if dataset[n].dims[:1] == ("chain",) else a for n, a in arrays.items()}


def dims(data: object, group: str) -> dict[str, tuple[str, ...]]:
    dataset = data[group]  # type: ignore[index]
    return {str(name): dataset[name].dims for name in dataset.data_vars}


def elaborate(y: Tensor, counts: Tensor) -> None:
    """Scales, masks of data and of a latent, a factor, event dims, plates of size one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    on = pyro.sample("on", dist.Bernoulli(0.99), infer={"enumerate": "parallel"})
    with pyro.plate("row", 3, dim=-2), pyro.plate("only", 1, dim=-1):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(2)).to_event(1))
        pyro.deterministic("norm", v.square().sum(-1).sqrt())
        pyro.deterministic("twice", 2 * v, event_dim=1)
        with poutine.scale(scale=3.0):
            pyro.sample("vector", dist.Normal(v, 1.0).to_event(1), obs=torch.ones(3, 1, 2))
        with poutine.mask(mask=MASK.unsqueeze(-1)):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(v[..., 0], 1.0), obs=y)
        with poutine.mask(mask=on > 0):  # type: ignore[call-overload]
            pyro.sample("count", dist.Poisson(2.0), obs=counts)
    pyro.deterministic("three", torch.arange(3.0))
    pyro.factor("penalty", -mu.square())


def elaborated() -> MPImportance:
    pyro.set_rng_seed(0)
    y, counts = torch.tensor([[0.5], [9.0], [-0.5]]), torch.tensor([[1.0], [0.0], [4.0]])
    return MPImportance(elaborate, num_samples=6).run(y, counts=counts)


# --- to diagnose

Program = Callable[..., object]


def diagnosed(
    model: Program, guide: Program | None = None, K: int = 20, **options: int
) -> Diagnosis:
    pyro.set_rng_seed(0)
    posterior = MPImportance(
        model,
        guide,
        num_samples=K,
        num_replicates=options.get("R", 1),
        stratified=bool(options.get("stratified", True)),
    )
    return posterior.run().diagnose(show=False)


def wide(scale: float = 10.0) -> None:
    """A prior twenty times as wide as the posterior."""
    a = pyro.sample("a", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(a, scale / 20), obs=torch.tensor(0.3))


def weighted(ess: float, number: int) -> Marginal:
    """A site 'a' of evenly spread particles; the first has the weight that the ESS asks for."""
    heaviest = (1 + math.sqrt(1 - number * (1 - (number - 1) / ess))) / number
    weights = torch.full((number,), (1 - heaviest) / (number - 1))
    weights[0] = heaviest
    return Marginal(torch.linspace(-1.0, 1.0, number), weights.log(), {"a": torch.Size()})


# --- to save

OBSERVED = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, -0.2]])
COUNTY = torch.tensor([0, 1, 1])
Options = Mapping[str, Any]


def model(county: Tensor, data: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Three globals, one of them discrete; two levels of plates; one plate read by index."""
    a = pyro.sample("a", dist.Normal(0.0, scale))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    c = pyro.sample(
        "c", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"}
    )
    with pyro.plate("county", 2, dim=-1):
        v = pyro.sample("v", dist.Normal(a, b))
    with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
        pyro.sample("y", dist.Normal(v[..., county] + a * c, b), obs=data["y"])


def guide(county: Tensor, data: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Of some of the sites, with parameters."""
    loc = pyro.param("loc", torch.tensor(0.2))
    spread = pyro.param("spread", torch.tensor(0.8), constraint=constraints.positive)
    a = pyro.sample("a", dist.Normal(loc, spread))
    with pyro.plate("county", 2, dim=-1):
        pyro.sample("v", dist.Normal(a, pyro.param("wide", torch.ones(2))))


CASES: dict[str, Options] = {
    "whole": {},
    "blocks": {"memory_limit": 5_000},
    "replicates": {"num_replicates": 3},
    "group": {"groups": [("a", "b")]},
}


def ran(case: str, guide: Callable[..., object] | None = guide, seed: int = 0) -> MPImportance:
    pyro.set_rng_seed(seed)
    posterior = MPImportance(model, guide, num_samples=6, **CASES[case])
    return posterior.run(COUNTY, {"y": OBSERVED}, scale=1.5)


def assert_same(one: object, other: object) -> None:
    """To the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# --- to take the place of Importance's


def single(y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a, 0.5), obs=torch.tensor(0.8) if y is None else y)
    return 2.0 * a


def chain() -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("y", dist.Normal(b, 0.5), obs=torch.tensor(0.8))
    return torch.stack([a, b], -1)


def plated() -> Tensor:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(4.0))
    return theta
