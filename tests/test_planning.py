# SPDX-License-Identifier: Apache-2.0
"""From programs and options to a plan: what is refused there, and what the user is told."""

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from failing import chain, fails
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning


def test_duplicate_names() -> None:
    def model() -> None:
        for _ in range(2):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    fails(ValueError, r"Multiple sample sites named 'a'.*name of its own", model)


def test_program_that_takes_a_derivative() -> None:
    """Programs run without gradients; where one takes a derivative, the message says what to do."""

    def guide(enclosed: bool) -> None:
        with torch.set_grad_enabled(enclosed or torch.is_grad_enabled()):
            x = torch.tensor(0.5, requires_grad=True)
            (slope,) = torch.autograd.grad(x**2, [x])
        pyro.sample("a", dist.Normal(slope, 1.0))

    def model(_: bool) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"does not require grad.*enclose it: with torch.enable"):
        MPImportance(model, guide, num_samples=2).run(False)
    assert MPImportance(model, guide, num_samples=2).run(True).evidence().isfinite()


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


def model_of_two(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    x = pyro.sample("x", dist.Normal(z, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_mark_of_the_model_alone(float64: None) -> None:
    """A site marked in the model is summed over its support, though the guide draws it unmarked."""

    def guide(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.6))
        pyro.sample("x", dist.Normal(0.5 * z, 1.5))

    drawn: Any = {"enumerate": None}

    def sampling_guide(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.6), infer=drawn)
        pyro.sample("x", dist.Normal(0.5 * z, 1.5))

    y = torch.tensor(0.7)
    pyro.set_rng_seed(0)
    posterior = MPImportance(model_of_two, guide, num_samples=3).run(y)
    x = posterior.marginals("x").samples
    z = torch.tensor([[0.0], [1.0]])
    prior = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    densities = []
    for given in itertools.product([0.0, 1.0], repeat=3):
        mixture = dist.Normal(0.5 * torch.tensor(given), 1.5).log_prob(x[:, None]).logsumexp(1)
        weight = prior.logsumexp(0) + dist.Normal(x, 1.0).log_prob(y) - mixture
        densities.append(float(weight.logsumexp(0)))
    evidence = float(posterior.evidence())
    assert min(abs(evidence - density) for density in densities) < 1e-9
    assert posterior.marginals("z").samples.flatten().tolist() == [0.0, 1.0]
    sampled = MPImportance(model_of_two, sampling_guide, num_samples=3).run(y)
    assert len(sampled.marginals("z").samples) == 3, "the guide says that it is to be drawn"


def test_grammar_of_a_notice() -> None:
    """Of two sites that share an index, and of plates in the order of their names."""

    def model() -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("cols", 3):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal((a * b).sum(), 1.0), obs=torch.tensor(0.0))

    message = r"of plates 'cols', 'rows'.*: 'a', 'b' have one particle index for all of plates 'co"
    with pytest.warns(MPISWarning, match=message):
        MPImportance(model, num_samples=3).run()


def test_notices_name_the_models_sites() -> None:
    """The guide draws `x_unconstrained`, of which the user knows nothing."""

    def model() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))

    guide = AutoNormal(model)
    with pytest.warns(MPISWarning, match="'x' has one particle index for all of plate 'rows'"):
        MPImportance(model, guide, num_samples=3).run()
