# SPDX-License-Identifier: Apache-2.0
"""Threads take turns, and the global state of a process is left as it was."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_mpis import MPImportance
from pyro_mpis.programs import turns
from pyro_mpis.programs.environment import rng_state, same_rng_state, seeded, set_rng_state
from pyro_mpis.programs.turns import job, lent, turn


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


def test_jobs_compute_one_at_a_time_on_one_thread() -> None:
    """While their asker waits and lends; nothing of it stays."""
    inside, most, threads = 0, 0, set()

    def compute() -> None:
        nonlocal inside, most
        torch.set_num_threads(2)  # of this thread
        with job():
            inside += 1
            most = max(most, inside)
            threads.add(torch.get_num_threads())
            time.sleep(0.01)
            inside -= 1

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with turn(), lent(), ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(compute) for _ in range(8)]:
                future.result()
        assert most == 1
        assert threads == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_jobs_wait_unless_their_asker_lends() -> None:
    computed = threading.Event()

    def compute() -> None:
        with job():
            computed.set()

    with turn():
        with lent():
            pass  # what was lent is taken back
        thread = threading.Thread(target=compute)
        thread.start()
        assert not computed.wait(0.2)
        with lent():
            assert computed.wait(10.0)
    thread.join(10.0)
    with lent():  # without an asker, there is nothing to lend
        pass


def test_a_turn_computes_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with turn():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_forgets_the_turns_of_other_threads() -> None:
    """Of which it has none; but a turn that the forking thread has is its own."""
    held, ended, had = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with turn():
            held.set()
            ended.wait(10.0)

    def ask() -> None:
        with turns._LOCKS.asking, turns._LOCKS.working:
            had.set()

    holder, asker = threading.Thread(target=hold), threading.Thread(target=ask)
    holder.start()
    assert held.wait(10.0)
    turns._renew()  # as after a fork
    asker.start()
    assert had.wait(10.0)
    assert turns._LOCKS.depth == 1
    ended.set()
    holder.join(10.0)
    asker.join(10.0)
    assert turns._LOCKS.depth == 0


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
