# SPDX-License-Identifier: Apache-2.0
"""What does not fit into memory: refused from sizes alone, before anything is allocated."""

import pyro
import pyro.distributions as dist
import torch
from failing import fails


def test_a_factor_of_many_latents_names_some() -> None:
    def model() -> None:
        total = sum(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)) for i in range(20))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    fails(MemoryError, r"(z_\d+: 50, ){6}and 14 more: .*split the site", model, K=50)


def test_too_much_memory() -> None:
    """Refused from the sizes alone: nothing large is allocated."""

    def model() -> None:
        total = torch.tensor(0.0)
        for name in "abcdefgh":
            total = total + pyro.sample(name, dist.Normal(0.0, 1.0))
        with pyro.plate("p", 2):
            pyro.sample("y", dist.Normal(total, 1.0), obs=torch.zeros(2))

    fails(
        MemoryError,
        r"site 'y': its log_prob has one element for each.*a: 100.*p: 2.*groups",
        model,
        K=100,
    )


def test_more_latents_in_a_factor_than_a_tensor_has_dims() -> None:
    def model() -> None:
        total = torch.tensor(0.0)
        for i in range(70):
            total = total + pyro.sample(f"a_{i}", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    fails(MemoryError, r"site 'y': its log_prob has.*and 64 more.*groups", model)
