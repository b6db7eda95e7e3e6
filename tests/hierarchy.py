# SPDX-License-Identifier: Apache-2.0
"""A model with a site of every kind, whose posterior is asked for everything."""

import pyro
import pyro.distributions as dist
import torch

from pyro_mpis import MPImportance

Y = torch.tensor([[0.3, -0.5, 1.2], [0.8, 0.1, -0.2]], dtype=torch.float64)


def hierarchy() -> None:
    """A global, a discrete one, a vector in the outer plate, a scalar in the inner one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("outer", 2, dim=-2):
        v = pyro.sample("v", dist.Normal(mu.unsqueeze(-1), torch.ones(4)).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            x = pyro.sample("x", dist.Normal(v.sum(-1) + kind, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


def run_hierarchy() -> MPImportance:
    """Return its posterior with 8 particles: 512 combinations of three sites that read another."""
    pyro.set_rng_seed(0)
    return MPImportance(hierarchy, num_samples=8).run()
