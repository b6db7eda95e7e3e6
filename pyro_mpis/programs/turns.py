# SPDX-License-Identifier: Apache-2.0
"""
One thread of a process at a time.

Pyro's handlers and parameters, torch's generators and its default dtype are those of a process:
programs that ran in two threads at once would act on each other.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from pyro_mpis import _threads

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Locks:
    """Who asks waits at ``asking``; who computes, for an asker or as its job, holds ``working``."""

    def __init__(self) -> None:
        self.asking = threading.RLock()
        self.working = threading.RLock()
        self.depth = 0  # of calls within calls, of the thread that holds ``asking``


_LOCKS = _Locks()


def _renew() -> None:
    """Forget, in a forked process, what threads of the old one hold."""
    depth = _LOCKS.depth
    _LOCKS.__init__()  # type: ignore[misc]
    _LOCKS.depth = depth


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread computes; calls within calls do not wait."""
    with _LOCKS.asking:
        if _LOCKS.depth:
            yield
            return
        with _LOCKS.working:
            _LOCKS.depth = 1
            try:
                with _threads.one():
                    yield
            finally:
                _LOCKS.depth = 0


def in_turn(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function that is to have its turn."""

    @functools.wraps(function)
    def waiting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with turn():
            return function(*args, **kwargs)

    return waiting


@contextmanager
def job() -> Iterator[None]:
    """Run a job of an asker, who waits for it, while no other thread computes."""
    with _LOCKS.working, _threads.one():
        yield


@contextmanager
def lent() -> Iterator[None]:
    """Let jobs that may run in threads of this process compute, while their asker waits."""
    if not _LOCKS.depth:  # nobody has asked: the blocks of a replicate, say, by themselves
        yield
        return
    _LOCKS.working.release()
    try:
        yield
    finally:
        _LOCKS.working.acquire()
