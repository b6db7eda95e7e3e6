# SPDX-License-Identifier: Apache-2.0
"""Programs that run once for each particle: the numbers of ordinary importance sampling."""

import math
import re
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_exact_mean
from coins import Coins, outcomes, throw
from compare import compare, log_joint
from pyro.infer import EmpiricalMarginal, Importance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning
from pyro_mpis.factor_graph.evidence import log_evidence
from pyro_mpis.options import Options
from pyro_mpis.particles.ordinary import run_one_by_one, weighed_together
from pyro_mpis.planning import plan_of, programs_of

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., object]
ONCE_OF = "the programs run once for each particle of"
ONCE = "the programs run once for each particle, as in pyro.infer.Importance"


# Exactly: every outcome of the draws.


def branching(coins: Coins) -> None:
    """Whether the second coin is thrown depends on the first."""
    p = 0.5
    if throw("a", 0.3, coins) > 0:
        p = 0.2 + 0.5 * float(throw("b", 0.6, coins))
    pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor(1.0))


def branching_guide(coins: Coins) -> None:
    if throw("a", 0.5, coins) > 0:
        throw("b", 0.4, coins)


def guide_of_one(coins: Coins) -> None:
    """The other one is thrown by the model."""
    throw("a", 0.5, coins)


def throws(coins: Coins) -> None:
    """Up to three throws until a head; the number of them decides on the data."""
    number = 0
    while number < 3 and throw(f"throw_{number}", 0.4, coins) == 0:
        number += 1
    pyro.sample("y", dist.Bernoulli((1.0 + number) / 5.0), obs=torch.tensor(1.0))


BRANCHING = 0.7 * 0.5 + 0.3 * (0.6 * 0.7 + 0.4 * 0.2)
THROWS = 0.4 * 0.2 + 0.24 * 0.4 + 0.144 * 0.6 + 0.216 * 0.8


@pytest.mark.parametrize(
    ("model", "guide", "truth"),
    [
        (branching, None, BRANCHING),
        (branching, branching_guide, BRANCHING),
        (branching, guide_of_one, BRANCHING),
        (throws, None, THROWS),
    ],
)
def test_expected_evidence_is_exact(
    model: Callable[[Coins], None], guide: Callable[[Coins], None] | None, truth: float
) -> None:
    coins = Coins()
    coins.start([False] * 10)
    programs = programs_of(model, guide, (coins,), {})
    plan, _, _ = plan_of(programs, Options(num_samples=2))

    def evidence() -> float:
        _, _, graph, _ = weighed_together(plan.structure, run_one_by_one(plan.programs, 2))
        return float(log_evidence(graph).exp())

    found = list(outcomes(coins, evidence))
    check_exact_mean(sum(p for p, _ in found), 1.0)
    check_exact_mean(sum(p * evidence for p, evidence in found), truth)


# Against Importance, draw by draw.


