# SPDX-License-Identifier: Apache-2.0
"""What is sent to the workers of an executor, and what comes back: tasks and bytes."""

import os
import pickle
import sys
from concurrent.futures import Executor, Future
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_mpis import MPImportance, workers
from pyro_mpis.workers import Workers, dealt, number_of_workers

DATA = torch.linspace(-1.0, 1.0, 100_000)  # 400 kB
SMALL = 40_000  # bytes: particles, structure, functions


class Pickling(Executor):
    """
    Workers that share nothing with this process but bytes, each taking the next task in turn.

    They keep count of the bytes that they are sent, and of those that they send back.
    """

    def __init__(self, number: int | None) -> None:
        if number is not None:
            self._max_workers = number
        self.sent: list[int] = []
        self.back: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        task = pickle.dumps((fn, args, kwargs))
        function, arguments, options = pickle.loads(task)
        result = pickle.dumps(function(*arguments, **options))
        self.sent.append(len(task))
        self.back.append(len(result))
        future: Future[Any] = Future()
        future.set_result(pickle.loads(result))
        return future

    def taken(self) -> tuple[list[int], list[int]]:
        """Return the counts, and start anew."""
        counts = self.sent, self.back
        self.sent, self.back = [], []
        return counts


def model(y: Tensor) -> None:
    """Three globals, of which there are as many combinations as 16 blocks and more can be cut."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 0.5))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(a + c, b), obs=y[:10])


def run(executor: Executor | None, **options: Any) -> MPImportance:
    pyro.set_rng_seed(0)
    return MPImportance(model, num_samples=8, executor=executor, **options).run(DATA)


def check_counts(counts: tuple[list[int], list[int]], tasks: int, back: int) -> None:
    """Each task has the data once, and what comes back has none."""
    sent, returned = counts
    assert len(sent) == tasks
    assert all(DATA.nbytes < number < DATA.nbytes + SMALL for number in sent), sent
    assert all(number < back for number in returned), returned


@pytest.mark.parametrize("number", [1, 4, 16])
def test_data_travel_once_to_a_worker(number: int) -> None:
    """Not with each of the 32 blocks: in the run, and in each query."""
    executor = Pickling(number)
    here = run(None, memory_limit=2_000)
    sent = run(executor, memory_limit=2_000)
    assert len(sent._sums[0].blocks) == 32
    check_counts(executor.taken(), number, SMALL)
    torch.testing.assert_close(sent.evidence(), here.evidence())
    torch.testing.assert_close(sent.moments(), here.moments())
    check_counts(executor.taken(), number, SMALL)
    draws = []
    for posterior in (here, sent):
        pyro.set_rng_seed(1)
        draws.append(posterior.sample(1000))
    torch.testing.assert_close(*draws)
    check_counts(executor.taken(), number, 4 * SMALL)


@pytest.mark.parametrize("number", [4, 16])
def test_data_travel_once_for_many_replicates(number: int) -> None:
    """And the results that come back have neither programs nor data in them."""
    executor = Pickling(number)
    here, sent = run(None, num_replicates=40), run(executor, num_replicates=40)
    check_counts(executor.taken(), number, 40 // 4 * SMALL)
    torch.testing.assert_close(sent.evidence(), here.evidence())
    torch.testing.assert_close(sent.moments(), here.moments())
    check_counts(executor.taken(), number, 40 // 4 * SMALL)
    for total in sent._sums:
        programs = total.replicate.programs
        assert programs.model is model
        assert programs.args[0] is DATA


def test_an_executor_that_does_not_say_how_many_workers_it_has_gets_a_task_for_each_job() -> None:
    executor = Pickling(None)
    sent = run(executor, memory_limit=2_000)
    (total,) = sent._sums
    check_counts(executor.taken(), len(total.blocks), SMALL)
    torch.testing.assert_close(sent.evidence(), run(None, memory_limit=2_000).evidence())


def test_numbers_of_workers() -> None:
    class Client:
        """As Dask's: threads of each worker process."""

        def nthreads(self) -> dict[str, int]:
            return {"one": 4, "two": 4, "three": 1}

    dask, mpi = Pickling(None), Pickling(None)
    dask._client, mpi.num_workers = Client(), 5  # type: ignore[attr-defined]
    assert [number_of_workers(each) for each in (dask, mpi, Pickling(3))] == [3, 5, 3]
    assert number_of_workers(Pickling(None)) is None
    assert number_of_workers(Pickling(0)) is None, "workers that are still to come"


@pytest.mark.parametrize("number", range(1, 12))
def test_jobs_are_dealt_evenly_and_in_order(number: int) -> None:
    jobs = [lambda n=n: n for n in range(9)]
    tasks = dealt(jobs, number)
    assert [job() for task in tasks for job in task] == list(range(9))
    sizes = [len(task) for task in tasks]
    assert len(sizes) == min(number, 9)
    assert max(sizes) - min(sizes) <= 1


def test_results_are_in_order_whatever_the_workers() -> None:
    jobs = [lambda n=n: n for n in range(9)]

    class Here(Pickling):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_result(fn(*args, **kwargs))
            return future

    for number in (1, 4, 20, None):
        assert Workers(Here(number), show_progress=False).run(jobs) == list(range(9))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_while_jobs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the environment asks for the contrary, as Dask's workers' does."""
    pytest.importorskip("resource")
    import resource

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def touched() -> int:
        """Return how many pages were mapped in, of 20 tensors of 1,000 pages or more each."""
        before = faults()
        for _ in range(20):
            torch.zeros(2**20).add_(1.0)
        return faults() - before

    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        pytest.skip("the allocator is not in its first state")
    libc = workers.ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("not glibc")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    libc.mallopt(workers._TRIM_THRESHOLD, 65536)  # as glibc does when a process starts with it
    libc.mallopt(workers._MMAP_THRESHOLD, 2**17)
    try:
        assert touched() > 20 * 900
        assert workers.in_turn([touched])[0] < 3 * 1100
        assert touched() > 20 * 900, "as before"
    finally:
        libc.mallopt(workers._MMAP_THRESHOLD, 2**25)
        libc.mallopt(workers._TRIM_THRESHOLD, 2**26)
