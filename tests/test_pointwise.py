# SPDX-License-Identifier: Apache-2.0
"""Log likelihoods of observations whose latents are summed out: against the sum in plain loops."""

import itertools
import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import random_case
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.indexing import Vindex
from pyro.poutine.runtime import InferDict
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.results.at_draws import replay_draws
from pyro_mpis.results.pointwise import Summed, summed_latents

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([-1.0, 0.3, 2.0]).double()
TABLE = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]
SEEDS = [14, 17, 20, 26, 35, 37, 78, 85, 98, 109, 111, 125, 130]  # with latents to sum
SUMMED: InferDict = {"enumerate": "parallel"}


def log_likelihoods(
    model: Callable[[], None], number: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return draws, and log likelihoods at them."""
    pyro.set_rng_seed(0)
    return log_likelihoods_of(MPImportance(model, num_samples=6).run(), number)


def log_likelihoods_of(
    posterior: MPImportance, number: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    draws = posterior.sample(number)
    return draws, log_likelihoods_at(posterior, draws, number)


def log_likelihoods_at(
    posterior: MPImportance, draws: dict[str, Tensor], number: int
) -> dict[str, Tensor]:
    replicate = posterior._sums[0].replicate
    with replicate.environment.entered():
        replayed = replay_draws(
            replicate.structure,
            replicate.programs,
            draws,
            number,
            likelihood=True,
            summed=summed_latents(replicate),
        )
    return dict(replayed.log_likelihoods)


def two_steps() -> None:
    """Two latents of each observation, the second of which reads the first."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    with pyro.plate("i", 3):
        a = pyro.sample("a", dist.Bernoulli(rate), infer=SUMMED)
        b = pyro.sample(
            "b",
            dist.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[a.long()]),
            infer=SUMMED,
        )
        pyro.sample("y", dist.Normal(mu + a - b, 0.7), obs=Y)


def test_sum_over_two_latents_of_an_observation() -> None:
    draws, found = log_likelihoods(two_steps, 4)
    for s, i in itertools.product(range(4), range(3)):
        total = 0.0
        for a, b in itertools.product(range(2), range(3)):
            rate = float(draws["rate"][s])
            prior = (rate if a else 1 - rate) * TABLE[a][b]
            mean = float(draws["mu"][s]) + a - b
            total += prior * math.exp(float(dist.Normal(mean, 0.7).log_prob(Y[i])))
        assert math.isclose(float(found["y"][s, i]), math.log(total), rel_tol=1e-9)


def by_loops(
    model: Callable[[], object],
    draws: dict[str, Tensor],
    supports: dict[str, Tensor],
    number: int,
) -> dict[str, Tensor]:
    """
    Return log p(y | theta) - log p(y without i | theta) for each observation i, at one draw.

    One plain run for each choice of the values of the latents that are summed.

    :param supports: their values, ``(values, *shape)``.
    """
    theta = {name: draw[number] for name, draw in draws.items() if name not in supports}
    cells = [
        (name, cell, len(values))
        for name, values in supports.items()
        for cell in range(draws[name][number].numel())
    ]
    joints: list[Tensor] = []
    each: dict[str, list[Tensor]] = {}
    for choice in itertools.product(*(range(size) for _, _, size in cells)):
        at = {name: torch.empty_like(draws[name][number]) for name in supports}
        for (name, cell, size), k in zip(cells, choice, strict=True):
            at[name].view(-1)[cell] = supports[name].reshape(size, -1)[k, 0]
        trace = poutine.trace(poutine.condition(model, theta | at)).get_trace()
        trace.compute_log_prob()
        densities = {
            name: scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]).clamp(min=-1e5)
            for name, node in trace.nodes.items()
            if "unscaled_log_prob" in node
        }
        joints.append(sum(density.sum() for density in densities.values()))
        for name in trace.observation_nodes:
            each.setdefault(name, []).append(densities[name])
    joint = torch.stack(joints)
    return {
        name: joint.logsumexp(0)
        - (joint.reshape(-1, *(1,) * parts[0].dim()) - torch.stack(parts)).logsumexp(0)
        for name, parts in each.items()
    }


