# SPDX-License-Identifier: Apache-2.0
"""An AutoDiagonalNormal, drawn site by site, is the same distribution."""

import warnings
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.optim import ClippedAdam

from pyro_mpis import MPImportance, MPISWarning, TraceMP_ELBO
from pyro_mpis.programs.by_site import by_site

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.0, 1.2]])
SITES = {"mu", "weights", "tau", "theta", "corners"}


def model() -> None:
    """Supports of several kinds, some with other shapes when unconstrained; nested plates."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    groups, elements = pyro.plate("groups", 2, dim=-2), pyro.plate("elements", 3, dim=-1)
    with groups:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with elements:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 0.5 + weights[0]), obs=Y)
    with elements:
        pyro.sample("corners", dist.Beta(torch.ones(3), 2.0).expand((1, 3, 3)).to_event(1))


def trained() -> AutoDiagonalNormal:
    pyro.set_rng_seed(0)
    guide = AutoDiagonalNormal(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05}), Trace_ELBO())
    for _ in range(30):
        svi.step()
    return guide


def test_it_is_the_same_density() -> None:
    guide = trained()
    assert guide.prototype_trace is not None
    found: dict[str, Any] = poutine.trace(by_site(guide)).get_trace().nodes
    assert set(found) >= SITES
    unconstrained = [
        found[f"{name}_unconstrained"]["value"].reshape(-1)
        for name, _ in guide.prototype_trace.iter_stochastic_nodes()
    ]
    latent = {"_AutoDiagonalNormal_latent": torch.cat(unconstrained)}
    expected: dict[str, Any] = poutine.trace(poutine.condition(guide, latent)).get_trace().nodes
    total = {}
    for number, nodes in enumerate((found, expected)):
        sites = [site for site in nodes.values() if hasattr(site.get("fn"), "log_prob")]
        total[number] = sum(site["fn"].log_prob(site["value"]).sum() for site in sites)
    torch.testing.assert_close(total[0], total[1])
    for name in SITES:
        assert torch.equal(found[name]["value"], expected[name]["value"])
        assert found[name]["fn"].batch_shape == expected[name]["fn"].batch_shape


def test_it_runs_as_an_autonormal_with_the_same_parameters() -> None:
    """Each site has an index of its own, at each element of its plates; no vector is spoken of."""
    start = partial(init_to_value, values=trained().median())
    pyro.clear_param_store()
    posteriors = []
    for kind in (AutoDiagonalNormal, AutoNormal):
        guide = kind(model, init_loc_fn=start, init_scale=0.3)
        guide()  # makes it ready, which draws
        pyro.set_rng_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", MPISWarning)
            posteriors.append(MPImportance(model, guide, num_samples=4).run())
    ours, other = posteriors
    torch.testing.assert_close(ours.evidence(), other.evidence())
    torch.testing.assert_close(ours.moments(), other.moments())


def test_parameters_are_those_of_the_store_and_stay_there() -> None:
    guide = trained()
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    MPImportance(model, guide, num_samples=3).run()
    after = dict(pyro.get_param_store().items())
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value)
    svi = SVI(model, by_site(guide), ClippedAdam({"lr": 0.05}), TraceMP_ELBO(num_samples=3))
    svi.step()
    assert not torch.equal(guide.loc, before["AutoDiagonalNormal.loc"])


def test_a_guide_that_has_not_run_is_made_ready() -> None:
    guide = AutoDiagonalNormal(model)
    pyro.set_rng_seed(0)
    MPImportance(model, guide, num_samples=3).run()
    assert set(guide()) == SITES


def test_guides_with_covariances_stay_as_they_are() -> None:
    guide = AutoMultivariateNormal(model)
    assert by_site(guide) is guide
