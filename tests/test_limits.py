# SPDX-License-Identifier: Apache-2.0
"""How much memory a process may take: files of systems written by hand, and limits of a process."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch

from pyro_mpis.particles import limits

CPU = torch.device("cpu")
GB = 10**9
FREE = f"MemTotal: {8 * GB // 1024} kB\nMemAvailable: {4 * GB // 1024} kB\n"


def free_with(
    files: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> int | None:
    """Return what is free on a system of some files."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits, "_of_process", lambda: iter(()))
    return limits.free_bytes(CPU)


GROUP = "sys/fs/cgroup/batch/job"
OLD = "sys/fs/cgroup/memory/batch"
SYSTEMS: dict[str, tuple[dict[str, str], int]] = {
    "no groups": ({"proc/meminfo": FREE}, 4 * GB // 1024 * 1024),
    "version 2, files that would be given back": (
        {
            "proc/meminfo": FREE,
            "proc/self/cgroup": "0::/batch/job\n",
            f"{GROUP}/memory.max": f"{2 * GB}\n",
            f"{GROUP}/memory.current": f"{GB}\n",
            f"{GROUP}/memory.stat": "anon 5\ninactive_file 1000\n",
            "sys/fs/memory.max": "1\n",  # not of a group
            "sys/fs/memory.current": "0\n",
        },
        GB + 1000,
    ),
    "version 2, a limit of the group around": (
        {
            "proc/meminfo": FREE,
            "proc/self/cgroup": "0::/batch/job\n",
            f"{GROUP}/memory.max": "max\n",
            f"{GROUP}/memory.current": "7\n",
            "sys/fs/cgroup/batch/memory.max": f"{GB}\n",
            "sys/fs/cgroup/batch/memory.current": "7\n",
        },
        GB - 7,
    ),
    "version 2, of a container: its own group is the root": (
        {
            "proc/meminfo": FREE,
            "proc/self/cgroup": "0::/not/here\n",
            "sys/fs/cgroup/memory.max": f"{GB}\n",
            "sys/fs/cgroup/memory.current": "9\n",
        },
        GB - 9,
    ),
    "version 1": (
        {
            "proc/meminfo": FREE,
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/batch\n1:name=memory:/mine\n",
            f"{OLD}/memory.limit_in_bytes": f"{3 * GB}\n",
            f"{OLD}/memory.usage_in_bytes": f"{GB}\n",
            f"{OLD}/memory.stat": "total_inactive_file 5\n",
            "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": "1\n",
            "sys/fs/cgroup/memory/mine/memory.usage_in_bytes": "0\n",
        },
        2 * GB + 5,
    ),
    "used up": (
        {
            "proc/self/cgroup": "0::/batch/job\n",
            f"{GROUP}/memory.max": "10\n",
            f"{GROUP}/memory.current": "20\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_free(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = SYSTEMS[system]
    assert free_with(files, tmp_path, monkeypatch) == expected


def test_a_platform_without_these_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the number of pages says it, or half of all pages, or nothing is known."""
    pages = {"SC_AVPHYS_PAGES": 200, "SC_PHYS_PAGES": 300, "SC_PAGE_SIZE": 4096}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError(name)
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert free_with({}, tmp_path, monkeypatch) == 200 * 4096
    del pages["SC_AVPHYS_PAGES"]
    assert limits.free_bytes(CPU) == 150 * 4096
    del pages["SC_PHYS_PAGES"]
    assert limits.free_bytes(CPU) is None
    assert limits.default_limit("cpu") is None


def test_a_run_takes_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As was looked up in this second."""
    now = 100.2
    monkeypatch.setattr("time.monotonic", lambda: now)
    for later, size, expected in ((0.0, 4000, 2000), (0.7, 8000, 2000), (0.9, 8000, 4000)):
        now = 100.2 + later
        free_with({"proc/meminfo": f"MemAvailable: {size} kB\n"}, tmp_path, monkeypatch)
        assert limits.default_limit("cpu") == expected * 1024
    with pyro.settings.context(mpis_memory_fraction=1.0):
        assert limits.default_limit("cpu") == 8000 * 1024
    for wrong in (0.0, 1.5):
        with pytest.raises(
            ValueError, match=r"mpis_memory_fraction: expected a number in \(0, 1\]"
        ):
            pyro.settings.set(mpis_memory_fraction=wrong)


@pytest.mark.parametrize("limited", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_a_limit_leaves(limited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of address space and of data, by what the system says is taken, or by what is resident."""
    resource = pytest.importorskip("resource")
    without = resource.RLIM_INFINITY
    at = {getattr(resource, limited): 2**20}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (at.get(limit, without), without))
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    assert list(limits._of_process()) == [2**20 - 7 * 1024]
    (tmp_path / "proc/self").mkdir(parents=True)
    status = "Name:\tpython\nVmSize:\t100 kB\nVmData:\t50 kB\n"
    (tmp_path / "proc/self/status").write_text(status)
    taken = {"RLIMIT_AS": 100, "RLIMIT_DATA": 50}[limited]
    assert list(limits._of_process()) == [2**20 - taken * 1024]


def test_limits_of_the_process() -> None:
    """As ``ulimit`` sets them, each by itself: what is left is less than the limit."""
    pytest.importorskip("resource")
    code = (
        "import resource, torch\n"
        "from pyro_mpis.particles.limits import free_bytes\n"
        "for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):\n"
        "    unlimited = resource.getrlimit(limit)\n"
        "    resource.setrlimit(limit, (6 << 30, unlimited[1]))\n"
        "    print(free_bytes(torch.device('cpu')))\n"
        "    resource.setrlimit(limit, unlimited)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [int(number) for number in run.stdout.split()]
    assert len(found) == 2
    assert all(0 < number < 6 << 30 for number in found)
