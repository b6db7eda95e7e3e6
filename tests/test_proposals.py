# SPDX-License-Identifier: Apache-2.0
"""The densities that particles were drawn from."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_exact_mean
from coins import Coins, outcomes, throw
from compare import compare
from torch import Tensor

from pyro_mpis import MPImportance, blocks
from pyro_mpis.options import Options
from pyro_mpis.particles import pairs
from pyro_mpis.particles.drawing import draw_particles
from pyro_mpis.particles.proposals import Particles, weigh
from pyro_mpis.planning import Plan, plan_of, programs_of
from pyro_mpis.workers import Workers

pytestmark = pytest.mark.usefixtures("float64")

Program = Callable[..., object]


def plan(model: Program, guide: Program | None = None, *args: object, num_samples: int = 3) -> Plan:
    return plan_of(programs_of(model, guide, args, {}), Options(num_samples=num_samples))[0]


# Exactly: every outcome of the draws.


def coin_model(coins: Coins) -> None:
    a = throw("a", 0.3, coins)
    b = throw("b", 0.2 + 0.5 * a, coins)
    pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * a + 0.5 * b), obs=torch.tensor(1.0))


def coin_guide(coins: Coins) -> None:
    """Written for single values."""
    a = throw("a", 0.6, coins).reshape(())
    throw("b", 0.4 + 0.3 * a, coins)


def guide_of_a(coins: Coins) -> None:
    throw("a", 0.6, coins)


TRUTH = 0.7 * (0.8 * 0.1 + 0.2 * 0.6) + 0.3 * (0.3 * 0.4 + 0.7 * 0.9)


@pytest.mark.parametrize("guide", [None, coin_guide, guide_of_a])
def test_expected_evidence_is_exact(
    guide: Callable[[Coins], None] | None,
) -> None:
    coins = Coins()
    coins.start([False] * 10)
    planned = plan(coin_model, guide, coins, num_samples=2)
    structure, programs = planned.structure, planned.programs

    def evidence() -> float:
        drawn = draw_particles(structure, programs, stratified=True)
        return float(blocks._evaluated(planned, drawn, Workers()).log_evidence.exp())

    found = list(outcomes(coins, evidence))
    assert len(found) == 2**4
    check_exact_mean(sum(p for p, _ in found), 1.0)
    check_exact_mean(sum(p * evidence for p, evidence in found), TRUTH)


def vector_model() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(a.sum(), 1.0))
    pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))


def vector_guide() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.2).to_event(1))
    assert a.shape == (2,)
    pyro.sample("b", dist.Normal(0.5 * a.sum() + a.mean(), 1.2))


# Densities.


def particles_of(
    model: Program, guide: Program | None, num_samples: int = 4
) -> tuple[Plan, Particles]:
    pyro.set_rng_seed(0)
    planned = plan(model, guide, num_samples=num_samples)
    drawn = draw_particles(planned.structure, planned.programs, stratified=True)
    structure, programs = planned.structure, planned.programs
    return planned, weigh(structure, programs, drawn, validate=True, from_factors=False)


def test_mixture_over_the_parents() -> None:
    """(14), written out."""
    planned, particles = particles_of(vector_model, vector_guide)
    a, b = particles.values["a"], particles.values["b"]
    symbol = planned.structure.index_of["b"].symbol
    loc = 0.5 * a.sum(-1) + a.mean(-1)
    log_q = dist.Normal(loc, 1.2).log_prob(b.unsqueeze(-1))  # (k, j)
    expected = log_q.exp().mean(1).log()
    torch.testing.assert_close(particles.log_proposals[symbol], expected)
    root = particles.log_proposals[planned.structure.index_of["a"].symbol]
    torch.testing.assert_close(root, dist.Normal(0.0, 1.2).log_prob(a).sum(-1))


def test_mixture_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many particles, some at a time."""
    _, whole = particles_of(vector_model, vector_guide, 7)
    monkeypatch.setattr(pairs, "MIXTURE_ELEMENTS", 15)
    _, parts = particles_of(vector_model, vector_guide, 7)
    for symbol, log_proposal in whole.log_proposals.items():
        torch.testing.assert_close(parts.log_proposals[symbol], log_proposal)


