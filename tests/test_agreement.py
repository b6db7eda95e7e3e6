# SPDX-License-Identifier: Apache-2.0
"""Guides that do not fit their models, and minibatches: refused by name."""

import pyro
import pyro.distributions as dist
import torch
from failing import chain, fails

from pyro_mpis import MPImportance


def test_guide_site_that_the_model_lacks() -> None:
    def guide() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    fails(
        ValueError, r"site 'extra': in the guide, but not in the model.*is_auxiliary", chain, guide
    )


def test_guide_site_that_the_model_observes() -> None:
    def guide() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0))

    fails(ValueError, r"site 'y': observed in the model, but sampled in the guide", chain, guide)


def test_guide_of_another_support() -> None:
    def model() -> None:
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, s), obs=torch.tensor(1.0))

    def real() -> None:
        pyro.sample("s", dist.Normal(0.0, 1.0))

    def narrow() -> None:
        pyro.sample("s", dist.Uniform(0.0, 2.0))

    def positive() -> None:
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    fails(ValueError, r"site 's': the guide's Normal has support.*Gamma.*biject_to", model, real)
    fails(ValueError, r"site 's': the guide's Uniform has support \[0, 2\]", model, narrow)
    assert bool(MPImportance(model, positive, num_samples=3).run().evidence().isfinite())


def test_guide_of_another_shape() -> None:
    def model() -> None:
        with pyro.plate("p", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fails(
        ValueError,
        r"site 'a': the guide's value has shape \(2,\), the model's \(3,\)",
        model,
        guide,
    )


def test_subsampled_plate() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(5))

    def sequential() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 10, subsample_size=5):
            pyro.sample(f"y_{i}", dist.Normal(a, 1.0), obs=torch.tensor(0.0))

    fails(ValueError, r"plate 'data': a subsample of 5 of 10", model)
    fails(ValueError, r"plate 'data': a subsample of 5 of 10", sequential)
