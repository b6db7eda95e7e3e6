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
    "name",
    [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_the_limit_is_kept(name: str) -> None:
    """By a run, by moments, marginals and draws. Without a limit, peaks are higher."""
    file = Path(__file__).with_name("peaks.py")
    command = [sys.executable, str(file), name, str(LIMIT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) <= ROOM, f"{int(run.stdout) / 1e6:.0f} MB"
