# SPDX-License-Identifier: Apache-2.0
"""Blocks in many processes: seconds on this machine, and what is sent to more workers."""

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
from _cases import Case
from _competitors import inference
from _measure import MIB

from pyro_mpis import MPImportance

LARGE, SMALL = (18, 512 * MIB), (10, 16 * MIB)  # K and memory_limit: 8 blocks, and 16 or more


class Counting(Executor):
    """Workers that run here, one task after the other, and count the bytes that pass."""

    def __init__(self, number: int) -> None:
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


def run_on(case: Case, size: tuple[int, int], executor: Executor | None) -> MPImportance:
    pyro.set_rng_seed(0)
    num_samples, memory_limit = size
    return inference(case, num_samples, memory_limit, executor)


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@contextmanager
def dask_of_two() -> Iterator[Executor]:
    """Start two workers of a Dask cluster on this machine, as the documentation says."""
    import dask
    from distributed import Client, LocalCluster

    dask.config.set({"distributed.worker.profile.enabled": False})
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(preload=["pyro_mpis"], **options) as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        yield client.get_executor()


def timed(case: Case) -> list[tuple[str, float, float, float]]:
    """Return the seconds of a first and a second run and of moments: alone, in a pool, in Dask."""
    executors = {
        "two processes": partial(ProcessPoolExecutor, 2),
        "Dask, two workers": dask_of_two,
    }
    rows = [("one process", *_three(case, None))]
    for name, executor in executors.items():
        with executor() as workers:
            rows.append((name, *_three(case, workers)))
    return rows


def _three(case: Case, executor: Executor | None) -> tuple[float, float, float]:
    first = seconds(lambda: run_on(case, LARGE, executor))
    begin = time.perf_counter()
    posterior = run_on(case, LARGE, executor)
    second = time.perf_counter() - begin
    return first, second, seconds(posterior.moments)


def sent(case: Case, number: int) -> list[tuple[str, int, float, float]]:
    """Return tasks, and KB of one sent and of one that came back, of a run and of moments."""
    workers = Counting(number)
    posterior = run_on(case, SMALL, workers)
    rows = [("run", *_counts(workers))]
    workers.sent, workers.back = [], []
    posterior.moments()
    return [*rows, ("moments", *_counts(workers))]


def _counts(workers: Counting) -> tuple[int, float, float]:
    return len(workers.sent), max(workers.sent) / 1e3, max(workers.back) / 1e3
