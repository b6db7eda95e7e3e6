# SPDX-License-Identifier: Apache-2.0
"""What is sent to the workers of an executor, and what comes back: tasks and bytes."""

import os
import pickle
import platform
import subprocess
import sys
from concurrent.futures import Executor, Future
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_mpis import MPImportance
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
    return MPImportance(model, num_samples=12, executor=executor, **options).run(DATA)


def check_counts(counts: tuple[list[int], list[int]], tasks: int, back: int) -> None:
    """Each task has the data once, and what comes back has none."""
    sent, returned = counts
    assert len(sent) == tasks
    assert all(DATA.nbytes < number < DATA.nbytes + SMALL for number in sent), sent
    assert all(number < back for number in returned), returned


SIXTEEN = pytest.param(16, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 4, SIXTEEN])
def test_data_travel_once_to_a_worker(number: int) -> None:
    """Not with each of the 64 blocks: in the run, and in each query."""
    executor, back = Pickling(number), SMALL + 64 // number * 2_000
    here = run(None, memory_limit=4_000)
    sent = run(executor, memory_limit=4_000)
    assert len(sent._sums[0].blocks) == 64
    check_counts(executor.taken(), number, back)
    torch.testing.assert_close(sent.evidence(), here.evidence())
    torch.testing.assert_close(sent.moments(), here.moments())
    check_counts(executor.taken(), number, back)
    draws = []
    for posterior in (here, sent):
        pyro.set_rng_seed(1)
        draws.append(posterior.sample(1000))
    torch.testing.assert_close(*draws)
    check_counts(executor.taken(), number, 4 * SMALL)


@pytest.mark.parametrize("number", [4, SIXTEEN])
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
    sent = run(executor, memory_limit=4_000)
    (total,) = sent._sums
    check_counts(executor.taken(), len(total.blocks) - 1, SMALL)  # the first is evaluated here
    torch.testing.assert_close(sent.evidence(), run(None, memory_limit=4_000).evidence())


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
        assert Workers(Here(number), show_progress=False).run(jobs, "jobs") == list(range(9))


TOUCHED = """
import resource
import torch
from pyro_mpis.workers import one_after_the_other

def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**20).add_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(touched(), one_after_the_other([touched])[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_kept_while_jobs_run() -> None:
    """Of ten tensors of 4 MB one after the other, only the first maps memory in."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}  # as Dask starts its workers
    found = subprocess.run(
        [sys.executable, "-c", TOUCHED], env=environment, capture_output=True, text=True, check=True
    )
    resource = pytest.importorskip("resource")
    outside, inside = map(int, found.stdout.split())
    assert outside > 10 * (2**22 // resource.getpagesize()) * 0.9
    assert inside < outside / 3
