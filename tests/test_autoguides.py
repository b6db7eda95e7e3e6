# SPDX-License-Identifier: Apache-2.0
"""
Every autoguide, trained, on a hierarchy with a constrained site: between its ELBO and the evidence.

That each is unbiased, whatever its parameters, is tested in test_unbiased.py.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.optim import ClippedAdam

from pyro_mpis import MPImportance, MPISWarning

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SITES = {"mu", "tau", "theta"}

pytestmark = pytest.mark.filterwarnings("ignore:the guide draws 3 sites as one vector")


def model() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(1.5, 0.5))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def quadrature() -> float:
    """Given tau all is Gaussian; one integral is left."""
    nodes = torch.linspace(-6.0, 6.0, 2001, dtype=torch.float64)  # standard normal behind tau
    tau = (1.5 + 0.5 * nodes).exp()
    cov = torch.diag_embed(tau.unsqueeze(-1) ** 2 + SIGMA.double() ** 2) + 25.0
    log_lik = dist.MultivariateNormal(torch.zeros(8).double(), cov).log_prob(Y.double())
    log_prior = dist.Normal(0.0, 1.0).log_prob(nodes) + math.log(12.0 / 2000)
    return float((log_lik + log_prior).logsumexp(0))


def parts() -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(model, expose=["theta"])))
    return guide


GUIDES: dict[str, Callable[[], Callable[..., object]]] = {
    "AutoNormal": partial(AutoNormal, model),
    "AutoDiagonalNormal": partial(AutoDiagonalNormal, model),
    "AutoMultivariateNormal": partial(AutoMultivariateNormal, model),
    "AutoLowRankMultivariateNormal": partial(AutoLowRankMultivariateNormal, model),
    "AutoIAFNormal": partial(AutoIAFNormal, model, hidden_dim=[16]),
    "AutoNormalizingFlow": lambda: AutoNormalizingFlow(
        model, partial(iterated, 2, partial(affine_autoregressive, hidden_dims=[16]))
    ),
    "AutoLaplaceApproximation": partial(AutoLaplaceApproximation, model),
    "AutoGuideList": parts,
    "AutoStructured": lambda: AutoStructured(
        model,
        conditionals=dict.fromkeys(SITES, "normal"),
        dependencies={"theta": {"mu": "linear"}},
    ),
    "AutoGaussian": partial(AutoGaussian, model),  # type: ignore[abstract]
    "AutoNormalMessenger": partial(AutoNormalMessenger, model),
    "AutoHierarchicalNormalMessenger": partial(AutoHierarchicalNormalMessenger, model),
    "AutoRegressiveMessenger": partial(AutoRegressiveMessenger, model),
}


EVERY_DAY = ("AutoNormal", "AutoMultivariateNormal")


@pytest.mark.parametrize(
    "name",
    [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in GUIDES],
)
def test_trained_autoguide(name: str) -> None:
    """
    The mean of log P lies between the guide's ELBO and the log evidence.

    Both by Jensen's inequality, whatever the guide; an error in a Jacobian, a proposal density or a
    plate moves it out by nats. The slack is for the means' own errors, at a fixed seed.
    """
    pyro.set_rng_seed(0)
    guide = GUIDES[name]()
    loss = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro's own, of the training
        svi = SVI(model, guide, ClippedAdam({"lr": 0.03}), Trace_ELBO())
        for _ in range(250):
            svi.step()
        if isinstance(guide, AutoLaplaceApproximation):
            guide = guide.laplace_approximation()
        if name == "AutoStructured":  # takes no vectorised particles with its dependencies
            loss = Trace_ELBO(num_particles=200)
        elbo = -loss.loss(model, guide)
    names = list(pyro.get_param_store().keys())
    posteriors = [MPImportance(model, guide, num_samples=50).run() for _ in range(10)]
    assert list(pyro.get_param_store().keys()) == names
    mean = float(torch.stack([posterior.evidence() for posterior in posteriors]).mean())
    assert elbo - 0.3 < mean < quadrature() + 0.3
    assert set(posteriors[0].moments()) == SITES
    assert posteriors[0].moments()["theta"].shape == (8,)
    assert bool((posteriors[0].marginals("tau").samples > 0).all())
    assert posteriors[0].sample(3)["theta"].shape == (3, 8)


def test_points_are_conditioned_on() -> None:
    """AutoDelta, for all sites and for some: a joint density, with a warning that says so."""
    point = AutoDelta(model)
    with pytest.warns(MPISWarning, match=r"fixes 'mu', 'tau', 'theta' at a point.*not of p\(x\)"):
        posterior = MPImportance(model, point, num_samples=5).run()
    with torch.no_grad():
        values = point()
        trace = poutine.trace(poutine.condition(model, values)).get_trace()
        torch.testing.assert_close(posterior.evidence(), trace.log_prob_sum())
        torch.testing.assert_close(posterior.sample(2)["theta"][0], values["theta"])

    mixed = AutoGuideList(model)
    mixed.append(AutoDelta(poutine.block(model, expose=["mu", "tau"])))
    mixed.append(AutoNormal(poutine.block(model, expose=["theta"]), init_scale=3.0))
    fixed = {name: mixed()[name].detach() for name in ("mu", "tau")}
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match="fixes 'mu', 'tau' at a point"):
        posterior = MPImportance(model, mixed, num_samples=2000).run()
    truth = (
        dist.Normal(0.0, 5.0).log_prob(fixed["mu"])
        + dist.LogNormal(1.5, 0.5).log_prob(fixed["tau"])
        + dist.Normal(fixed["mu"], (fixed["tau"] ** 2 + SIGMA**2).sqrt()).log_prob(Y).sum()
    )
    assert abs(float(posterior.evidence() - truth)) < 0.3
    assert float(posterior.moments()["mu"]) == pytest.approx(float(fixed["mu"]))


def test_laplace_approximation_without_a_curvature_is_a_point() -> None:
    """As AutoDelta is, with a density in unconstrained coordinates; a warning says so."""

    def conjugate() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("observations", 4):
            pyro.sample("y", dist.Normal(mu, scale), obs=torch.ones(4))

    pyro.set_rng_seed(0)
    guide = AutoLaplaceApproximation(conjugate)
    guide()
    with pytest.warns(MPISWarning, match="'mu', 'scale' at a point"):
        posterior = MPImportance(conjugate, guide, num_samples=5).run()
    with torch.no_grad():
        drawn = poutine.trace(guide).get_trace()
        joint = poutine.trace(poutine.replay(conjugate, trace=drawn)).get_trace()
    weight = joint.log_prob_sum() - drawn.log_prob_sum()  # as pyro.infer.Importance weighs it
    torch.testing.assert_close(posterior.evidence(), weight)
    torch.testing.assert_close(posterior.moments()["scale"], drawn.nodes["scale"]["value"])
