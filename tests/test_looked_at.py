# SPDX-License-Identifier: Apache-2.0
"""Latents whose values the programs look at share an index; all others keep their own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_exact_mean
from coins import Coins, outcomes, throw
from compared import compare
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_mpis import MPImportance, MPISWarning, TraceMP_ELBO, blocks
from pyro_mpis.options import Options
from pyro_mpis.particles.ordinary import run_one_by_one, weighed_together
from pyro_mpis.planning import Plan, plan_of, programs_of
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.workers import Workers

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., Any]
ONE = torch.tensor(1.0, dtype=torch.double)


# Exactly: every outcome of the draws.


def one_look_or_two(coins: Coins) -> None:
    """Where the first coin shows a tail, the second is looked at too; the third never is."""
    a, b, c = throw("a", 0.3, coins), throw("b", 0.6, coins), throw("c", 0.5, coins)
    if a > 0:
        p = 0.2 + 0.5 * b + 0.1 * c
    else:
        p = 0.3 + 0.4 * c if b > 0 else 0.9 - 0.8 * c
    pyro.sample("y", dist.Bernoulli(p), obs=ONE)


def rare_site(coins: Coins) -> None:
    """Another latent is met where two coins show tails: then all run one by one."""
    a, b, c = throw("a", 0.7, coins), throw("b", 0.6, coins), throw("c", 0.5, coins)
    p = 0.2 + 0.3 * b + 0.4 * c
    if a == 0 and b == 0:
        p = p * (0.1 + 0.9 * float(throw("d", 0.5, coins)))
    pyro.sample("y", dist.Bernoulli(p), obs=ONE)


def child_alone(coins: Coins) -> None:
    """The coin that is looked at is thrown given another, in the guide."""
    a = throw("a", 0.3, coins)
    b = throw("b", 0.2 + 0.5 * a, coins)
    c = throw("c", 0.5, coins)
    p = 0.3 + 0.5 * c if b > 0 else 0.8 - 0.6 * c
    pyro.sample("y", dist.Bernoulli(p * (0.4 + 0.6 * a)), obs=ONE)


def guide_of_child(coins: Coins) -> None:
    a = throw("a", 0.5, coins)
    throw("b", 0.7 - 0.4 * a, coins)


def truth_of(
    p: Callable[[int, int, int], float], of_a: float, of_b: Callable[[int], float]
) -> float:
    total = 0.0
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                weight = (of_a if a else 1 - of_a) * (of_b(a) if b else 1 - of_b(a)) * 0.5
                total += weight * p(a, b, c)
    return total


LOOKS = truth_of(
    lambda a, b, c: 0.2 + 0.5 * b + 0.1 * c if a else 0.3 + 0.4 * c if b else 0.9 - 0.8 * c,
    0.3,
    lambda a: 0.6,
)
RARE = truth_of(
    lambda a, b, c: (0.2 + 0.3 * b + 0.4 * c) * (1.0 if a or b else 0.55), 0.7, lambda a: 0.6
)
CHILD = truth_of(
    lambda a, b, c: (0.3 + 0.5 * c if b else 0.8 - 0.6 * c) * (0.4 + 0.6 * a),
    0.3,
    lambda a: 0.2 + 0.5 * a,
)


PLANS: list[Plan] = []  # of all expectations so far


def expected(model: Program, guide: Program | None) -> tuple[float, set[int]]:
    """Return the expected evidence of two particles, and the numbers of indices met."""
    coins = Coins()
    coins.start([True] * 10)
    plan, _, _ = plan_of(programs_of(model, guide, (coins,), {}), Options(num_samples=2))
    PLANS.append(plan)
    met = set()

    def evidence() -> float:
        error = NotMappableError("a branch")
        total = blocks._ordinary(patched(plan), error, Workers(show_progress=False))
        met.add(len(total.replicate.structure.indices))
        return float(total.log_evidence.exp())

    found = list(outcomes(coins, evidence))
    check_exact_mean(sum(p for p, _ in found), 1.0)
    return sum(p * evidence for p, evidence in found), met


def patched(plan: Plan) -> Plan:
    return replace(plan, programs=replace(plan.programs, patched=True))


@pytest.mark.parametrize(
    ("model", "guide", "truth", "indices"),
    [
        (one_look_or_two, None, LOOKS, {2, 3}),
        (rare_site, None, RARE, {1, 2, 3}),
        (child_alone, None, CHILD, {2}),
        (child_alone, guide_of_child, CHILD, {2}),
    ],
)
def test_expected_evidence_is_exact(
    model: Program, guide: Program | None, truth: float, indices: set[int]
) -> None:
    """Though which latents share an index depends on the draws."""
    found, met = expected(model, guide)
    assert met == indices
    check_exact_mean(found, truth)


@pytest.mark.slow
def test_new_draws_would_be_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all run one by one, it is with the particles that showed that they must."""

    def model(coins: Coins) -> None:
        a, b = throw("a", 0.7, coins), throw("b", 0.6, coins)
        p = 0.1 + 0.8 * b
        if a == 0:
            p = p * (0.1 + 0.2 * float(throw("c", 0.5, coins)))
        pyro.sample("y", dist.Bernoulli(p), obs=ONE)

    truth = (0.6 * 0.9 + 0.4 * 0.1) * (0.7 + 0.3 * 0.2)
    found, met = expected(model, None)
    assert met == {1, 2}
    check_exact_mean(found, truth)
    monkeypatch.setattr(
        blocks,
        "weighed_together",
        lambda structure, _: weighed_together(structure, run_one_by_one(PLANS[-1].programs, 2)),
    )
    with pytest.raises(AssertionError):
        check_exact_mean(expected(model, None)[0], truth)


