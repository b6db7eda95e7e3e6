# SPDX-License-Identifier: Apache-2.0
"""Where units of work run: here, or where an executor sends them."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

Result = TypeVar("Result")
Item = TypeVar("Item")
Job = Callable[[], Result]

_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Workers:
    """Where jobs run: here, one after the other, or where an executor sends them."""

    executor: Executor | None = None
    show_progress: bool = True

    def run(self, jobs: Sequence[Job[Result]]) -> list[Result]:
        """Run jobs and return their results in order; shows a bar in a terminal."""
        if self.executor is None or len(jobs) == 1:
            return [job() for job in self._progress(jobs)]
        futures = [self.executor.submit(_alone, job) for job in jobs]
        return [future.result() for future in self._progress(futures)]

    def _progress(self, items: Sequence[Item]) -> Iterable[Item]:
        disable = None if self.show_progress and len(items) > 1 else True  # None: in a terminal
        bar: Iterable[Item] = tqdm(items, desc="blocks", disable=disable, leave=False)
        return bar


def _alone(job: Job[Result]) -> Result:
    """
    Run a job while no other thread of this process runs one.

    Pyro's handlers and parameters and torch's generator are those of a process: threads, which
    Dask's workers have several of too, would act on each other's programs.
    """
    with _ONE_AT_A_TIME:
        return job()