def check_by_loops(model: Callable[[], None], names: set[str], summed: set[str]) -> None:
    """Hold the log likelihoods of all observed sites at four draws against plain loops."""
    supports = {
        name: site["fn"].enumerate_support(expand=False)  # type: ignore[attr-defined]
        for name, site in poutine.trace(model).get_trace().nodes.items()
        if name in summed
    }
    draws, found = log_likelihoods(model, 4)
    assert found.keys() == names
    for number in range(4):
        expected = by_loops(model, draws, supports, number)
        for name in names:
            torch.testing.assert_close(found[name][number], expected[name])


def test_states_of_a_chain() -> None:
    """Each is read by the next one too: given all other observations, not by drawn states."""

    def model() -> None:
        stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 0.5).to_event(1))
        state: int | Tensor = 0
        for t in range(4):
            row = torch.full((3,), 1.0) * (1 - stay) / 2
            probs = torch.where(torch.arange(3) == state, stay, row)
            state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer=SUMMED)
            loc = Vindex(locs)[..., state]
            pyro.sample(f"seen_{t}", dist.Normal(loc, 0.4), obs=torch.tensor(t - 1.0))

    check_by_loops(model, {f"seen_{t}" for t in range(4)}, {f"state_{t}" for t in range(4)})


def test_latents_that_observations_share() -> None:
    """One outside of the plate, one in it that two sites read, a scale, a mask and a factor."""

    seen = poutine.mask(mask=torch.tensor([True, False, True]))  # type: ignore[call-overload]

    def model() -> None:
        regime = pyro.sample("regime", dist.Bernoulli(0.5), infer=SUMMED)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            with seen:
                pyro.sample("y", dist.Normal(mu + z, 1.0), obs=Y)
            with pyro.plate("j", 2), poutine.scale(scale=3.0):
                x = dist.Normal(mu + z + regime, 0.5).expand([2, 3])
                pyro.sample("x", x, obs=torch.stack([Y, Y - 1]))
        pyro.sample("w", dist.Normal(regime, 0.3), obs=torch.tensor(0.9))
        pyro.factor("f", 0.7 * regime * mu)

    draws, found = log_likelihoods(model, 4)
    assert found.keys() == {"y", "x", "w"}
    assert bool(found["y"][:, 1].isnan().all())
    both = torch.tensor([0.0, 1.0])
    for number in range(4):
        expected = by_loops(model, draws, {"regime": both, "z": both}, number)
        torch.testing.assert_close(found["x"][number], expected["x"])
        torch.testing.assert_close(found["w"][number], expected["w"])
        torch.testing.assert_close(found["y"][number, [0, 2]], expected["y"][[0, 2]])


def test_a_mask_of_a_latent_that_is_summed() -> None:
    """The log likelihood is given the drawn value, zero where it hides the observation."""

    y = torch.tensor([0.9, 1.3, 1.2])

    def model() -> None:
        on = pyro.sample("on", dist.Bernoulli(0.6), infer=SUMMED)
        hidden = poutine.mask(mask=on.bool())  # type: ignore[call-overload]
        with pyro.plate("i", 3), hidden:
            pyro.sample("y", dist.Normal(on, 0.4), obs=y)

    draws, found = log_likelihoods(model, 20)
    on = draws["on"].unsqueeze(-1)
    assert 0 < int(on.sum()) < 20
    torch.testing.assert_close(found["y"], on * dist.Normal(1.0, 0.4).log_prob(y))


def summed_of(model: Callable[[], None]) -> Summed | None:
    pyro.set_rng_seed(0)
    return summed_latents(MPImportance(model, num_samples=3).run()._sums[0].replicate)


