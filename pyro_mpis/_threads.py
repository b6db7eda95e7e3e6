# SPDX-License-Identifier: Apache-2.0
"""
How many threads torch computes with.

Two threads wait for each other at the end of every operation. Where the cores are busy with
something else, one of them waits for a core meanwhile, some milliseconds each time: small
operations then take ten times as long as on one thread. So all is computed on one, except what is
large, and that only if an operation is found to take less time on several, there and then.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ENTRIES = 2**20  # of the tensor that threads are tried with
GAIN = 0.8  # of the time on one thread, for several to be worth it
VALID = 2.0  # seconds that an answer holds: other programs come and go


class _State:
    def __init__(self) -> None:
        self.asked = 1  # the number of threads that the user has set
        self.checked = -VALID  # when they were last tried
        self.pays = False  # and whether they paid then


_STATE = _State()


@contextmanager
def one() -> Iterator[None]:
    """Compute on one thread."""
    before, asked = torch.get_num_threads(), _STATE.asked
    _STATE.asked = before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _STATE.asked = asked


@contextmanager
def several(is_large: bool) -> Iterator[None]:
    """
    Within :func:`one`, compute on as many threads as the user has set, if that pays.

    :param is_large: whether most operations are on large tensors.
    """
    if not is_large or _STATE.asked == 1 or not _pay(_STATE.asked):
        yield
        return
    torch.set_num_threads(_STATE.asked)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _pay(number: int) -> bool:
    """Whether an operation takes less time on several threads than on one, now."""
    now = time.perf_counter()
    if now - _STATE.checked > VALID:
        x = torch.linspace(-1.0, 1.0, ENTRIES)
        _seconds(x, number)  # which starts the threads
        _STATE.pays = _seconds(x, number) < GAIN * _seconds(x, 1)
        _STATE.checked = now
    return _STATE.pays


def _seconds(x: torch.Tensor, number: int) -> float:
    """Return the usual time of an operation on a number of threads."""
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(number)
    try:
        for _ in range(3):
            start = time.perf_counter()
            torch.exp(x)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return sorted(times)[1]
