# SPDX-License-Identifier: Apache-2.0
"""Log likelihoods of single observations, against sums over enumerated latents in plain loops."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.stats import waic
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.at_draws import replay_draws
from pyro_mpis.results.pointwise import components

pytestmark = pytest.mark.usefixtures("float64")

PARALLEL = {"enumerate": "parallel"}
Y = torch.tensor([-1.5, 0.3, 1.4])
PAIRS = torch.tensor([[-1.0, 0.5, 2.0], [0.2, -0.4, 1.1]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
HALF = torch.tensor([0.3, 0.7])
TABLE = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


def replayed(
    posterior: MPImportance, num_draws: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return draws, and the log likelihoods at them."""
    replicate = posterior._sums[0].replicate
    draws = posterior.sample(num_draws)
    with replicate.environment.entered():
        found = replay_draws(
            replicate.structure,
            replicate.programs,
            draws,
            num_draws,
            likelihood=True,
            supports=replicate.particles.values,
        )
    return draws, dict(found.log_likelihoods)


def run(model: object) -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=5).run()  # type: ignore[arg-type]


def mixture() -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(HALF), infer=PARALLEL)  # type: ignore[arg-type]
        pyro.sample("y", dist.Normal(loc[z], 0.6), obs=Y)


def test_one_observation_for_each_state() -> None:
    draws, found = replayed(run(mixture))
    for s, loc in enumerate(draws["loc"]):
        for i in range(3):
            terms = [HALF[z].log() + dist.Normal(loc[z], 0.6).log_prob(Y[i]) for z in (0, 1)]
            torch.testing.assert_close(found["y"][s, i], torch.stack(terms).logsumexp(0))


def test_states_far_apart() -> None:
    """Where one state has all of the posterior, the other still has its share of the prior."""

    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(HALF), infer=PARALLEL)  # type: ignore[arg-type]
            pyro.sample("y", dist.Normal(100.0 * z, 0.5), obs=torch.tensor([0.1, 99.7]))

    _, found = replayed(run(model), 1)
    expected = HALF.log() + dist.Normal(0.0, 0.5).log_prob(torch.tensor([0.1, -0.3]))
    torch.testing.assert_close(found["y"][0], expected)


def shared() -> None:
    """Two latents, one of which reads the other; three sites read them, one in a deeper plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2, dim=-2):
        a = pyro.sample("a", dist.Categorical(HALF), infer=PARALLEL)  # type: ignore[arg-type]
        b = pyro.sample("b", dist.Categorical(TABLE[a]), infer=PARALLEL)  # type: ignore[arg-type]
        x = pyro.sample("x", dist.Normal(mu + a, 1.0))
        pyro.sample("w", dist.Normal(b.to(mu.dtype), 1.0), obs=PAIRS[:, :1])
        with pyro.plate("columns", 3, dim=-1), poutine.scale(scale=2.0), poutine.mask(mask=MASK):  # type: ignore[call-overload]
            pyro.sample("y", dist.Normal(x + a - b, 1.0), obs=PAIRS)


def test_several_observations_for_each_state() -> None:
    """Each is given the others: its own term left out of what weighs the states."""
    draws, found = replayed(run(shared))
    for s in range(4):
        mu = draws["mu"][s]
        for i in range(2):
            x = draws["x"][s, i, 0]
            joint, w, y = [], [], []
            for a, b in itertools.product((0, 1), repeat=2):
                own_w = dist.Normal(float(b), 1.0).log_prob(PAIRS[i, 0])
                own_y = dist.Normal(x + a - b, 1.0).log_prob(PAIRS[i])
                prior = HALF[a].log() + TABLE[a, b].log() + dist.Normal(mu + a, 1.0).log_prob(x)
                joint.append(prior + own_w + 2.0 * (own_y * MASK[i]).sum())
                w.append(own_w)
                y.append(own_y)
            total = torch.stack(joint)
            without_w = total - torch.stack(w)
            expected = total.logsumexp(0) - without_w.logsumexp(0)
            torch.testing.assert_close(found["w"][s, i, 0], expected)
            for j in range(3):
                term = torch.stack([row[j] for row in y])
                without = total - 2.0 * term * MASK[i, j]
                expected = (without + term).logsumexp(0) - without.logsumexp(0)
                if bool(MASK[i, j]):
                    torch.testing.assert_close(found["y"][s, i, j], expected)
                else:
                    assert math.isnan(found["y"][s, i, j])


def test_impossible_states() -> None:
    """A state that one observation rules out is possible where that one is left out."""

    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.4), infer=PARALLEL)  # type: ignore[arg-type]
        pyro.sample("bound", dist.Uniform(0.0, 1.0 + z), obs=torch.tensor(1.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.2))

    _, found = replayed(run(model), 1)
    y = torch.stack([dist.Normal(z, 1.0).log_prob(torch.tensor(0.2)) for z in (0.0, 1.0)])
    prior = torch.tensor([0.6, 0.4]).log()
    torch.testing.assert_close(found["y"][0], y[1])
    of_bound = (prior + y)[1] - math.log(2.0) - (prior + y).logsumexp(0)
    torch.testing.assert_close(found["bound"][0], of_bound)


def chain() -> None:
    z: Tensor | int = 0
    for t in range(15):
        z = pyro.sample(f"z{t}", dist.Categorical(TABLE[z]), infer=PARALLEL)  # type: ignore[arg-type]
        pyro.sample(f"y{t}", dist.Normal(z.to(TABLE.dtype), 1.0), obs=torch.tensor(0.5))


def test_states_that_are_too_many_together() -> None:
    posterior = run(chain)
    found, left = components(posterior._sums[0].replicate.structure)
    assert not found
    assert left == [f"y{t}" for t in range(15)]
    pytest.importorskip("xarray", reason="needs pyro-mpis[arviz]")
    with pytest.warns(MPISWarning, match="'y0', .* given drawn values of enumerated latents"):
        posterior.to_arviz(2)


def test_criterion_is_of_the_summed_likelihoods() -> None:
    posterior = run(mixture)
    loc = posterior._known_draws().values["loc"]  # type: ignore[union-attr]
    each = HALF.log() + dist.Normal(loc.unsqueeze(1), 0.6).log_prob(Y.unsqueeze(-1))
    weights = torch.stack(posterior.log_weights)
    expected, effective = waic(each.logsumexp(-1), weights, pointwise=True)
    found = posterior.information_criterion(pointwise=True)
    torch.testing.assert_close(found["waic"], expected)
    torch.testing.assert_close(found["p_waic"], effective)


def test_criterion_of_several_observed_sites() -> None:
    with pytest.raises(ValueError, match="one observed site, but this one has 'w', 'y'"):
        run(shared).information_criterion()