def steps(y: float = 0.5) -> None:
    """A walk whose number of steps is random; the last latent is in some runs only."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0)) if a > 0 else a
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(y))


def steps_guide(y: float = 0.5) -> None:
    a = pyro.sample("a", dist.Normal(0.3, 1.2))
    if a > 0:
        pyro.sample("b", dist.Normal(0.5 * a, 1.1))


@pytest.mark.parametrize("guide", [None, steps_guide])
def test_weights_are_those_of_importance(guide: Program | None) -> None:
    plan, _, _ = plan_of(programs_of(steps, guide, (), {}), Options(num_samples=20))
    pyro.set_rng_seed(1)
    _, _, graph, traces = weighed_together(plan.structure, run_one_by_one(plan.programs, 20))
    pyro.set_rng_seed(1)
    importance = Importance(steps, guide, num_samples=20).run()
    for ours, theirs in zip(traces, importance.exec_traces, strict=True):
        assert ours.nodes["a"]["value"] == theirs.nodes["a"]["value"]
        assert ("b" in ours) == ("b" in theirs)
    log_weights = sum(factor.tensor for factor in graph.factors) + math.log(20)
    torch.testing.assert_close(log_weights, torch.stack(importance.log_weights))


def value_in(trace: Trace, name: str) -> Tensor:
    value = trace.nodes[name]["value"]
    assert isinstance(value, Tensor)
    return value


def test_sites_of_some_runs() -> None:
    """Sites that every run has can be asked for; traces have all of them."""
    pyro.set_rng_seed(0)
    message = rf"{ONCE}.*the guide at or after site 'a', .*`if a > 0:`.*torch\.where"
    with pytest.warns(MPISWarning, match=message):
        posterior = MPImportance(steps, steps_guide, num_samples=50).run(y=-0.5)
    assert set(posterior.marginals()) == {"a"}
    traces = posterior.exec_traces
    assert 0 < sum("b" in trace for trace in traces) < 50
    log_weights = []
    for trace in traces:
        values = {name: value_in(trace, name) for name in ("a", "b") if name in trace}
        log_q = log_joint(steps_guide, values)
        log_weights.append(log_joint(steps, values, -0.5) - log_q)
    expected = torch.stack(log_weights)
    torch.testing.assert_close(torch.stack(posterior.log_weights), expected)
    torch.testing.assert_close(posterior.evidence(), expected.logsumexp(0) - math.log(50))
    marginal = posterior.marginals("a")
    a = torch.stack([value_in(trace, "a") for trace in traces])
    assert torch.equal(marginal.samples, a)
    torch.testing.assert_close(marginal.weights, expected.softmax(0))
    empirical = EmpiricalMarginal(posterior, "a")
    torch.testing.assert_close(empirical.mean, posterior.moments()["a"])


def test_sites_that_differ_from_run_to_run() -> None:
    """Also where torch could map each run."""
    runs = iter(range(100))

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{min(next(runs), 1)}", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    message = rf"{ONCE}.*site 'y_0' of the model is met in some runs only.*the same sites in every"
    with pytest.warns(MPISWarning, match=message):
        posterior = MPImportance(model, num_samples=5).run()
    a = posterior.marginals("a").samples
    log_prob = dist.Normal(a, 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(posterior.evidence(), log_prob.exp().mean().log())


def test_one_notice_where_sites_differ() -> None:
    """What was said of sharing indices in the first run does not hold for the others."""

    def model() -> None:
        n = pyro.sample("n", dist.Poisson(12.0))
        rates = [pyro.sample(f"rate_{i}", dist.Gamma(2.0, 1.0)) for i in range(int(n))]
        total = sum(rates, torch.tensor(0.1))
        pyro.sample("y", dist.Poisson(total), obs=torch.tensor(20.0))

    pyro.set_rng_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MPImportance(model, num_samples=60).run()
    assert [ONCE in str(warning.message) for warning in caught] == [True]


# What leaves torch.


def branches(w: Tensor) -> Tensor:
    return torch.tensor(2.0 if w.sum() > 0 else 0.0)


def item_of_sum(w: Tensor) -> Tensor:
    return torch.tensor(1.0 if w.sum().item() > 0 else -1.0)


def of_numpy(w: Tensor) -> Tensor:
    return torch.tensor(float(np.sign(np.asarray(w).sum())))


WHOLE = torch.zeros(4)


def written(w: Tensor) -> Tensor:
    """Into a tensor that the program has not made."""
    WHOLE[:3] = w
    return WHOLE.sum()


def selected(w: Tensor) -> Tensor:
    return w[w > 0].sum()


def looked_up(w: Tensor) -> Tensor:
    numbers = [0.5, 2.0]
    return torch.tensor(numbers[(w.sum() > 0).long()])


def of_other_numbers(w: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(w)).sum() * 0.0


NORM = torch.nn.BatchNorm1d(3)  # in training mode


def normalised(w: Tensor) -> Tensor:
    rows = torch.stack([w, -w, torch.zeros(3)])
    result: Tensor = NORM.to(w.dtype)(rows)
    return result[0].sum()


LEAVES: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    branches: ("if w.sum() > 0", "choose by torch.where"),
    item_of_sum: ("w.sum().item()", "without .item(), and choose by torch.where"),
    of_numpy: ("np.asarray(w)", "torch operations in place of NumPy's"),
    written: ("WHOLE[:3] = w", "a list, and torch.stack it"),
    looked_up: ("numbers[(w.sum() > 0).long()]", "in a tensor, in place of a list"),
    of_other_numbers: ("torch.bernoulli(", "random numbers in sample statements"),
    normalised: ("NORM.to(w.dtype)(rows)", "evaluation mode, by .eval()"),
    selected: ("w[w > 0]", "by a mask, in place of a boolean index"),
}


@pytest.mark.parametrize("function", LEAVES)
def test_values_that_leave_torch(function: Callable[[Tensor], Tensor]) -> None:
    """What is looked at shares an index; the line and what to write in its place are told."""

    def model(both: bool = True) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        x = w * s if both else w
        pyro.sample("y", dist.Normal(function(x), s), obs=torch.tensor(1.5))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=ONCE) as warned:
        posterior = MPImportance(model, num_samples=6).run()
    text = str(warned[0].message)
    line, remedy = LEAVES[function]
    assert "after site 's', in test_ordinary.py:" in text
    assert line in text
    assert remedy in text.partition("To combine particles:")[2]
    assert "please file" not in text.lower()  # torch asks for a report of each of these
    compare(model, num_samples=6, together=[("w", "s")], warning=ONCE)
    assert len(posterior.exec_traces) == 6
    warning = f"{ONCE_OF} 'w': .*{re.escape(line)}"
    compare(model, num_samples=6, args=(False,), warning=warning)


def test_sums_in_place() -> None:
    """Adding to what another site has drawn changes that value, in ordinary runs too."""

    def model() -> None:
        total = pyro.sample("x", dist.Normal(0.0, 1.0))
        total += pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.5))

    with pytest.warns(MPISWarning, match="write a = a . b in place of a .= b"):
        MPImportance(model, num_samples=3).run()


def test_values_that_are_changed_in_place() -> None:
    """As in ordinary runs, what is changed is the site's value itself."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x += 1.0
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.tensor(0.5))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=r"of site 'x' is changed in place.*write x = x \+ 1"):
        posterior = MPImportance(model, num_samples=200).run()
    assert len(posterior.exec_traces) == 200
    values = [torch.as_tensor(trace.nodes["x"]["value"]) for trace in posterior.exec_traces]
    assert 0.7 < float(torch.stack(values).mean()) < 1.3  # changed once each


