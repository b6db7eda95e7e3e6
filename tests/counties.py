# SPDX-License-Identifier: Apache-2.0
"""Hierarchies of counties and houses: latents of one plate, read in another by index."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from compare import compare
from torch import Tensor

COUNTY = torch.tensor([0, 1, 1, 2, 0, 2, 2])  # of each house
STATE = torch.tensor([0, 1, 0])  # of each county
Y = torch.tensor([0.3, -0.5, 1.2, 2.0, -1.0, 0.1, 0.8], dtype=torch.float64)
HIDDEN = torch.tensor([True, False, True, True, True, False, True])
OCCASIONS = Y[:6].reshape(2, 3)


def radon() -> None:
    """Effects of counties, read by the houses."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("house", 7):
        pyro.sample("y", dist.Normal(alpha[..., COUNTY], 1.0), obs=Y)


def closed_form(cov: Tensor) -> float:
    """Log density of Y under a normal with mean zero."""
    return float(dist.MultivariateNormal(torch.zeros(7), cov).log_prob(Y))


def radon_truth() -> float:
    """Of the radon model."""
    same = (COUNTY == COUNTY.unsqueeze(-1)).double()
    return closed_form(1.0 + same + torch.eye(7))


def check_sharing(
    model: Callable[[], None], site: str, plate: str, reason: str, num_samples: int = 3
) -> None:
    """A site shares its particle index in a plate, for a reason that is told."""
    warning = rf"{reason}: '{site}' has one particle index for all of plate '{plate}'"
    compare(model, num_samples=num_samples, shared={site: [plate]}, warning=warning)
