# SPDX-License-Identifier: Apache-2.0
"""Latents of one plate read in another by index, against closed forms and against brute force."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from counties import COUNTY, STATE, Y, closed_form, radon, radon_truth
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_mpis import MPImportance

pytestmark = pytest.mark.usefixtures("float64")


def test_radon_has_the_weights_of_the_model_written_by_county() -> None:
    """Regrouping equals writing out the houses of each county."""

    def by_county() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
            log_prob = dist.Normal(alpha.unsqueeze(-1), 1.0).log_prob(Y)
            own = COUNTY == torch.arange(3).unsqueeze(-1)
            pyro.factor("y", (log_prob * own).sum(-1))

    results = []
    for model in (radon, by_county):
        pyro.set_rng_seed(0)
        results.append(MPImportance(model, num_samples=20).run())
    one, other = results
    torch.testing.assert_close(one.evidence(), other.evidence())
    for site, mean in one.moments().items():
        torch.testing.assert_close(mean, other.moments()[site])
    torch.testing.assert_close(
        one.marginals("mu", "alpha").log_weights, other.marginals("mu", "alpha").log_weights
    )


def overdispersed() -> None:
    """Houses have an effect of their own besides that of their county."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, 1.0))
    with pyro.plate("house", 7):
        z = pyro.sample("z", dist.Normal(alpha[..., COUNTY], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def three_levels() -> None:
    """Counties read the effect of their state, houses that of their county."""
    with pyro.plate("state", 2):
        gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(gamma[..., STATE], 1.0))
    with pyro.plate("house", 7):
        pyro.sample("y", dist.Normal(alpha[..., COUNTY], 1.0), obs=Y)


def three_levels_read_directly() -> None:
    """Houses read the effects of their county and of the county's state."""
    with pyro.plate("state", 2):
        gamma = pyro.sample("gamma", dist.Normal(0.0, 1.0))
    with pyro.plate("county", 3):
        alpha = pyro.sample("alpha", dist.Normal(gamma[..., STATE], 1.0))
    with pyro.plate("house", 7):
        mean = alpha[..., COUNTY] + gamma[..., STATE[COUNTY]]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def three_levels_truth() -> float:
    """Of the model of three levels."""
    county = (COUNTY == COUNTY.unsqueeze(-1)).double()
    state = (STATE[COUNTY] == STATE[COUNTY].unsqueeze(-1)).double()
    return closed_form(county + state + torch.eye(7))


def three_levels_read_directly_truth() -> float:
    """The state's effect counts twice."""
    county = (COUNTY == COUNTY.unsqueeze(-1)).double()
    state = (STATE[COUNTY] == STATE[COUNTY].unsqueeze(-1)).double()
    return closed_form(county + 4.0 * state + torch.eye(7))


def overdispersed_truth() -> float:
    """Of the model with effects of houses."""
    same = (COUNTY == COUNTY.unsqueeze(-1)).double()
    return closed_form(1.0 + same + 2.0 * torch.eye(7))


@pytest.mark.parametrize(
    ("model", "truth"),
    [
        (radon, radon_truth),
        (overdispersed, overdispersed_truth),
        (three_levels, three_levels_truth),
        (three_levels_read_directly, three_levels_read_directly_truth),
    ],
)
def test_evidence_converges_to_the_closed_form(
    model: Callable[[], None], truth: Callable[[], float]
) -> None:
    """With many particles the evidence is near the truth, which shared particles miss by nats."""
    pyro.set_rng_seed(0)
    estimates = torch.stack(
        [MPImportance(model, num_samples=150).run().evidence() for _ in range(8)]
    )
    ratio = (estimates - truth()).exp()
    error = float(ratio.std() / math.sqrt(len(ratio)))
    assert error < 0.1
    assert abs(float(ratio.mean()) - 1.0) < 6 * error, f"{ratio.mean():.3f} +- {error:.3f}"


@pytest.mark.parametrize("model", [overdispersed, three_levels, three_levels_read_directly])
def test_samples_agree_with_weights_under_ragged_plates(model: Callable[[], None]) -> None:
    """Means of joint draws are the moments, products of two levels included (6 sd, fixed seed)."""
    pyro.set_rng_seed(1)
    posterior = MPImportance(model, num_samples=6).run()
    draws = posterior.sample(20_000)
    for site, mean in posterior.moments().items():
        spread = draws[site].std(0) / math.sqrt(20_000)
        assert bool(((draws[site].mean(0) - mean).abs() <= 6 * spread + 1e-9).all()), site
    outer, inner, at = (
        ("alpha", "z", COUNTY) if model is overdispersed else ("gamma", "alpha", STATE)
    )
    product = draws[outer][:, at] * draws[inner]
    mean = posterior.moments(torch.mul, outer, inner)
    spread = product.std(0) / math.sqrt(20_000)
    assert bool(((product.mean(0) - mean).abs() <= 6 * spread + 1e-9).all())
    joint = posterior.marginals(outer, inner)
    assert joint.batch_shape == inner_shape(posterior, inner)
    torch.testing.assert_close(joint.unpack(joint.mean)[inner], posterior.moments()[inner])
    torch.testing.assert_close(joint.unpack(joint.mean)[outer], posterior.moments()[outer][at])


def inner_shape(posterior: MPImportance, site: str) -> torch.Size:
    """Batch shape of a site."""
    return posterior.marginals(site).batch_shape


def test_index_that_repeats_a_plate_within_another() -> None:
    """The day is a plate of both, the county is read by index within it."""

    def days(index: Tensor | None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("day", 2, dim=-2):
            beta = pyro.sample("beta", dist.Normal(mu, 1.0))
            with pyro.plate("county", 3, dim=-1):
                alpha = pyro.sample("alpha", dist.Normal(beta, 1.0))
            if index is None:
                with pyro.plate("county again", 3, dim=-1):
                    pyro.sample("y", dist.Normal(alpha, 1.0), obs=torch.arange(3.0))
            else:
                with pyro.plate("house", 3, dim=-1):
                    mean = alpha[..., index]
                    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.arange(3.0)[index])

    results = []
    for index in (torch.tensor([2, 0, 1]), torch.arange(3)):
        pyro.set_rng_seed(0)
        results.append(MPImportance(days, num_samples=5).run(index).evidence())
    torch.testing.assert_close(*results)


def test_index_by_a_joint_guide_needs_no_regrouping() -> None:
    """Where the guide draws the counties as one vector, there is one particle index for all."""

    def guide() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("alpha", dist.Normal(torch.zeros(3), 1.5).to_event(1))

    pyro.set_rng_seed(0)
    posterior = MPImportance(radon, guide, num_samples=2000).run()
    assert abs(float(posterior.evidence()) - radon_truth()) < 0.2
    assert posterior.moments()["alpha"].shape == (3,)


def test_no_regrouping_is_wrong() -> None:
    """One particle for all counties: the wrong program that the tests above reject."""
    pyro.set_rng_seed(0)

    def shared() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        alpha = pyro.sample("alpha", dist.Normal(mu.unsqueeze(-1), torch.ones(3)).to_event(1))
        with pyro.plate("house", 7):
            pyro.sample("y", dist.Normal(Vindex(alpha)[..., COUNTY], 1.0), obs=Y)

    right = MPImportance(radon, num_samples=8).run()
    pyro.set_rng_seed(0)
    wrong = MPImportance(shared, num_samples=8).run()
    assert abs(float(right.evidence()) - float(wrong.evidence())) > 0.1


def test_autoguide_of_a_model_read_by_index() -> None:
    """The values of a Delta site are read by index too."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(radon, init_scale=1.0)
    estimates = torch.stack(
        [MPImportance(radon, guide, num_samples=100).run().evidence() for _ in range(8)]
    )
    ratio = (estimates - radon_truth()).exp()
    error = float(ratio.std() / math.sqrt(len(ratio)))
    assert abs(float(ratio.mean()) - 1.0) < 6 * error
    assert error < 0.1


def test_elements_read_at_each_particle_of_a_switch_that_has_few_values() -> None:
    """Ten particles of a coin: which county a house reads is found for each of them."""
    one, other = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 1, 0])
    y = torch.tensor([0.5, -1.0, 2.0, 0.3])

    def model() -> None:
        coin = pyro.sample("coin", dist.Bernoulli(0.4))
        with pyro.plate("county", 3):
            alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
        with pyro.plate("house", 4):
            mean = torch.where(coin > 0.5, alpha[..., other], alpha[..., one])
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=10).run()
    marginals = posterior.marginals()
    coins = marginals["coin"].samples.flatten()
    alphas = marginals["alpha"].samples.reshape(3, 10)
    assert 0 < int(coins.sum()) < 10
    total = torch.zeros(())
    for coin in coins:
        index = other if coin else one
        product = torch.ones(())
        for county in range(3):
            own = dist.Normal(alphas[county][:, None], 1.0).log_prob(y[index == county])
            product = product * own.sum(-1).exp().mean()
        total = total + product / 10
    torch.testing.assert_close(posterior.evidence(), total.log(), rtol=1e-4, atol=1e-4)