# Against brute force.

Y = torch.tensor([0.3, 1.2], dtype=torch.double)


def simulated(rate: Tensor) -> Tensor:
    """A simulator outside of torch."""
    return torch.tensor(math.exp(-float(rate)))


def simulator() -> None:
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    level = simulated(rate)
    with pyro.plate("people", len(Y)):
        shift = pyro.sample("shift", dist.Normal(level, scale))
        pyro.sample("y", dist.Normal(shift, 0.5), obs=Y)


def switched() -> None:
    """A latent of a plate is looked at, an enumerated one is not."""
    with pyro.plate("two", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
    loc = a[0] if a[0] > a[1] else a[1] - a[0]
    with pyro.plate("data", len(Y)):
        b = pyro.sample("b", dist.Normal(loc, 1.0 + z))
        pyro.sample("y", dist.Normal(b, 0.7), obs=Y)


def counted() -> None:
    """An enumerated latent is looked at: it is sampled then."""
    z = pyro.sample("z", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    total = sum((a[i % 2] for i in range(int(z))), torch.tensor(0.2))
    c = pyro.sample("c", dist.Normal(total, 1.0))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(c, 1.0), obs=Y)


def proposed() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.1, 0.4))
    pyro.sample("rate", dist.LogNormal(0.1 * scale, 0.5))
    with pyro.plate("people", len(Y)):
        pyro.sample("shift", dist.Normal(0.5 * scale, 1.0))


@pytest.mark.parametrize(
    ("model", "guide"),
    [(simulator, None), (simulator, proposed), (switched, None), (counted, None)],
)
def test_against_brute_force(model: Program, guide: Program | None) -> None:
    posterior = compare(model, guide, 3, draws=True)
    assert posterior._sums[0].replicate.programs.one_by_one


def test_carried_latents() -> None:
    """An autoguide computes the latent that is looked at, in the model, from one of its own."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(simulator)
    guide()
    posterior = compare(simulator, guide, 3)
    assert posterior._sums[0].replicate.programs.one_by_one == {"rate_unconstrained"}


def test_blocks() -> None:
    """Particles that are taken one by one may be cut into blocks, as any others."""
    pyro.set_rng_seed(0)
    with pytest.warns(
        MPISWarning, match="once for each particle of 'rate': this takes longer. All"
    ):
        whole = MPImportance(simulator, num_samples=20).run()
    pyro.set_rng_seed(0)
    with pytest.warns(MPISWarning, match="once for each particle of 'rate'"):
        cut = MPImportance(simulator, num_samples=20, memory_limit=60_000).run()
    assert len(cut._sums[0].blocks) > 1
    torch.testing.assert_close(cut.evidence(), whole.evidence())
    torch.testing.assert_close(cut.moments(), whole.moments())
    scale = whole.sample(5)["scale"]
    assert bool(torch.isin(scale, whole.marginals("scale").samples).all())


def test_objectives_refuse() -> None:
    """A value that is looked at has lost its derivative."""
    with pytest.raises(NotImplementedError, match=r"once for each particle of 'rate'.*Or use"):
        TraceMP_ELBO(num_samples=3).loss(simulator, lambda: None)


def test_what_would_take_long_runs_as_in_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each particle of the rate has 3 * 3 combinations of the other two latents."""
    for most, alone in ((10_000, False), (10, True)):
        monkeypatch.setattr(blocks, "MUCH_WORK", most)
        with pytest.warns(MPISWarning, match="in pyro.infer.Importance" if alone else "'rate'"):
            posterior = MPImportance(simulator, num_samples=3).run()
        assert bool(posterior._sums[0].traces) == alone


def test_a_number_that_is_chosen_counts_every_run() -> None:
    """Each of K runs evaluates the densities at all K * K combinations of the others."""
    with pytest.warns(MPISWarning, match="once for each particle of 'rate'"):
        posterior = MPImportance(simulator, time_limit=0.5).run()
    assert posterior.num_samples == 100  # 200, if it were for one of them