def test_what_is_not_summed() -> None:
    """Latents that are read by an index array, and data in dims that no plate declares."""

    def by_index() -> None:
        with pyro.plate("group", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
        with pyro.plate("i", 3):
            pyro.sample("y", dist.Normal(z[torch.tensor([0, 1, 1])], 1.0), obs=Y)

    def undeclared() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
        pyro.sample("y", dist.Normal(z, torch.ones(3)), obs=Y)

    def nothing() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))

    assert summed_of(nothing) is None
    assert summed_of(by_index) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        assert summed_of(undeclared) is None


def test_memory_of_a_draw() -> None:
    """Twice the log densities, in float64, and what the sum takes; no multiple of that."""
    summed = summed_of(two_steps)
    assert summed is not None
    numbers = 1 + 1 + 3 * 2 + 3 * 2 * 3 + 3 * 2 * 3  # of mu, rate, a, b and y
    assert 2 * 8 * numbers < summed.bytes < 10 * 2 * 8 * numbers


def test_a_value_that_is_computed_from_what_is_summed() -> None:
    """A Delta follows the latent through the sum, whatever value it was drawn with."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            d = pyro.sample("d", dist.Delta(2.0 * z))
            pyro.sample("y", dist.Normal(mu + d, 1.0), obs=Y)

    draws, found = log_likelihoods(model, 4)
    mu = draws["mu"].unsqueeze(-1)
    parts = [
        math.log(p) + dist.Normal(mu + 2 * k, 1.0).log_prob(Y) for k, p in ((0, 0.7), (1, 0.3))
    ]
    torch.testing.assert_close(found["y"], torch.stack(parts).logsumexp(0))


def test_arguments_that_are_invalid_where_a_latent_is_impossible() -> None:
    y = torch.tensor(0.4)

    def model() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        shares = torch.tensor([0.0, 0.5, 0.5])
        state = pyro.sample("state", dist.Categorical(shares), infer=SUMMED)
        pyro.sample("y", dist.Normal(0.0, (state - 0.5).sqrt(), validate_args=False), obs=y)

    _, found = log_likelihoods(model, 2)
    parts = [dist.Normal(0.0, (k - 0.5) ** 0.5).log_prob(y) for k in (1, 2)]
    expected = torch.stack(parts).logsumexp(0) - math.log(2)
    torch.testing.assert_close(found["y"], expected.expand(found["y"].shape))


def test_a_mask_of_a_latent_that_is_drawn() -> None:
    """Where it hides nothing, the latent is summed; where it hides, the log likelihood is zero."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        seen = poutine.mask(mask=mu > -1)  # type: ignore[call-overload]
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            with seen:
                pyro.sample("y", dist.Normal(mu + z, 1.0), obs=Y)

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=6).run()
    mu = torch.tensor([-2.0, -0.5, 0.5])
    found = log_likelihoods_at(posterior, {**posterior.sample(3), "mu": mu}, 3)
    mu = mu.unsqueeze(-1)
    parts = [math.log(p) + dist.Normal(mu + k, 1.0).log_prob(Y) for k, p in ((0, 0.7), (1, 0.3))]
    torch.testing.assert_close(found["y"], (mu > -1) * torch.stack(parts).logsumexp(0))


def test_two_observations_that_disagree_by_a_hundred_nats() -> None:
    def model() -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.5), infer=SUMMED)
        pyro.sample("near", dist.Normal(14.0 * z, 1.0), obs=torch.tensor(0.0))
        pyro.sample("far", dist.Normal(12.0 * z, 1.0), obs=torch.tensor(12.0))

    check_by_loops(model, {"near", "far"}, {"z"})


def test_a_draw_at_which_an_observation_is_impossible() -> None:
    """Its log likelihood is -inf, and those of other draws are as they were."""
    y = torch.tensor(0.5)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
        pyro.sample("y", dist.Uniform(mu, mu + z + 1, validate_args=False), obs=y)

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=20).run()
    mu = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    found = log_likelihoods_at(posterior, {**posterior.sample(4), "mu": mu}, 4)["y"]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.15, 0.85, 0.0]).log())