def test_pairs_of_particles_outside_of_a_support() -> None:
    """A child's particle may be impossible given another parent."""

    def model() -> None:
        first = pyro.sample("first", dist.Binomial(4, torch.tensor(0.6)))
        second = pyro.sample("second", dist.Binomial(4 - first, torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(second, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        first = pyro.sample("first", dist.Binomial(4, torch.tensor(0.5)))
        pyro.sample("second", dist.Binomial(4 - first, torch.tensor(0.4)))

    compare(model, num_samples=5)
    pyro.set_rng_seed(0)
    posterior = MPImportance(model, guide, num_samples=20).run()
    first, second = (posterior.marginals(name).samples for name in ("first", "second"))
    assert bool(first.max() + second.max() > 4), "some pairs are outside"

    def given(number: Tensor, parent: Tensor, probability: float) -> Tensor:
        """Probability of the second count given the first."""
        if number + parent > 4:
            return torch.zeros(())
        log_prob: Tensor = dist.Binomial(4 - parent, torch.tensor(probability)).log_prob(number)
        return log_prob.exp()

    total = torch.zeros(())
    for b in second:
        likelihood = dist.Normal(b, 1.0).log_prob(torch.tensor(0.5)).exp()
        mixture = torch.stack([given(b, a, 0.4) for a in first]).mean()
        for a in first:
            log_ratio = dist.Binomial(4, torch.tensor(0.6)).log_prob(a)
            log_ratio = log_ratio - dist.Binomial(4, torch.tensor(0.5)).log_prob(a)
            total = total + log_ratio.exp() * given(b, a, 0.5) / mixture * likelihood / 400
    torch.testing.assert_close(posterior.evidence(), total.log())


def test_group_with_a_detour() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(c, 1.0), obs=torch.tensor(0.5))

    with pytest.raises(ValueError, match=r"groups: \('a', 'c'\).*given 'b'.*Add 'b' to the group"):
        MPImportance(model, num_samples=3, groups=[("a", "c")]).run()
    compare(model, num_samples=3, groups=[("a", "b", "c")])


def hidden(a: Tensor) -> Tensor:
    """The same value, by a way on which its origin is lost."""
    with torch._C.DisableTorchFunctionSubclass():
        return a + 0.0


def test_group_whose_parent_is_read_out_of_sight() -> None:
    """The mixture over the parent is found from a mapped run, whatever the origin says."""

    def guide(sight: bool) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.8 * (a if sight else hidden(a)), 0.7))
        pyro.sample("c", dist.Normal(b, 0.7))

    def model(sight: bool) -> None:
        sites = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "abc"]
        pyro.sample("y", dist.Normal(sum(sites), 1.0), obs=torch.tensor(2.0))

    for sight in (True, False):
        compare(model, guide, args=(sight,), num_samples=4, groups=[("b", "c")])


class Ramp:
    """A user's distribution, whose density says nothing of its support: nan beyond it."""

    def __init__(self, width: Tensor) -> None:
        self.width = width

    def __call__(self) -> Tensor:
        return self.width * (1.0 - torch.rand(()).sqrt())

    def log_prob(self, value: Tensor) -> Tensor:
        return (2.0 * (self.width - value) / self.width**2).log()


@pytest.mark.parametrize("proposed_by", ["guide", "prior"])
def test_density_of_a_proposal_that_is_nan(proposed_by: str) -> None:
    """The site's own factor says so of a prior, unless another factor rules out what is nan."""

    def ramp() -> Tensor:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        x: Tensor = pyro.sample("x", Ramp(width))  # type: ignore[arg-type]
        return x

    def normal() -> Tensor:
        pyro.sample("width", dist.LogNormal(0.0, 1.0))
        x: Tensor = pyro.sample("x", dist.Normal(0.0, 1.0))
        return x

    def model() -> None:
        x = normal() if proposed_by == "guide" else ramp()
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    pyro.set_rng_seed(0)
    message = {
        "guide": r"site 'x': the density of its proposal is nan for \d+ of 50 particles",
        "prior": r"site 'x': log_prob is nan at \d+ of 2500 combinations",
    }
    with pytest.raises(ValueError, match=message[proposed_by]):
        MPImportance(model, ramp if proposed_by == "guide" else None, num_samples=50).run()
