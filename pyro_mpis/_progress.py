# SPDX-License-Identifier: Apache-2.0
"""
One progress bar at a time, over what takes more than two seconds.

Whoever asks says whether bars are to be shown (:func:`showing`); whoever loops says what is being
done (:func:`bar`). Of loops within loops the outermost has the bar. Jobs in other threads and
processes show none.
"""

import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

SECONDS = 2.0  # before a bar appears


def _here() -> tuple[int, int]:
    """Return which process and thread this is."""
    return os.getpid(), threading.get_ident()


class _State:
    def __init__(self) -> None:
        self.asker = _here()
        self.on = False
        self.outermost: object = None  # the loop that has the bar


_STATE = _State()


@contextmanager
def showing(on: bool) -> Iterator[None]:
    """Let the loops within have bars, or not."""
    before = vars(_STATE).copy()
    _STATE.on, _STATE.asker = on and can_show(), _here()
    try:
        yield
    finally:
        vars(_STATE).update(before)


def bar(items: Collection[Item], doing: str) -> Iterator[Item]:
    """
    Loop over items under a bar, if bars are to be shown and this is the outermost loop.

    :param doing: what is being done, in a word or two: ``blocks``.
    """
    is_shown = _STATE.on and _STATE.outermost is None and _STATE.asker == _here()
    if not is_shown or len(items) < 2:
        yield from items
        return
    _STATE.outermost = this = object()
    try:
        yield from tqdm(items, desc=doing, delay=SECONDS, leave=False)
    finally:
        if _STATE.outermost is this:
            _STATE.outermost = None


def can_show() -> bool:
    """Whether there is a terminal or a notebook to show a bar in."""
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty()
