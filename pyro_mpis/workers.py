# SPDX-License-Identifier: Apache-2.0
"""
Where jobs run: here, or where an executor sends them.

A job is a :func:`functools.partial` of a function and of what it needs: programs, data and
particles, which many jobs have in common, and a block or a seed of its own. An executor gets one
task for each of its workers, with that worker's share of the jobs. A task is pickled as one object,
so what its jobs have in common is in it once, and travels once to a worker.
"""

import ctypes
import itertools
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pyro_mpis import _progress
from pyro_mpis.programs import turns

Result = TypeVar("Result")
Job = Callable[[], Result]

# Options of glibc's mallopt, and its own upper bound and default of the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD = 2**25, 2**17
_KEPT = 2**28  # bytes that stay with a process between two tensors


@dataclass(frozen=True)
class Workers:
    """Where jobs run: here, one after the other, or where an executor sends them."""

    executor: Executor | None = None
    show_progress: bool = True

    def sends(self, number: int) -> bool:
        """Whether this number of jobs is sent away."""
        return self.executor is not None and number > 1

    def run(self, jobs: Sequence[Job[Result]], doing: str) -> list[Result]:
        """
        Run jobs and return their results in order.

        :param doing: what a progress bar is to say.
        """
        return list(self.each(jobs, doing))

    def each(self, jobs: Sequence[Job[Result]], doing: str) -> Iterator[Result]:
        """
        Run jobs and yield their results in order: here, each before the next job runs.

        :param doing: what a progress bar is to say.
        """
        with _progress.showing(self.show_progress):
            if self.executor is None or len(jobs) == 1:
                for job in _progress.bar(jobs, doing):
                    yield job()
            else:
                yield from self._sent(jobs, doing, self.executor)

    def _sent(self, jobs: Sequence[Job[Result]], doing: str, executor: Executor) -> list[Result]:
        """Run jobs where the executor sends them."""
        tasks = dealt(jobs, number_of_workers(executor) or len(jobs))
        with warnings.catch_warnings():
            # Dask's advice for data that are sent with many tasks
            warnings.filterwarnings("ignore", message="Sending large graph", category=UserWarning)
            with turns.lent():
                futures = [executor.submit(one_after_the_other, task) for task in tasks]
                done = [future.result() for future in _progress.bar(futures, doing)]
        return [result for results in done for result in results]


def number_of_workers(executor: Executor) -> int | None:
    """
    Return how many processes (or threads) an executor has for jobs; None if it does not say.

    Dask's threads of one process count once, since jobs take turns there.
    """
    client = getattr(executor, "_client", None)
    if client is not None:
        return len(client.nthreads()) or None
    for name in ("_max_workers", "num_workers"):  # concurrent.futures and loky; mpi4py
        number = getattr(executor, name, None)
        if isinstance(number, int) and number > 0:
            return number
    return None


def dealt(jobs: Sequence[Job[Result]], number: int) -> list[tuple[Job[Result], ...]]:
    """Deal jobs into at most ``number`` tasks, in order and as even as can be."""
    number = min(number, len(jobs))
    ends = [len(jobs) * step // number for step in range(number + 1)]
    return [tuple(jobs[start:end]) for start, end in itertools.pairwise(ends)]


def one_after_the_other(jobs: Sequence[Job[Result]]) -> list[Result]:
    """
    Run jobs one after the other, while no other thread of this process runs any.

    Pyro's handlers and parameters and torch's generator are those of a process: threads, which
    Dask's workers have several of too, would act on each other's programs.
    """
    with turns.job(), _memory_kept():
        return [job() for job in jobs]


@contextmanager
def _memory_kept() -> Iterator[None]:
    """
    Let the process keep freed memory between tensors; give it back at the end.

    Dask starts its workers with ``MALLOC_TRIM_THRESHOLD_``: glibc then returns each tensor's memory
    to the system at once, which clears and maps it anew, page by page, for the next one. That took
    as long as the computation.
    """
    asked = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    if not asked.isdigit() or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, int(asked))
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)
        libc.malloc_trim(0)
