# SPDX-License-Identifier: Apache-2.0
"""Time in interleaved runs, peak memory in processes of their own, tables in Markdown."""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Medians over runs, the competitors' runs one after the other in each round."""

    seconds: float
    cpu_seconds: float
    value: float | None  # of what the function returns
    runs: int


@dataclass(frozen=True)
class Peak:
    """What one run takes in a process of its own; ``failure`` says why there is no figure."""

    mib: float = float("nan")  # above the same process with everything imported and loaded
    seconds: float = float("nan")
    value: float | None = None
    failure: str = ""


def wait() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    competitors: Mapping[str, Callable[[], float | None]],
    *,
    rounds: int = 7,
    budget: float = 3.0,
) -> dict[str, Timing]:
    """
    Time functions in turn: A, B, A, B, ...; each round has a seed, the same for all.

    The first round is a warm-up that does not count, unless it takes most of the budget.

    :param budget: seconds after which no new round starts.
    """
    walls: dict[str, list[float]] = {name: [] for name in competitors}
    cpus: dict[str, list[float]] = {name: [] for name in competitors}
    values: dict[str, list[float]] = {name: [] for name in competitors}
    begin = time.perf_counter()
    for number in range(rounds + 1):
        for name, function in competitors.items():
            pyro.set_rng_seed(number)
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            value = function()
            wait()
            cpus[name].append(time.process_time() - cpu)
            walls[name].append(time.perf_counter() - wall)
            if value is not None:
                values[name].append(value)
        if number == 0 and time.perf_counter() - begin < budget / 2:
            for figures in (walls, cpus):
                for measured in figures.values():
                    measured.clear()
        if time.perf_counter() - begin > budget:
            break
    return {
        name: Timing(
            statistics.median(walls[name]),
            statistics.median(cpus[name]),
            statistics.median(values[name]) if values[name] else None,
            len(walls[name]),
        )
        for name in competitors
    }


def processor(device: str) -> str:
    """Name what the computations run on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # unlike ru_maxrss, not inherited from the process that started this one
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report_peak(function: Callable[[], float | None], limit: float) -> None:
    """Run a function once and print what it takes; for the process that ``peaks`` starts."""
    if not torch.cuda.is_initialized() and sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        bound = mapped + int(limit)
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
        with suppress(OSError):  # forget the peak of loading
            Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    begin = time.perf_counter()
    value = function()
    wait()
    seconds = time.perf_counter() - begin
    print(json.dumps({"mib": (peak_bytes() - before) / MIB, "seconds": seconds, "value": value}))


def peaks(
    command: Sequence[str],
    jobs: Iterable[Mapping[str, object]],
    *,
    seconds: float = 60.0,
    workers: int = 2,
) -> list[Peak]:
    """Run jobs in processes of their own: ``command JOB``, where JOB is JSON."""

    def one(job: Mapping[str, object]) -> Peak:
        try:
            done = subprocess.run(
                [*command, json.dumps(job)], capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return Peak(failure=f"over {seconds:.0f} s")
        if done.returncode == 0:
            return Peak(**json.loads(done.stdout.splitlines()[-1]))
        errors = [x for x in done.stderr.splitlines() if "Error" in x.split(":")[0] and x[0] != " "]
        last = errors[-1] if errors else f"exit status {done.returncode}"
        if "memory" in last.lower() or done.returncode < 0:
            return Peak(failure="out of memory")
        return Peak(failure=last[:60])

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, jobs))


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with the given columns; the first to the left, the rest right."""
    columns = header.split(",")
    rule = "|".join(["---"] + ["--:"] * (len(columns) - 1))
    lines = ["| " + " | ".join(columns) + " |", f"|{rule}|"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(cell: object) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)
