# SPDX-License-Identifier: Apache-2.0
"""Threads take turns, and the global state of a process is left as it was."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.programs.environment import rng_state, same_rng_state, seeded, set_rng_state
from pyro_mpis.programs.turns import turn


def coin(y: Tensor) -> None:
    with pyro.plate("i", len(y)):
        side = pyro.sample("side", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(side, 1.0), obs=y)


def test_runs_and_queries_in_threads() -> None:
    """Nothing is random, so every answer of every thread is the same; each has a turn."""
    y = torch.linspace(-1.0, 2.0, 6)
    posterior = MPImportance(coin, num_samples=2).run(y)
    evidence, mean = posterior.evidence(), posterior.moments()["side"]

    def ask(number: int) -> bool:
        if number % 2:
            return bool((posterior.moments(lambda side: side, "side") == mean).all())
        return bool(MPImportance(coin, num_samples=2).run(y).evidence() == evidence)

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(ask, range(12)))
    assert _PYRO_STACK == []


def test_a_thread_waits_for_its_turn() -> None:
    """While one thread has its turn, another does not begin; jobs of the first may."""
    done = threading.Event()
    y = torch.zeros(2)

    def ask() -> None:
        MPImportance(coin, num_samples=2).run(y)
        done.set()

    other = threading.Thread(target=ask)
    with turn(), ThreadPoolExecutor(1) as threads:
        other.start()
        posterior = MPImportance(coin, num_samples=2, num_replicates=2, executor=threads).run(y)
        assert bool(posterior.evidence().isfinite())
        assert not done.is_set()
    other.join()
    assert done.is_set()


def test_an_error_ends_the_turn() -> None:
    def broken() -> None:
        raise RuntimeError("broken model")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken model"):
            MPImportance(broken, num_samples=2).run()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(MPImportance(coin, num_samples=2).run, torch.zeros(2)).result()
    assert _PYRO_STACK == []


class FakeCuda:
    """The generators of two graphics cards that are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.zeros(2), torch.ones(2)]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.set)

    def get(self) -> list[Tensor]:
        return [state.clone() for state in self.states]

    def set(self, states: list[Tensor]) -> None:
        self.states = [state.clone() for state in states]


def test_generators_of_graphics_cards_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    before = rng_state()
    with seeded(3):
        cuda.states[1] += 5.0
    assert cuda.states[1].tolist() == [1.0, 1.0]
    assert same_rng_state(before, rng_state())
    cuda.states[0] += 1.0
    assert not same_rng_state(before, rng_state())
    set_rng_state(before)
    assert same_rng_state(before, rng_state())
    torch.rand(())
    assert not same_rng_state(before, rng_state())
