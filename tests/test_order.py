# SPDX-License-Identifier: Apache-2.0
"""What is multiplied with what, and in how many rounds."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import check_frequencies

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph import order
from pyro_mpis.factor_graph.evidence import LogSpaceRing, log_evidence
from pyro_mpis.factor_graph.order import absorb

pytestmark = pytest.mark.usefixtures("float64")

K = 8


def chain(num_steps: int) -> None:
    x = torch.tensor(0.0)
    for t in range(num_steps):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, 0.5))
        pyro.sample(f"y{t}", dist.Normal(x, 0.5), obs=torch.tensor(math.sin(t)))


def chain_guide(num_steps: int) -> None:
    for t in range(num_steps):
        pyro.sample(f"x{t}", dist.Normal(math.sin(t), 1.0))


def chain_with_globals(num_steps: int) -> None:
    """Transitions and observations read one global each: a state has three terms."""
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    x = torch.tensor(0.0)
    for t in range(num_steps):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x + 0.1 * drift, 0.5))
        pyro.sample(f"y{t}", dist.Normal(x + bias, 0.5), obs=torch.tensor(math.sin(t)))


def test_a_chain_takes_rounds_to_the_logarithm_of_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every launch of a kernel sums all dims of a round; the sums are those along the chain."""
    launches = []
    eliminate_all = LogSpaceRing._eliminate_all

    def counted(self: LogSpaceRing, steps: Any, terms: Any) -> Any:
        launches.append(len(steps))
        return eliminate_all(self, steps, terms)

    monkeypatch.setattr(LogSpaceRing, "_eliminate_all", counted)
    numbers = []
    for num_steps in (32, 256):
        pyro.set_rng_seed(0)
        posterior = MPImportance(chain, chain_guide, num_samples=K).run(num_steps)
        launches.clear()
        found = log_evidence(posterior._sums[0].whole)
        numbers.append(len(launches))

        marginals = posterior.marginals()
        x = [marginals[f"x{t}"].samples for t in range(num_steps)]
        message = torch.zeros(1, dtype=torch.float64)
        previous = torch.zeros(1, dtype=torch.float64)
        for t in range(num_steps):
            step = dist.Normal(0.9 * previous, 0.5).log_prob(x[t].unsqueeze(-1))
            message = (message + step).logsumexp(-1)
            message = message + dist.Normal(x[t], 0.5).log_prob(torch.tensor(math.sin(t)))
            message = message - dist.Normal(math.sin(t), 1.0).log_prob(x[t]) - math.log(K)
            previous = x[t]
        torch.testing.assert_close(found, message.logsumexp(0), rtol=1e-12, atol=1e-9)
    # eight times the steps are three more rounds, of two kinds of steps at most (inside, ends)
    assert numbers[1] - numbers[0] <= 6
    assert numbers[1] < 40


def test_a_chain_with_globals_takes_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the logarithm of its length; evidence, weights and samples are those without."""
    launches = []
    eliminate_all = LogSpaceRing._eliminate_all

    def counted(self: LogSpaceRing, steps: Any, terms: Any) -> Any:
        launches.append(len(steps))
        return eliminate_all(self, steps, terms)

    monkeypatch.setattr(LogSpaceRing, "_eliminate_all", counted)
    numbers = []
    for num_steps in (16, 128):
        pyro.set_rng_seed(0)
        rounds = MPImportance(chain_with_globals, chain_guide, num_samples=4).run(num_steps)
        launches.clear()
        log_evidence(rounds._sums[0].whole)
        numbers.append(len(launches))
        with monkeypatch.context() as patched:
            patched.setattr(order, "ROUND_COMBINATIONS", 0)
            pyro.set_rng_seed(0)
            along = MPImportance(chain_with_globals, chain_guide, num_samples=4).run(num_steps)
            launches.clear()
            log_evidence(along._sums[0].whole)
            assert len(launches) >= num_steps
            expected = along.marginals()
        torch.testing.assert_close(rounds.evidence(), along.evidence(), rtol=1e-12, atol=1e-9)
        for name, marginal in rounds.marginals().items():
            weights = expected[name].log_weights.exp()
            torch.testing.assert_close(marginal.log_weights.exp(), weights, rtol=1e-9, atol=1e-12)
        draws = rounds.sample(2000)
        for name in ("drift", "x7", f"x{num_steps - 1}"):
            counts = (draws[name].unsqueeze(-1) == expected[name].samples).sum(0)
            check_frequencies(counts, expected[name].log_weights.exp())
    # eight times the steps are three more rounds, of up to six kinds of steps
    assert numbers[1] - numbers[0] <= 18


def test_each_factor_is_absorbed_by_the_smallest_that_holds_it() -> None:
    sizes = {"a": 2, "b": 3, "c": 4, "d": 5}
    layouts = ("ab", "bc", "cd", "a", "d", "bd", "", "b")
    groups = [[layouts[operand] for operand in step.operands] for step in absorb(layouts, sizes)]
    # the number goes into the smallest of all, which goes into the smallest of its own
    assert groups == [["b", "", "a", "ab"], ["bc"], ["cd"], ["d", "bd"]]


def test_many_terms_of_the_same_dims_are_looked_at_as_one() -> None:
    """A thousand observations that read the same latents: the work is linear in their number."""
    looked_up = []

    class Sizes(dict[str, int]):
        def __getitem__(self, symbol: str) -> int:
            looked_up.append(symbol)
            return super().__getitem__(symbol)

    (step,) = absorb(["ab", "a", ""] * 1000, Sizes(a=2, b=3))
    assert sorted(step.operands) == list(range(3000))
    assert [step.operands[number] % 3 for number in (0, 999, 1000, 1999, 2000, 2999)] == [
        *(2, 2),  # scalars first,
        *(1, 1),  # then those that read a alone,
        *(0, 0),  # and the largest last
    ]
    assert len(looked_up) <= 6


def test_an_order_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and draws take the order of the evidence, source terms or not."""
    searched = []
    path = order._path

    def counted(*args: Any) -> Any:
        searched.append(args)
        return path(*args)

    monkeypatch.setattr(order, "_path", counted)
    order._steps.cache_clear()
    pyro.set_rng_seed(0)
    posterior = MPImportance(chain_with_globals, chain_guide, num_samples=3).run(20)
    number = len(searched)
    assert number > 0
    posterior.moments()
    posterior.sample(3)
    assert len(searched) == number