def test_impossible_values_of_a_latent() -> None:
    """An observation that is impossible at some values, and another far out in both tails."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        state = pyro.sample("state", dist.Categorical(torch.ones(3) / 3), infer=SUMMED)
        uniform = dist.Uniform(0.0, state + 1.0, validate_args=False)
        pyro.sample("bounded", uniform, obs=torch.tensor(1.5))
        pyro.sample("far", dist.Normal(mu + 9 * state, 0.2), obs=torch.tensor(40.0))

    check_by_loops(model, {"bounded", "far"}, {"state"})


def test_latents_without_others() -> None:
    """All latents are summed: the log likelihoods are the same at all draws."""

    def model() -> None:
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)
            pyro.sample("x", dist.Normal(-z, 1.0), obs=Y)

    check_by_loops(model, {"x", "y"}, {"z"})


@pytest.mark.parametrize("seed", SEEDS)
def test_random_models(seed: int) -> None:
    """All that are summed against plain loops, given draws of all others."""
    case = random_case(seed)
    pyro.set_rng_seed(seed)
    number, groups = case.num_samples, case.groups
    posterior = MPImportance(case.model, case.guide, number, groups=groups).run()
    summed = summed_latents(posterior._sums[0].replicate)
    assert summed is not None
    draws, found = log_likelihoods_of(posterior, 3)
    for number in range(3):
        expected = by_loops(case.model, draws, dict(summed.supports), number)
        for name in summed.observed:
            value = found[name][number]
            torch.testing.assert_close(value, expected[name].reshape(value.shape))


def test_leave_one_out_of_a_chain_is_exact() -> None:
    """The mean inverse likelihood over the posterior: here over a grid of the one other latent."""
    y = torch.tensor([1.2, 0.8, -0.9, 1.1])

    def log_p(without: int | None) -> float:
        mu = torch.linspace(-6, 6, 241)
        total = []
        for states in itertools.product(range(2), repeat=4):
            log_prob = dist.Normal(0.0, 1.0).log_prob(mu) + math.log(0.05 * 0.5)
            for t, state in enumerate(states):
                if t:
                    log_prob = log_prob + math.log(0.9 if state == states[t - 1] else 0.1)
                if t != without:
                    log_prob = log_prob + dist.Normal(mu * (2 * state - 1), 0.3).log_prob(y[t])
            total.append(log_prob)
        return float(torch.stack(total).logsumexp((0, 1)))

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        state: float | Tensor = 0.5
        for t in range(4):
            state = pyro.sample(f"s_{t}", dist.Bernoulli(0.1 + 0.8 * state), infer=SUMMED)
            pyro.sample(f"y_{t}", dist.Normal(mu * (2 * state - 1), 0.3), obs=y[t])

    pyro.set_rng_seed(0)
    posterior = MPImportance(model, num_samples=2000).run()
    draws = posterior._known_draws()
    assert draws is not None
    each = posterior._summed_log_likelihoods(draws)
    log_weights = draws.log_weights.log_softmax(0)
    for t in range(4):
        found = -(log_weights - each[f"y_{t}"]).logsumexp(0)
        assert float(found) == pytest.approx(log_p(None) - log_p(t), abs=0.1)


def test_waic_of_a_mixture_is_that_of_its_sum() -> None:
    """The same mixture, written with indicators and without, at the same draws."""

    def indicators() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("i", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer=SUMMED)
            pyro.sample("y", dist.Normal(mu + 4 * z, 1.0), obs=Y)

    pyro.set_rng_seed(0)
    posterior = MPImportance(indicators, num_samples=50).run()
    draws = posterior._known_draws()
    assert draws is not None
    mu = draws.values["mu"].unsqueeze(-1)
    parts = [
        math.log(p) + dist.Normal(mu + 4 * k, 1.0).log_prob(Y) for k, p in enumerate((0.7, 0.3))
    ]
    each = torch.stack(parts).logsumexp(0)
    penalty = each.var(0).sum()
    expected = -2 * ((each.logsumexp(0) - math.log(50)).sum() - penalty)
    found = posterior.information_criterion()
    torch.testing.assert_close(found["waic"], expected)
    torch.testing.assert_close(found["p_waic"], penalty)
