# SPDX-License-Identifier: Apache-2.0
"""
Models whose peak memory is measured: ``python peaks.py LIMIT MODEL...``.

Prints by how many bytes a run and its queries exceed what the process takes with two particles.
Each model has a process of its own, forked after the imports.
"""

import math
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mpis import MPImportance

GRID = torch.linspace(0.0, 1.0, 150)
GROUP = torch.arange(60) % 12


def categories() -> None:
    """Few observations of many categories."""
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    x = torch.linspace(-1.0, 1.0, 400)
    with pyro.plate("n", 40):
        logits = (a * x + b * x**2).expand(40, 400)
        pyro.sample("y", dist.Categorical(logits=logits), obs=torch.zeros(40).long())


def process() -> None:
    """A Gaussian process: a covariance for each combination."""
    length, scale, noise = (pyro.sample(n, dist.LogNormal(-1.0, 1.0)) for n in ("l", "s", "n"))
    gram = scale * torch.exp(-((GRID[:, None] - GRID) ** 2) / length)
    gram = gram + (noise + 0.01) * torch.eye(len(GRID))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(GRID)), gram), obs=GRID.sin())


def mixture() -> None:
    """Components of a mixture."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(6)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(6), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("n", 400):
        parts = dist.Normal(loc, scale)
        fn = dist.MixtureSameFamily(dist.Categorical(weights), parts)
        pyro.sample("y", fn, obs=torch.linspace(-3.0, 3.0, 400))


def stable() -> None:
    """A density that is a quadrature."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    stability = pyro.sample("stability", dist.Uniform(1.1, 2.0))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Stable(stability, 0.0, scale, loc), obs=torch.arange(4.0))


def effects() -> None:
    """Effects of a plate that observations read by an index array; five globals."""
    loc = [pyro.sample(f"loc_{i}", dist.Normal(0.0, 1.0)) for i in range(2)]
    spread = [pyro.sample(f"spread_{i}", dist.LogNormal(0.0, 0.5)) for i in range(2)]
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("group", 12):
        u, v = (pyro.sample(f"u_{i}", dist.Normal(loc[i], spread[i])) for i in range(2))
    with pyro.plate("n", 60):
        x = torch.linspace(-1.0, 1.0, 60)
        pyro.sample("y", dist.Normal(u[GROUP] + v[GROUP] * x, noise), obs=x)


def levels() -> None:
    """Latents of a plate, observed in a plate within it."""
    loc, spread = pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0, 1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", 60):
        t = pyro.sample("t", dist.Normal(loc, spread))
        with pyro.plate("m", 20):
            pyro.sample("y", dist.Normal(t, noise), obs=torch.zeros(20, 60))


def change() -> None:
    """A change point: one factor reads all."""
    at = pyro.sample("at", dist.Uniform(0.0, 100.0))
    before, after = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("before", "after"))
    time = torch.arange(100.0)
    with pyro.plate("time", 100):
        loc = torch.where(time < at, before, after)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=(time > 40).float())


def chain() -> None:
    """States of particles, with a global that all transitions read."""
    scale, x = pyro.sample("scale", dist.LogNormal(0.0, 0.5)), torch.tensor(0.0)
    for t in range(12):
        x = pyro.sample(f"x{t}", dist.Normal(x, scale))
        pyro.sample(f"y{t}", dist.Normal(x, 0.5), obs=torch.tensor(math.sin(t)))


def states() -> None:
    """Enumerated states, and globals that each transition or observation reads."""
    stay, high = pyro.sample("stay", dist.Beta(2.0, 2.0)), pyro.sample("high", dist.Normal(0, 1))
    low, z = pyro.sample("low", dist.Normal(0.0, 1.0)), torch.tensor(0.0)
    for t in range(6):
        prob = z * stay + (1 - z) * (1 - stay)
        z = pyro.sample(f"z{t}", dist.Bernoulli(prob), infer={"enumerate": "parallel"})
        with pyro.plate(f"seen{t}", 20):
            loc = torch.where(z == 1, high, low)
            pyro.sample(f"y{t}", dist.Normal(loc, 1.0), obs=torch.zeros(20))


def regression() -> None:
    """Four weights that each observation reads."""
    weights = [pyro.sample(f"w{i}", dist.Normal(0.0, 1.0)) for i in range(4)]
    x = torch.linspace(-1.0, 1.0, 300)
    with pyro.plate("n", 300):
        logits = weights[0] + weights[1] * x + weights[2] * x**2 + weights[3] * x**3
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=(x > 0).float())


def crossing() -> None:
    """Plates that cross."""
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0, 1))
    columns, rows = pyro.plate("columns", 30, dim=-1), pyro.plate("rows", 20, dim=-2)
    with columns:
        u = pyro.sample("u", dist.Normal(loc, 1.0))
    with rows:
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with columns, rows:
        pyro.sample("y", dist.Normal(u + v, scale), obs=torch.zeros(20, 30))


def hidden() -> None:
    """A sum that is written in place, so that a plain run does not see what it read."""
    total: Tensor = torch.zeros(())
    for name in "abc":
        value = pyro.sample(name, dist.Normal(0.0, 1.0))
        total = total + value.detach().clone()
    with pyro.plate("n", 200):
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.zeros(200))


def grouped() -> None:
    """A group whose members read a latent outside of it: all pairs on the plate."""
    loc, spread = pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("s", dist.LogNormal(0, 1))
    with pyro.plate("n", 500):
        t = pyro.sample("t", dist.Normal(loc, spread))
        pyro.sample("y", dist.Normal(t, 1.0), obs=torch.zeros(500))


# with as many particles as take several times the limit and 100 MB if nothing is cut
MODELS: dict[str, tuple[Callable[[], None], int, dict[str, Any]]] = {
    "categories": (categories, 80, {}),
    "process": (process, 12, {}),
    "mixture": (mixture, 32, {}),
    "stable": (stable, 10, {}),
    "effects": (effects, 14, {}),
    "levels": (levels, 50, {}),
    "change": (change, 80, {}),
    "chain": (chain, 90, {}),
    "states": (states, 50, {}),
    "regression": (regression, 20, {}),
    "crossing": (crossing, 30, {}),
    "hidden": (hidden, 80, {}),
    "grouped": (grouped, 300, {"groups": [("s", "t")]}),
}


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(name: str, limit: int) -> None:
    """Run a model and its queries within a limit, and print by how much memory has grown."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    model, num_samples, options = MODELS[name]
    for number, memory_limit in ((2, 2**30), (num_samples, limit)):
        pyro.set_rng_seed(0)
        before = peak()
        sampler = MPImportance(model, num_samples=number, memory_limit=memory_limit, **options)
        posterior = sampler.run()
        posterior.moments()
        posterior.marginals()
        posterior.sample(100)
    print(name, peak() - before, flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            main(name, int(sys.argv[1]))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{name} failed")
