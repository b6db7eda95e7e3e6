# SPDX-License-Identifier: Apache-2.0
"""How much memory a run may take by default: what is free, and what limits of the process leave."""

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pyro import settings

# Of the memory that is free, how much a run takes by default.
FRACTION = 0.5
UNLIMITED = 2**60  # bytes; version 1 of control groups has no word for "no limit"
ROOT = Path("/")  # of the file system that says what is free


@settings.register("mpis_memory_fraction", __name__, "FRACTION")
def _check_fraction(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"mpis_memory_fraction: expected a number in (0, 1], but found {value!r}.")


def default_limit(device: str) -> int | None:
    """
    Return the memory that a run may take by default, in bytes; None where it is unknown.

    It is looked up once a second: reading the system's files takes as long as a small run's sums.
    """
    free = _free_bytes(torch.device(device), ROOT, int(time.monotonic()))
    return None if free is None else int(free * FRACTION)


@functools.lru_cache(maxsize=1)
def _free_bytes(device: torch.device, root: Path, second: int) -> int | None:
    return free_bytes(device)


def free_bytes(device: torch.device) -> int | None:
    """
    Return the memory of a device that this process may still take, in bytes.

    The smallest of what the system has free, what the process' control groups leave (containers,
    batch systems), and what ``ulimit`` leaves. None where nothing can be known.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    known = [*_of_system(), *_of_control_groups(), *_of_process()]
    return max(0, min(known)) if known else None


def _of_system() -> Iterator[int]:
    """Yield what the system has free, caches that it would give back included."""
    available = _fields(ROOT / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        yield available * 1024
        return
    try:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        pass
    # macOS has no count of free pages there: of all pages, some are taken by what runs already
    else:
        return
    try:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return


def _of_control_groups() -> Iterator[int]:
    """Yield what each control group that holds the process leaves: versions 1 and 2."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = ROOT / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # in a container, its own group is mounted as the base, and there is no such folder
        for folder in (group, *group.parents):
            yield from _of_control_group(folder, *names)
            if folder == base:
                break


def _of_control_group(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    """Yield what one control group leaves; what its cache of files takes would be given back."""
    most = _number(folder / limit)
    if most is None or most >= UNLIMITED:  # most groups: the other two files need not be read
        return
    taken = _number(folder / usage)
    if taken is not None:
        yield most - taken + _fields(folder / "memory.stat").get(cached, 0)


def _of_process() -> Iterator[int]:
    """Yield what ``ulimit -v`` and ``ulimit -d`` leave of address space and of data."""
    try:
        import resource
    except ImportError:  # a platform without such limits
        return
    status = _fields(ROOT / "proc/self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and most >= 0:
            taken = status.get(used)
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield most - (resident if taken is None else taken) * 1024


def _number(path: Path) -> int | None:
    """Return the number that a file holds; None if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" stands for no limit
        return None


def _fields(path: Path) -> dict[str, int]:
    """Return the first number of each line by the word before it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in words if len(row) > 1 and row[1].isdigit()}
