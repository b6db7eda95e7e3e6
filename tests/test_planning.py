# SPDX-License-Identifier: Apache-2.0
"""From programs and options to a plan: what is refused there, and what the user is told."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from failing import chain, fails

from pyro_mpis import MPImportance, MPISWarning


def test_duplicate_names() -> None:
    def model() -> None:
        for _ in range(2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    fails(ValueError, r"Multiple sample sites named 'a'.*name of its own", model)


def test_max_plate_nesting_too_small() -> None:
    def model() -> None:
        with pyro.plate("p", 2, dim=-2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"max_plate_nesting=1, but plates reach dim -2"):
        MPImportance(model, num_samples=2, max_plate_nesting=1).run()
    posterior = MPImportance(model, num_samples=2, max_plate_nesting=3).run()
    assert posterior.moments()["a"].shape == (2, 1)


def test_shared_plate_that_no_program_has() -> None:
    def model() -> None:
        with pyro.plate("p", 2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    message = r"shared_plates: the programs have no plate 'q'.*plates are 'p'"
    with pytest.raises(ValueError, match=message):
        MPImportance(model, num_samples=2, shared_plates=["q"]).run()
    with pytest.raises(ValueError, match="shared_plates: the programs have no plate 'p'"):
        MPImportance(chain, num_samples=2, shared_plates=["p"]).run()


def test_undeclared_dims_of_a_latent_are_told() -> None:
    """One particle index for all of them: the exact sum says nothing of each element."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(a.sum(), 1.0), obs=torch.tensor(0.0))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=r"dims that no pyro\.plate declares \('a' \(3,\)\)"):
        posterior = MPImportance(model, num_samples=4).run()
    a = posterior.marginals("a").samples
    log_prob = dist.Normal(a.sum(-1), 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(posterior.evidence(), log_prob.exp().mean().log())
