# SPDX-License-Identifier: Apache-2.0
"""Guides that do not fit their models are refused by name; minibatches are warned of."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from failing import chain, fails
from pyro.poutine.runtime import InferDict

from pyro_mpis import MPImportance, MPISWarning


def test_guide_site_that_the_model_lacks() -> None:
    def guide() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    fails(
        ValueError, r"site 'extra': in the guide, but not in the model.*is_auxiliary", chain, guide
    )


@pytest.mark.parametrize("infer", [{}, {"is_auxiliary": True}])
def test_guide_site_that_the_model_observes(infer: InferDict) -> None:
    def guide() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), infer=infer)

    fails(ValueError, r"site 'y': observed in the model, but sampled in the guide", chain, guide)


def positive() -> None:
    s = pyro.sample("s", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 0.1 + s.abs()), obs=torch.tensor(1.0))


GUIDES: dict[str, dist.TorchDistribution] = {
    "the same support": dist.LogNormal(0.0, 1.0),
    "beyond": dist.Normal(0.5, 1.0),
    "a part": dist.Uniform(0.0, 2.0),
    "above": dist.Pareto(torch.tensor(0.05), torch.tensor(1.0)),
}
REACHES = {
    "a part": r"Uniform reaches \[0, 2\] only",
    "above": r"Pareto reaches \[0.05, inf\] only",
}


def test_guide_of_half_the_line() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z", dist.HalfNormal(1.0))

    with pytest.warns(
        MPISWarning, match=r"HalfNormal reaches \[0, inf\] only, of the.*\[-inf, inf"
    ):
        MPImportance(model, guide, num_samples=5).run()


@pytest.mark.parametrize("name", GUIDES)
def test_guide_of_another_support(name: str) -> None:
    """Beyond the prior's support particles weigh nothing; what is not reached does not count."""

    def guide() -> None:
        pyro.sample("s", GUIDES[name])

    pyro.set_rng_seed(0)
    message = rf"'s': the guide's {REACHES.get(name)}, of the model's \[0, inf\]"
    with pytest.warns(MPISWarning, match=message) if name in REACHES else nullcontext():
        posterior = MPImportance(positive, guide, num_samples=30).run()
    s = posterior.marginals("s").samples
    assert bool((s < 0).any()) == (name == "beyond")
    log_weight = dist.Gamma(2.0, 1.0).log_prob(s.abs()) - GUIDES[name].log_prob(s)
    log_weight = log_weight + dist.Normal(0.0, 0.1 + s.abs()).log_prob(torch.tensor(1.0))
    expected = torch.where(s < 0, 0.0, log_weight.exp()).mean().log()
    torch.testing.assert_close(posterior.evidence(), expected)


def test_guide_of_another_kind_of_values() -> None:
    def guide() -> None:
        pyro.sample("s", dist.Poisson(2.0))

    message = r"site 's': the guide's Poisson has support.*\(integers\).*Gamma.*biject_to"
    fails(ValueError, message, positive, guide)


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

    for program in (model, sequential):  # see test_subsampling
        with pytest.warns(MPISWarning, match=r"plate 'data': a subsample of 5 of 10.*one minib"):
            MPImportance(program, num_samples=2).run()
