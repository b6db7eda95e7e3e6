# SPDX-License-Identifier: Apache-2.0
"""Which loops have a progress bar, and what it says."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mpis import MPImportance, MPISWarning, _progress
from pyro_mpis._progress import bar, showing

Bars = list[tuple[str, int]]  # what is being done, and how often


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    """Return the bars that are shown, in a terminal."""
    shown: Bars = []

    def recorded(items: Any, *, desc: str, delay: float, leave: bool) -> Iterator[Any]:
        assert delay == 2.0
        assert not leave
        shown.append((desc, len(items)))
        return iter(items)

    monkeypatch.setattr(_progress, "tqdm", recorded)
    monkeypatch.setattr(_progress, "can_show", lambda: True)
    return shown


def model() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(a * b + c, 1.0), obs=torch.zeros(10))


def in_blocks(**options: Any) -> MPImportance:
    """Run with a sum of several blocks."""
    return MPImportance(model, num_samples=60, memory_limit=4_000_000, **options).run()


def test_blocks_and_the_queries_of_them(bars: Bars) -> None:
    posterior = in_blocks()
    total = posterior._sums[0]
    number, parts = len(total.blocks), len(total.replicate.cut(total.blocks[0])[1])
    assert number > 2
    first = ("densities", parts - 1)  # the first block is evaluated before, in pieces
    assert bars == [first, ("blocks", number - 1)]
    posterior.moments()
    posterior.sample(1000)
    assert [doing for doing, _ in bars] == ["densities", "blocks", "marginals", "samples"]


def test_pieces_of_a_single_block(bars: Bars) -> None:
    MPImportance(model, num_samples=100).run()
    assert [doing for doing, _ in bars] == ["densities"]


def test_replicates_alone_have_a_bar_though_each_loops_over_pieces(bars: Bars) -> None:
    MPImportance(model, num_samples=60, num_replicates=3).run()
    assert bars == [("replicates", 3)]


def test_runs_for_each_particle(bars: Bars) -> None:
    def branching() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0 if a > 0 else 2.0), obs=torch.tensor(1.0))

    with pytest.warns(MPISWarning, match="once for each particle"):
        MPImportance(branching, num_samples=7).run()
    assert bars == [("particles", 7)]


def test_results_of_an_executor(bars: Bars) -> None:
    with ThreadPoolExecutor(2) as executor:
        in_blocks(executor=executor)
    assert [doing for doing, _ in bars] == ["blocks"]


def test_none_if_not_asked_for(bars: Bars) -> None:
    posterior = in_blocks(disable_progbar=True)
    posterior.moments()
    assert bars == []


def test_none_for_one_item_or_where_nobody_asked(bars: Bars) -> None:
    assert list(bar(range(3), "nobody asked")) == [0, 1, 2]
    with showing(True):
        assert list(bar(range(1), "one")) == [0]
    assert bars == []


def test_none_where_there_is_no_terminal(bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "can_show", lambda: False)
    in_blocks()
    assert bars == []


def test_a_loop_that_fails_leaves_the_next_one_its_bar(bars: Bars) -> None:
    loops = []  # which keeps the generator alive, as a traceback may

    def loop() -> None:
        with showing(True):
            loops.append(bar(range(3), "loop"))
            for item in loops[-1]:
                raise RuntimeError(item)

    for _ in range(2):
        with pytest.raises(RuntimeError):
            loop()
    assert bars == [("loop", 3)] * 2
    assert not _progress._STATE.on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_shows_none(bars: Bars) -> None:
    with showing(True):
        child = os.fork()
        if child == 0:
            list(bar(range(3), "in a child"))
            os._exit(len(bars))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("base", "shows"), [("tqdm.notebook", True), ("tqdm.std", False)])
def test_a_notebook_shows_bars_though_it_is_no_terminal(
    base: str, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        isatty: Callable[[], bool] = staticmethod(lambda: False)

    class Base:
        __module__ = base

    monkeypatch.setattr(_progress, "tqdm", type("tqdm", (Base,), {}))
    monkeypatch.setattr("sys.stderr", Terminal())
    assert _progress.can_show() == shows