def test_assertions_that_hold_for_all_particles() -> None:
    """They do not keep latents from indices of their own; branches do, whoever takes them."""

    def model(branch: bool) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        assert not bool(w.isnan().any())
        assert (s > 0).all()
        if branch and (s > 0).all():
            s = s + 0.1
        pyro.sample("y", dist.Normal(w.sum(), s), obs=torch.tensor(2.0))

    compare(model, args=(False,), num_samples=4)
    warning = rf"{ONCE_OF} 's': .*`if branch and \(s > 0\)\.all\(\):`"
    compare(model, args=(True,), num_samples=4, warning=warning)


# Values that are impossible, arguments that are invalid.


def bound() -> None:
    """The data lie outside of a support that depends on a latent."""
    high = pyro.sample("high", dist.Uniform(0.0, 4.0))
    if high > 3.0:
        high = high + 0.5
    pyro.sample("y", dist.Uniform(0.0, high), obs=torch.tensor(1.5))


def positive() -> None:
    """The guide reaches beyond the support; so would arguments that depend on the latent."""
    rate = pyro.sample("rate", dist.Exponential(1.0))
    if rate > 3.0:
        rate = rate + 0.5
    pyro.sample("y", dist.Exponential(rate), obs=torch.tensor(0.5))


def shifted() -> None:
    """An affine transform says of every value that it is inside."""
    affine = dist.transforms.AffineTransform(2.0, 3.0)
    rate = pyro.sample("rate", dist.TransformedDistribution(dist.Exponential(1.0), [affine]))
    if rate > 3.0:
        rate = rate + 0.5
    pyro.sample("y", dist.Normal(rate, 1.0), obs=torch.tensor(2.5))


def differing() -> None:
    """The square root is nan where the factor is zero; both are in some runs only."""
    rate = pyro.sample("rate", dist.Uniform(-1.0, 1.0))
    if rate.abs() > 0.5:
        pyro.factor("positive", torch.where(rate > 0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(rate.sqrt(), 1.0), obs=torch.tensor(0.5))


def normal_rate() -> None:
    pyro.sample("rate", dist.Normal(0.5, 2.0))


def of_bound(high: Tensor) -> Tensor:
    high = torch.where(high > 3.0, high + 0.5, high)
    return torch.where(high >= 1.5, -high.log(), -torch.inf)


def of_positive(rate: Tensor) -> Tensor:
    changed = torch.where(rate > 3.0, rate + 0.5, rate)
    log_joint = -rate + changed.log() - 0.5 * changed
    log_q = dist.Normal(0.5, 2.0).log_prob(rate)
    return torch.where(rate >= 0, log_joint - log_q, -torch.inf)


def of_shifted(rate: Tensor) -> Tensor:
    changed = torch.where(rate > 3.0, rate + 0.5, rate)
    log_joint = -(rate - 2.0) / 3.0 - math.log(3.0)
    log_joint = log_joint + dist.Normal(changed, 1.0).log_prob(torch.tensor(2.5))
    log_q = dist.Normal(0.5, 2.0).log_prob(rate)
    return torch.where(rate >= 2.0, log_joint - log_q, -torch.inf)


def of_differing(rate: Tensor) -> Tensor:
    density = dist.Normal(rate.clamp(min=0.0).sqrt(), 1.0).log_prob(torch.tensor(0.5))
    density = torch.where(rate > 0, density, -torch.inf)
    return torch.where(rate.abs() > 0.5, density, 0.0)


@pytest.mark.parametrize(
    ("model", "guide", "log_weight"),
    [
        (bound, None, of_bound),
        (positive, normal_rate, of_positive),
        (shifted, normal_rate, of_shifted),
        (differing, None, of_differing),
    ],
)
def test_particles_outside_of_a_support_weigh_nothing(
    model: Program, guide: Program | None, log_weight: Callable[[Tensor], Tensor]
) -> None:
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=ONCE):
        posterior = MPImportance(model, guide, num_samples=40).run()
    (marginal,) = posterior.marginals().values()
    expected = log_weight(marginal.samples)
    impossible = expected == -torch.inf
    assert 3 < int(impossible.sum()) < 37
    torch.testing.assert_close(posterior.evidence(), expected.logsumexp(0) - math.log(40))
    torch.testing.assert_close(marginal.weights, expected.softmax(0))
    for trace, weight in zip(posterior.exec_traces, expected, strict=True):
        zero = float(trace.log_prob_sum()) == -math.inf
        assert zero == (weight == -torch.inf)


