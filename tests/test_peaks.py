# SPDX-License-Identifier: Apache-2.0
"""The memory that a run and its queries take, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from peaks import MODELS

LIMIT = 32 << 20
ROOM = 1.5 * LIMIT + 100e6  # beside what libraries and two particles take


EVERY_DAY = ("process", "effects", "chain", "grouped")  # one of each kind of allocation


@pytest.mark.parametrize(
    "names",
    [EVERY_DAY, pytest.param(tuple(MODELS.keys() - EVERY_DAY), marks=pytest.mark.slow)],
    ids=["every day", "the others"],
)
def test_the_limit_is_kept(names: tuple[str, ...]) -> None:
    """By a run, by moments, marginals and draws. Without a limit, peaks are higher."""
    file = Path(__file__).with_name("peaks.py")
    command = [sys.executable, str(file), str(LIMIT), *names]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found.keys() == set(names)
    assert not {name: size for name, size in found.items() if int(size) > ROOM}
