# SPDX-License-Identifier: Apache-2.0
"""Guides of normalizing flows, with an inverse and without one, and of other changed variables."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
from compared import compare
from pyro.infer.autoguide import AutoNormalizingFlow

from pyro_mpis import MPImportance, MPISWarning

pytestmark = pytest.mark.usefixtures("float64")

AUXILIARY: Any = {"is_auxiliary": True}
Y = torch.tensor([0.5, -1.0, 1.5], dtype=torch.double)


def of_scale() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, scale), obs=Y)


def exponential(plain: bool) -> None:
    """The scale is one over an auxiliary site that is itself computed from noise."""
    pyro.sample("mu", dist.Normal(0.2, 1.0))
    noise = pyro.sample("noise", dist.Normal(0.1, 0.8), infer=AUXILIARY)
    rate = noise.exp()
    if plain:
        change = -noise + 2 * rate.log()
    else:
        of_rate = dist.Delta(rate, log_density=-noise)
        rate = pyro.sample("rate", of_rate, infer=AUXILIARY)
        change = 2 * rate.log()
    pyro.sample("scale", dist.Delta(1 / rate, log_density=change))


def test_densities_of_all_steps_count() -> None:
    """A change of variables in an auxiliary site is part of the proposal, as in Pyro's ELBOs."""
    compare(of_scale, partial(exponential, True), num_samples=3)
    found = []
    for plain in (True, False):
        pyro.set_rng_seed(0)
        guide = partial(exponential, plain)
        found.append(MPImportance(of_scale, guide, num_samples=3).run().evidence())
    torch.testing.assert_close(found[1], found[0])


def planar_of_affine(dim: int) -> Any:
    return dist.transforms.ComposeTransform([flows.affine_autoregressive(dim), flows.planar(dim)])


ONE_WAY = [flows.planar, flows.radial, flows.block_autoregressive, planar_of_affine]


def of_vectors(rows: int) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(rows, 2), 1.0).to_event(2))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=Y)


def flowing(flow: Any, rows: int) -> None:
    base = dist.Normal(torch.zeros(rows, 2), 0.7)
    pyro.sample("x", dist.TransformedDistribution(base, flow).to_event(1))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("make", ONE_WAY)
def test_flow_without_an_inverse(make: Callable[[int], Any], rows: int) -> None:
    """Particles are weighed by the change of variables, with derivatives of the whole flow."""
    pyro.set_rng_seed(1)
    flow = make(2)
    posterior = MPImportance(
        partial(of_vectors, rows), partial(flowing, flow, rows), num_samples=5
    ).run()
    log_weights = []
    for base in posterior._sums[0].replicate.particles.values["x_base"]:
        jacobians = [torch.autograd.functional.jacobian(flow, row) for row in base]
        log_q = dist.Normal(0.0, 0.7).log_prob(base).sum()
        log_q = log_q - sum(torch.linalg.slogdet(jacobian)[1] for jacobian in jacobians)
        x = flow(base).detach()
        log_p = dist.Normal(0.0, 1.0).log_prob(x).sum()
        log_weights.append(log_p + dist.Normal(x.sum(), 1.0).log_prob(Y).sum() - log_q)
    expected = torch.stack(log_weights)
    torch.testing.assert_close(posterior.evidence(), expected.logsumexp(0) - math.log(5))
    weights = expected.softmax(0)
    values = torch.stack([flow(x) for x in posterior._sums[0].replicate.particles.values["x_base"]])
    torch.testing.assert_close(
        posterior.moments()["x"], torch.einsum("k,kij->ij", weights, values.detach())
    )
    assert posterior.sample(3)["x"].shape == (3, rows, 2)


def test_flow_with_an_inverse_is_drawn_itself() -> None:
    pyro.set_rng_seed(1)
    guide = partial(flowing, flows.affine_autoregressive(2), 2)
    posterior = MPImportance(partial(of_vectors, 2), guide, num_samples=5).run()
    assert set(posterior._sums[0].replicate.particles.values) == {"x"}


def test_autoguide_without_an_inverse() -> None:
    """Its evidence is that of the model: 3,000 particles against another guide's."""
    pyro.set_rng_seed(0)
    found = []
    for make in (flows.planar, flows.affine_autoregressive):
        guide = AutoNormalizingFlow(of_scale, make)
        with pytest.warns(MPISWarning, match="draws 2 sites as one vector"):
            posterior = MPImportance(of_scale, guide, num_samples=3000).run()
        found.append((posterior.evidence(), posterior.get_ESS()))
    error = sum(1 / ess for _, ess in found) ** 0.5  # of the difference, one sd
    assert abs(found[0][0] - found[1][0]) < 5 * error
