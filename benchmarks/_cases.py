# SPDX-License-Identifier: Apache-2.0
"""The models that are measured, with guides, data and the true log evidence."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from paper import published
from torch import Tensor

# Log evidence of the published arrays, by importance sampling from fits to long runs of NUTS;
# standard errors 0.07, 0.008, 0.008, 0.02.
TRUTHS = {
    "bus_breakdown": -1446.18,
    "chimpanzees": -245.117,
    "movielens": -936.101,
    "occupancy": -49412.61,
}
HAS_DATA = published.data_dir() is not None
Program = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """``model(**data)``, its guide, and the log evidence."""

    model: Program
    guide: Program
    data: Mapping[str, Tensor]
    truth: float
    max_plate_nesting: int


def load(name: str, device: str = "cpu") -> Case:
    """
    Return a case by name.

    A paper's model, ``eight_schools``, or ``KIND-SIZE`` where kind is ``chain`` (under
    ``pyro.markov``, without global sites), ``steps`` (a chain without it, with them), ``loop``
    (independent latents), ``plated`` (latents under one plate of ten) or ``hierarchy`` (100
    groups, the size is the number of observations).
    """
    if name in TRUTHS:
        paper = published.load(name)
        case = Case(paper.model, paper.guide, paper.train, TRUTHS[name], paper.max_plate_nesting)
    elif name == "eight_schools":
        case = _eight_schools()
    else:
        kind, size = name.split("-")
        case = _KINDS[kind](int(size))
    data = {key: value.to(device) for key, value in case.data.items()}
    return Case(case.model, case.guide, data, case.truth, case.max_plate_nesting)


def eight_schools_model(sigma: Tensor, y: Tensor) -> None:
    one = y.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, 5 * one))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * one))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _eight_schools() -> Case:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def guide(sigma: Tensor, y: Tensor) -> None:
        one = y.new_ones(())
        pyro.sample("mu", dist.Normal(4 * one, 4 * one))
        pyro.sample("tau", dist.LogNormal(one, one))
        with pyro.plate("school", len(sigma)):
            pyro.sample("theta", dist.Normal(5 * one, 6 * one))

    # the truth by quadrature over tau
    return Case(eight_schools_model, guide, {"sigma": sigma, "y": y}, -31.311347, 1)


def _chain(num_steps: int, *, with_globals: bool = False) -> Case:
    steps = range if with_globals else lambda size: pyro.markov(range(size))

    def model(y: Tensor) -> None:
        one = y.new_ones(())
        drift = bias = 0 * one
        if with_globals:
            drift = pyro.sample("drift", dist.Normal(0 * one, one))
            bias = pyro.sample("bias", dist.Normal(0 * one, one))
        x = 0 * one
        for step in steps(len(y)):
            x = pyro.sample(f"x_{step}", dist.Normal(0.9 * x + 0.1 * drift, 0.5 * one))
            pyro.sample(f"y_{step}", dist.Normal(x + bias, 0.5 * one), obs=y[step])

    def guide(y: Tensor) -> None:
        one = y.new_ones(())
        if with_globals:
            pyro.sample("drift", dist.Normal(0 * one, one))
            pyro.sample("bias", dist.Normal(0 * one, one))
        for step in steps(len(y)):
            pyro.sample(f"x_{step}", dist.Normal(0.8 * y[step], 0.6 * one))

    # y = A e: independent standard normals e of drift, bias, the steps and the observations
    size = num_steps
    rows = torch.zeros(size, 2 + 2 * size, dtype=torch.float64)
    state = torch.zeros(2 + 2 * size, dtype=torch.float64)
    for step in range(size):
        state = 0.9 * state
        state[0] += 0.1 * with_globals
        state[2 + step] = 0.5
        rows[step] = state
        rows[step, 1] = float(with_globals)
        rows[step, 2 + size + step] = 0.5
    y = rows @ torch.randn(rows.shape[1], generator=_generator(), dtype=torch.float64)
    y = y.float()
    joint = torch.distributions.MultivariateNormal(torch.zeros(size).double(), rows @ rows.T)
    return Case(model, guide, {"y": y}, joint.log_prob(y.double()).item(), 0)


def _steps(num_steps: int) -> Case:
    return _chain(num_steps, with_globals=True)


def _loop(num_latents: int, *, plate_size: int | None = None) -> Case:
    y = math.sqrt(2) * torch.randn(num_latents, plate_size or 1, generator=_generator())
    y = y if plate_size else y.squeeze(-1)

    def model(y: Tensor) -> None:
        one = y.new_ones(())

        def sites() -> None:
            for number in range(len(y)):
                x = pyro.sample(f"x_{number}", dist.Normal(0 * one, one))
                pyro.sample(f"y_{number}", dist.Normal(x, one), obs=y[number])

        _in_plate(sites, plate_size)

    def guide(y: Tensor) -> None:
        one = y.new_ones(())

        def sites() -> None:
            for number in range(len(y)):
                pyro.sample(f"x_{number}", dist.Normal(0 * one, one))

        _in_plate(sites, plate_size)

    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(y.double()).sum().item()
    return Case(model, guide, {"y": y}, truth, 1 if plate_size else 0)


def _in_plate(sites: Callable[[], None], size: int | None) -> None:
    if size is None:
        sites()
        return
    with pyro.plate("element", size):
        sites()


def _plated(num_latents: int) -> Case:
    return _loop(num_latents, plate_size=10)


def _hierarchy(num_observations: int, groups: int = 100) -> Case:
    """Means of groups around a common mean; all variances one; a guide near the posterior."""
    size = num_observations // groups
    centres = torch.randn(groups, 1, generator=_generator())
    y = centres + torch.randn(groups, size, generator=_generator())

    def model(y: Tensor) -> None:
        one = y.new_ones(())
        mu = pyro.sample("mu", dist.Normal(0 * one, one))
        with pyro.plate("group", groups, dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, one))
            with pyro.plate("observation", size, dim=-1):
                pyro.sample("y", dist.Normal(theta, one), obs=y)

    def guide(y: Tensor) -> None:
        one = y.new_ones(())
        means = y.mean(-1, keepdim=True)
        pyro.sample("mu", dist.Normal(means.mean(), 0.2 * one))
        with pyro.plate("group", groups, dim=-2):
            pyro.sample("theta", dist.Normal(means, one / math.sqrt(size)))

    means = y.double().mean(-1)
    within = (y.double() - means.unsqueeze(-1)).square().sum()
    covariance = torch.eye(groups).double() * (1 + 1 / size) + 1
    between = torch.distributions.MultivariateNormal(torch.zeros(groups).double(), covariance)
    log_2pi = math.log(2 * math.pi)
    truth = between.log_prob(means) - within / 2
    truth = truth - groups * ((size - 1) * log_2pi + math.log(size)) / 2
    return Case(model, guide, {"y": y}, truth.item(), 2)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_KINDS: dict[str, Callable[[int], Case]] = {
    "chain": _chain,
    "steps": _steps,
    "loop": _loop,
    "plated": _plated,
    "hierarchy": _hierarchy,
}
