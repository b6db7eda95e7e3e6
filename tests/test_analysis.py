# SPDX-License-Identifier: Apache-2.0
"""Programs that a plain run shows to be wrong: refused by the name of the site or the plate."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from failing import chain, fails
from pyro import poutine
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning


def test_observation_of_the_wrong_shape() -> None:
    def too_many() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=torch.zeros(4))

    fails(ValueError, r"site 'y': no log_prob of a value of shape \(4,\)", too_many)


def test_observations_without_a_density_and_what_to_do_with_them() -> None:
    """The advice is followed, too."""

    def hidden(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mask = torch.tensor([True, False])
        with pyro.plate("data", 2), poutine.mask(mask=mask):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def coins(y: Tensor) -> None:
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(pyro.sample("p", dist.Beta(1.0, 1.0))), obs=y)

    y = torch.tensor([0.3, math.nan])
    fails(ValueError, r"site 'y'.*nan.*torch.nan_to_num", partial(hidden, y))
    MPImportance(hidden, num_samples=3).run(torch.nan_to_num(y))
    heads = torch.tensor([True, False])
    fails(ValueError, r"site 'y'.*bool: give it as numbers, by \.float", partial(coins, heads))
    MPImportance(coins, num_samples=3).run(heads.float())


def test_observation_that_is_no_tensor() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=0.5)  # type: ignore[arg-type]

    fails(ValueError, r"site 'y': its value is not a tensor, but float\..*as_tensor", model)


def test_plate_of_two_sizes() -> None:
    def model() -> None:
        with pyro.plate("p", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("q", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("p", 2):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    fails(ValueError, r"plate 'p': dim -1 and size 3 at site 'a', but dim -1 and", model, guide)


def test_enumeration_without_support() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0), infer={"enumerate": "parallel"})

    fails(ValueError, r"site 'a': marked infer=.*Normal has no finite support", model)


def test_latent_under_a_mask_that_depends_on_a_latent() -> None:
    """With a guide for it, as in Importance; without one the prior is flat where masked, too."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with poutine.mask(mask=z.bool()):  # type: ignore[call-overload]
            x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.5))

    with pytest.warns(MPISWarning, match=r"latent site 'x' is under a mask computed from 'z'"):
        guided = MPImportance(model, guide, num_samples=20).run()
    z, x = guided.marginals("z").samples, guided.marginals("x").samples
    log_weight = torch.where(z.bool(), dist.Normal(z, 1.0).log_prob(x), 0.0)
    log_weight = log_weight - dist.Normal(0.0, 1.5).log_prob(x)
    log_weight = log_weight + dist.Normal(x, 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(guided.evidence(), log_weight.exp().mean().log())
    with pytest.warns(MPISWarning, match=r"latent site 'x' is under a mask computed from 'z'"):
        posterior = MPImportance(model, num_samples=200).run()
    counts = dist.Normal(1.0, 2**0.5).log_prob(torch.tensor(0.5)).exp()
    assert (
        abs(float(posterior.evidence() - (0.5 * counts + 0.5).log())) < 0.25
    )  # where it counts: 0.87 less


def test_groups_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"groups: the model has no latent site 'c'.*'a', 'b'"):
        MPImportance(chain, num_samples=2, groups=[("a", "c")]).run()
    with pytest.raises(ValueError, match=r"groups: expected sequences of site names"):
        MPImportance(chain, num_samples=2, groups=["ab"]).run()
    with pytest.raises(ValueError, match=r"groups: site 'a' is in .* merge the two groups"):
        MPImportance(chain, num_samples=2, groups=[("a", "b"), ("a",)]).run()


@pytest.mark.parametrize("seed", range(4))
def test_data_outside_of_a_support_that_depends_on_latents(seed: int) -> None:
    """Whatever the first run draws, it is no error: particles are ruled out."""

    def model(outside: bool) -> None:
        high = pyro.sample("high", dist.Uniform(0.0, 3.0))
        pyro.sample("y", dist.Uniform(0.0, high), obs=torch.tensor(2.0))
        pyro.sample("n", dist.Poisson(high), obs=torch.tensor(-1.0 if outside else 1.0))

    pyro.set_rng_seed(seed)
    posterior = MPImportance(partial(model, False), num_samples=50).run()
    marginal = posterior.marginals("high")
    assert bool((marginal.weights[marginal.samples < 2.0] == 0.0).all())
    with pytest.raises(ValueError, match=r"site 'n'"):
        MPImportance(partial(model, True), num_samples=50).run()