def test_copies_that_plates_make_are_looked_at_too() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            x = pyro.sample("x", dist.Exponential(1.0))
            if x.sum() > 3.0:
                x = x + 0.5
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.5, 1.0]))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(1.0, 1.5))

    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=ONCE):
        posterior = MPImportance(model, guide, num_samples=40).run()
    x = posterior.marginals("x").samples.T
    changed = torch.where(x.sum(-1, keepdim=True) > 3.0, x + 0.5, x)
    log_weights = dist.Normal(changed, 1.0).log_prob(torch.tensor([0.5, 1.0])) - x
    log_weights = (log_weights - dist.Normal(1.0, 1.5).log_prob(x)).sum(-1)
    log_weights = torch.where((x >= 0).all(-1), log_weights, -torch.inf)
    torch.testing.assert_close(posterior.evidence(), log_weights.logsumexp(0) - math.log(40))


def test_nan_that_nothing_rules_out_is_refused() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        if rate.abs() > 0.5:
            rate = rate * 2
        pyro.sample("y", dist.Bernoulli(rate.clamp(max=0.9)), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match=r"site 'y': log_prob is nan at \d+ of 30 combinations"):
        MPImportance(model, num_samples=30).run()


def test_nan_of_a_guide_names_the_site() -> None:
    def guide() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("rate", dist.Gamma(2.0, -loc if loc > 1.0 else torch.tensor(1.0)))

    pyro.set_rng_seed(0)
    message = r"site 'rate \(proposal\)': log_prob is nan at \d+ of 30"
    with pytest.raises(ValueError, match=message):
        MPImportance(positive, guide, num_samples=30).run()


def test_supports_are_not_looked_at_where_validation_is_off() -> None:
    """All of it, or that of one distribution, in a plate too: its copies are made in the run."""

    def model(validate: bool | None) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0.5:
            x = x + 0.1
        with pyro.plate("data", 2):
            fn = dist.Exponential(x.exp(), validate_args=validate)
            pyro.sample("y", fn, obs=torch.tensor([-0.5, 0.5]))

    for enabled, validate in ((False, None), (True, False)):
        pyro.set_rng_seed(0)
        with pyro.validation_enabled(enabled), pytest.warns(MPISWarning, match=ONCE):
            posterior = MPImportance(model, num_samples=10).run(validate)
        x = posterior.marginals("x").samples
        x = torch.where(x > 0.5, x + 0.1, x)
        torch.testing.assert_close(posterior.evidence(), (2.0 * x).exp().mean().log())
    with pytest.raises(ValueError, match=r"site 'y': no log_prob of a value"):
        MPImportance(model, num_samples=10).run(None)


@pytest.mark.parametrize("matters", [False, True])
def test_random_numbers_that_no_site_draws(matters: bool) -> None:
    """Those that a parameter was made of, once, do not matter; noise in the mean does."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        scale = pyro.param("scale", torch.rand(()) + 0.5)
        noise = torch.randn(()) if matters else 0.0
        pyro.sample("y", dist.Normal(a + b + noise, scale), obs=torch.tensor(0.5))

    pyro.param("scale", torch.tensor(0.8))
    if not matters:
        compare(model, num_samples=3)
        return
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match=rf"{ONCE}.*besides those of their sites, and depend on"):
        posterior = MPImportance(model, num_samples=3).run()
    assert len(posterior.exec_traces) == 3
