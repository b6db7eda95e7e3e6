# SPDX-License-Identifier: Apache-2.0
"""
What a run costs, against others and against the least possible.

    python benchmarks/speed.py [--device cpu|cuda] [--quick] [--only SECTION] [--output FILE]

One thread; medians of interleaved runs in one process; peak memory from processes of their own;
the error of the log evidence beside each time. The paper's models need their data, in the folder
that ``PYRO_MPIS_DATA`` names, and are left out without.
"""

import argparse
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import opt_einsum
import pyro
import torch
from _cases import HAS_DATA, TRUTHS, Case, eight_schools_model, load
from _measure import GIB, Peak, Timing, interleaved, peaks, report_peak, table
from pyro import poutine
from pyro.infer import TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from pyro_mpis import MPImportance, factors
from pyro_mpis import blocks as package_blocks
from pyro_mpis._typing import SampleMessage
from pyro_mpis.handlers import Programs, replay
from pyro_mpis.logspace import log_matmul

Function = Callable[[], float | None]

# CPU seconds and peak MB on one thread of a 2.5 GHz Xeon, measured once with the authors' library
# under torch 2.2: sampling and evidence, all marginals, and the memory of each above the 360 MB of
# a process with torch and the data. None: stopped at 6 GB.
AUTHORS = {
    ("bus_breakdown", 15): (0.777, 3.605, 686, 730),
    ("bus_breakdown", 30): (21.737, None, 5972, None),
    ("chimpanzees", 10): (2.620, 15.778, 1589, 1551),
    ("chimpanzees", 15): (None, None, None, None),
    ("movielens", 30): (4.473, 12.706, 1722, 1708),
    ("occupancy", 10): (8.117, 58.031, 2411, 3107),
}
AUTHORS_BARE = 360


@dataclass(frozen=True)
class Setting:
    """How to measure."""

    device: str
    quick: bool
    picture: Path | None  # where to draw the costs

    @functools.cache  # noqa: B019  (one setting lives as long as the program)
    def case(self, name: str) -> Case:
        return load(name, self.device)

    def peaks(self, jobs: list[tuple[str, int, str]]) -> dict[tuple[str, int, str], Peak]:
        """Measure the memory of jobs: the name of a case, K, and a key of ``functions``."""
        command = [sys.executable, __file__, "--device", self.device, "--job"]
        return dict(zip(jobs, peaks(command, [{"job": job} for job in jobs]), strict=True))


def inference(case: Case, num_samples: int, memory_limit: int | None = None) -> MPImportance:
    return MPImportance(
        case.model,
        case.guide,
        num_samples,
        max_plate_nesting=case.max_plate_nesting,
        memory_limit=memory_limit,
    ).run(**case.data)


def functions(case: Case, num_samples: int) -> dict[str, Function]:
    """Return all that is measured of a case; each gives the error of the log evidence."""

    def evidence() -> float:
        return inference(case, num_samples).evidence().item() - case.truth

    def queries() -> float:
        posterior = inference(case, num_samples)
        posterior.moments()
        posterior.marginals()
        return posterior.evidence().item() - case.truth

    guide = config_enumerate(case.guide, "parallel", num_samples=num_samples)
    elbo = TraceTMC_ELBO(max_plate_nesting=case.max_plate_nesting)

    def tmc() -> float:
        return -elbo.loss(case.model, guide, **case.data) - case.truth

    def blocks() -> float:
        return inference(case, num_samples, 3 * GIB // 2).evidence().item() - case.truth

    return {"evidence": evidence, "queries": queries, "tmc": tmc, "blocks": blocks}


def floor(case: Case, num_samples: int) -> Function:
    """Return a function that evaluates every log_prob of the model once, in its dedicated dims."""
    calls: list[Callable[[], dict[str, SampleMessage]]] = []

    def recorded(programs: Programs, name: str, **kwargs: object) -> dict[str, SampleMessage]:
        if name == "model":
            calls.append(functools.partial(replay, programs, name, **kwargs))
        return replay(programs, name, **kwargs)

    factors.replay = recorded
    try:
        inference(case, num_samples)
    finally:
        factors.replay = replay

    def evaluate() -> None:
        with torch.no_grad(), pyro.validation_enabled(False):
            for site in calls[0]().values():
                site["fn"].log_prob(site["value"])

    return evaluate


def error(timing: Timing | Peak) -> str:
    return "-" if timing.value is None else f"{timing.value:+.3g}"


def ratio(a: float | None, b: float | None) -> float:
    return a / b if a is not None and b else math.nan


# --- 1. Pyro's own --------------------------------------------------------------------------


def against_tmc(setting: Setting) -> str:
    """Evidence against Pyro's TraceTMC_ELBO, with the same model, guide and K."""
    ks = {
        "bus_breakdown": (5, 10, 15, 30),
        "chimpanzees": (5, 8, 10, 15),
        "movielens": (5, 10, 15, 30),
        "occupancy": (5, 10),
        "eight_schools": (5, 10, 30),
        "chain-300": (5, 10, 30),
    }
    jobs = [(name, k) for name in ks for k in ks[name] if name not in TRUTHS or HAS_DATA]
    if setting.quick:
        jobs = [("eight_schools", 5), ("chain-20", 5)]
    memory = setting.peaks([(*job, what) for job in jobs for what in ("evidence", "tmc")])
    rows = []
    for name, k in jobs:
        peak = {what: memory[name, k, what] for what in ("evidence", "tmc")}
        runs = {what: f for what, f in functions(setting.case(name), k).items() if what in peak}
        feasible = {what: f for what, f in runs.items() if not peak[what].failure}
        times = interleaved(feasible)
        missing = Timing(math.nan, math.nan, None, 0)
        ours, theirs = (times.get(what, missing) for what in ("evidence", "tmc"))
        rows.append(
            [
                name,
                k,
                ours.seconds,
                peak["tmc"].failure or theirs.seconds,
                ratio(ours.seconds, theirs.seconds),
                peak["evidence"].mib,
                peak["tmc"].mib,
                ratio(peak["evidence"].mib, peak["tmc"].mib),
                error(ours),
                error(theirs),
            ]
        )
    header = "model,K,s,TMC s,ratio,MiB,TMC MiB,ratio,error,TMC error".split(",")
    return table(header, rows)


# --- 2. to 4.: the same runs, seen three ways -----------------------------------------------


@functools.cache
def standard_runs(setting: Setting) -> dict[tuple[str, int], dict[str, Timing]]:
    """Time the floor, evidence, all queries and 1,000 samples."""
    jobs = list(AUTHORS) if HAS_DATA else []
    jobs += [("eight_schools", 30), ("chain-300", 30)]
    if setting.quick:
        jobs = [("eight_schools", 5), ("hierarchy-1000", 5)]
    result = {}
    for name, k in jobs:
        case = setting.case(name)
        runs = functions(case, k)
        posterior = inference(case, k)
        result[name, k] = interleaved(
            {
                "floor": floor(case, k),
                "evidence": runs["evidence"],
                "queries": runs["queries"],
                "samples": lambda posterior=posterior: posterior.sample(1000) and None,
            },
            budget=4.0,
        )
    return result


def against_authors(setting: Setting) -> str:
    """Evidence, and evidence with all moments and marginals, against the authors' library."""
    runs = {job: times for job, times in standard_runs(setting).items() if job in AUTHORS}
    memory = setting.peaks([(*job, what) for job in runs for what in ("evidence", "queries")])
    rows = []
    for job, times in runs.items():
        for place_, what in enumerate(("evidence", "queries")):
            their_seconds, their_mib = AUTHORS[job][place_], AUTHORS[job][2 + place_]
            above = None if their_mib is None else their_mib - AUTHORS_BARE
            mine = times[what]
            rows.append(
                [
                    job[0],
                    job[1],
                    what,
                    mine.cpu_seconds,
                    their_seconds,
                    ratio(mine.cpu_seconds, their_seconds),
                    mine.cpu_seconds / times["floor"].cpu_seconds,
                    memory[(*job, what)].mib,
                    above,
                    ratio(memory[(*job, what)].mib, above),
                    error(mine),
                ]
            )
    header = "model,K,what,CPU s,authors' CPU s,ratio,x floor,MiB,authors' MB,ratio,error"
    return table(header.split(","), rows)


def against_floor(setting: Setting) -> str:
    """Evidence against evaluating every log_prob of the model once."""
    rows = []
    for job, t in standard_runs(setting).items():
        seconds = (t["floor"].seconds, t["evidence"].seconds)
        times = ratio_of(t, "evidence", "floor")
        rows.append([*job, *seconds, times, error(t["evidence"]), t["evidence"].runs])
    return table(["model", "K", "floor s", "evidence s", "ratio", "error", "runs"], rows)


def queries(setting: Setting) -> str:
    """All queries against evidence alone."""
    rows = []
    for job, t in standard_runs(setting).items():
        what = (("evidence", "queries"), ("evidence", "samples"))
        ratios = [ratio_of(t, other, alone) for alone, other in what]
        seconds = [t[name].seconds for name in ("evidence", "queries", "samples")]
        rows.append([*job, *seconds, *ratios, error(t["evidence"])])
    header = "model,K,evidence s,+ moments + marginals s,1000 samples s,ratio,samples' ratio,error"
    return table(header.split(","), rows)


def ratio_of(times: dict[str, Timing], a: str, b: str) -> float:
    return times[a].seconds / times[b].seconds


# --- 5. growth ------------------------------------------------------------------------------


def growth(setting: Setting) -> str:
    """Cost as K and the data grow; the slope expected is that of the largest factor."""
    fixed, sizes = 10, (10**3, 10**4, 10**5, 10**6)
    lines: dict[str, tuple[list[tuple[str, int]], float]] = {
        "hierarchy, 100,000 observations": ([("hierarchy-100000", k) for k in KS], 1.0),
    }
    if HAS_DATA:
        lines["bus_breakdown"] = ([("bus_breakdown", k) for k in KS[:4]], 3.0)
        lines["chimpanzees"] = ([("chimpanzees", k) for k in (4, 6, 8, 10, 12)], 5.0)
    by_data = "hierarchy, K = 10"
    lines[by_data] = ([(f"hierarchy-{size}", fixed) for size in sizes], 1.0)
    if setting.quick:
        lines = {by_data: ([(f"hierarchy-{size}", fixed) for size in sizes[:2]], 1.0)}
    rows, curves = [], {}
    for label, (jobs, slope) in lines.items():
        times = [
            interleaved(
                {"evidence": functions(setting.case(name), k)["evidence"]}, rounds=5, budget=1.5
            )["evidence"]
            for name, k in jobs
        ]
        by_k = label != by_data
        xs = [k if by_k else int(name.split("-")[1]) for name, k in jobs]
        ys = [t.seconds for t in times]
        curves[label] = (by_k, xs, ys, slope)
        last = math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])
        for x, t in zip(xs, times, strict=True):
            end = [last, slope] if x == xs[-1] else [None, None]
            rows.append([label, f"{x:,}", t.seconds, *end, error(t)])
    if setting.picture:
        draw(curves, setting.picture)
    return table(["model", "K or observations", "s", "last slope", "expected", "error"], rows)


KS = (5, 10, 20, 40, 80)


def draw(curves: dict[str, tuple[bool, list[int], list[float], float]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for label, (by_k, xs, ys, slope) in curves.items():
        axis = axes[0 if by_k else 1]
        (line,) = axis.loglog(xs, ys, "o-", label=label)
        expected = [ys[-1] * (x / xs[-1]) ** slope for x in xs]
        axis.loglog(xs, expected, ":", color=line.get_color(), label=f"slope {slope:g}")
    for axis, name in zip(axes, ("particles K", "observations"), strict=True):
        axis.set(xlabel=name, ylabel="seconds for the evidence")
        axis.set_ylim(bottom=min(min(ys) for _, _, ys, _ in curves.values()) / 2)
        axis.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


# --- 6. overhead ----------------------------------------------------------------------------


def overhead(setting: Setting) -> str:
    """A run on eight schools as a multiple of two plain traces."""
    case = setting.case("eight_schools")
    args, model = tuple(case.data.values()), eight_schools_model
    auto = AutoNormal(model, init_scale=1.0)
    auto(*args)

    def traces(guide: Callable[..., object]) -> None:
        guide_trace = poutine.trace(guide).get_trace(*args)
        poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)

    def run(guide: Callable[..., object] | None) -> float:
        posterior = MPImportance(model, guide, 30).run(*args)
        return posterior.evidence().item() - case.truth

    times = interleaved(
        {
            "AutoNormal traces": lambda: traces(auto),
            "AutoNormal": lambda: run(auto),
            "none traces": lambda: traces(model),  # the prior is the guide
            "none": lambda: run(None),
        },
        rounds=5 if setting.quick else 50,
    )
    rows = [
        [
            guide,
            1e3 * times[f"{guide} traces"].seconds,
            1e3 * times[guide].seconds,
            ratio_of(times, guide, f"{guide} traces"),
            error(times[guide]),
        ]
        for guide in ("AutoNormal", "none")
    ]
    return table(["guide", "two plain traces, ms", "run and evidence, ms", "ratio", "error"], rows)


# --- 7. many sites --------------------------------------------------------------------------


@contextmanager
def search_time() -> Iterator[list[float]]:
    """Collect the seconds spent in the search for an order of eliminations."""
    seconds: list[float] = []
    search = opt_einsum.contract_path

    def timed(*args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        try:
            return search(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begin)

    opt_einsum.contract_path = timed
    try:
        yield seconds
    finally:
        opt_einsum.contract_path = search


def many_sites(setting: Setting) -> str:
    """Loops over sites: chains with two globals, independent latents, latents in one plate."""
    k = 10
    names = ["steps-250", "steps-1000", "chain-1000", "loop-250", "loop-1000", "plated-200"]
    if setting.quick:
        names = ["steps-10", "steps-20", "loop-20", "plated-10"]
    memory = setting.peaks([(name, k, "evidence") for name in names])
    competitors = {name: functions(setting.case(name), k)["evidence"] for name in names}
    times = interleaved(competitors, rounds=5, budget=40.0)
    rows = []
    for name in names:
        with search_time() as seconds:
            begin = time.perf_counter()
            competitors[name]()
            share = sum(seconds) / (time.perf_counter() - begin)
        kind, size = name.split("-")
        before = [n for n in names if n.startswith(kind) and int(n.split("-")[1]) < int(size)]
        growth_ = ratio_of(times, name, before[0]) if before else None
        mib = memory[name, k, "evidence"].mib
        rows.append([name, times[name].seconds, growth_, f"{share:.1%}", mib, error(times[name])])
    return table(["model", "s", "x the smaller one", "order search", "MiB", "error"], rows)


# --- 8. kernel ------------------------------------------------------------------------------


def kernel(setting: Setting) -> str:
    """A matrix product in log space against exp, bmm, log."""
    batch, size = (5, 20) if setting.quick else (100, 100)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, batch, size, size, generator=generator).to(setting.device)
    slope = 100.0 * torch.arange(size, device=a.device)
    inputs = {
        "sd 1": (a, b),
        "sd 10": (10 * a, 10 * b),
        "sd 100": (100 * a, 100 * b),
        "sd 1000": (1000 * a, 1000 * b),
        "slopes of +-100 a particle": (a + slope, b - slope.unsqueeze(-1)),
    }

    def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(a.exp(), b.exp()).log()

    rows = []
    for label, (a, b) in inputs.items():
        truth = torch.stack(
            [
                (x.double().unsqueeze(-1) + y.double()).logsumexp(-2)
                for x, y in zip(a, b, strict=True)
            ]
        )
        times = interleaved(
            {
                "ours": lambda a=a, b=b: log_matmul(a, b) is None or None,
                "naive": lambda a=a, b=b: naive(a, b) is None or None,
            },
            rounds=20,
        )
        results = (log_matmul(a, b), naive(a, b))
        errors = [(result - truth).abs() / truth.abs().clamp(min=1) for result in results]
        wrong = (~(errors[1] < 1e-3)).double().mean().item()
        ms = [1e3 * times[name].seconds for name in ("ours", "naive")]
        rows.append([label, *ms, ms[1] / ms[0], f"{errors[0].max():.1e}", f"{wrong:.1%}"])
    header = "entries,log_matmul ms,exp-bmm-log ms,speed,relative error,exp-bmm-log wrong entries"
    return table(header.split(","), rows)


# --- 9. blocks ------------------------------------------------------------------------------


def blocks(setting: Setting) -> str:
    """A sum that does not fit into memory at once: chimpanzees, 1.5 GiB."""
    if setting.quick or not HAS_DATA:
        return "Not run: needs the chimpanzees data and a minute.\n"
    case, rows = setting.case("chimpanzees"), []
    command = [sys.executable, __file__, "--device", setting.device, "--job"]
    jobs = [{"job": ("chimpanzees", 20, "blocks")}]
    (peak,) = peaks(command, jobs, seconds=240.0)
    rows.append([20, "all", peak.failure or peak.seconds, peak.mib, error(peak)])
    seconds, count = one_block(case, 30, 3 * GIB // 2)
    rows.append([30, f"one of {count}, times {count}", seconds * count, None, "-"])
    return table(["K", "blocks", "s", "peak MiB", "error"], rows)


def one_block(case: Case, num_samples: int, memory_limit: int) -> tuple[float, int]:
    """Time a run of the first block alone; and say how many blocks there are."""
    split = package_blocks.split
    counts: list[int] = []

    def first(*args: object) -> object:
        ranges = split(*args)
        counts.append(len(ranges))
        return ranges[:1]

    package_blocks.split = first
    try:
        begin = time.perf_counter()
        inference(case, num_samples, memory_limit)
        return time.perf_counter() - begin, counts[0]
    finally:
        package_blocks.split = split


SECTIONS: dict[str, Callable[[Setting], str]] = {
    "tmc": against_tmc,
    "authors": against_authors,
    "floor": against_floor,
    "queries": queries,
    "growth": growth,
    "overhead": overhead,
    "sites": many_sites,
    "kernel": kernel,
    "blocks": blocks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes, under a minute")
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one section")
    parser.add_argument("--output", type=Path, help="docs/benchmarks.md for a whole run")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        torch.cuda.init()
    if arguments.job:
        name, num_samples, what = json.loads(arguments.job)["job"]
        function = functions(load(name, arguments.device), num_samples)[what]
        report_peak(function, 6 * GIB)
        return
    whole = not arguments.quick and not arguments.only
    output = arguments.output or (Path("docs/benchmarks.md") if whole else None)
    setting = Setting(
        arguments.device, arguments.quick, output.with_suffix(".png") if output else None
    )
    parts = [heading(setting)]
    print(parts[0])
    for number, (name, section) in enumerate(SECTIONS.items(), 1):
        if arguments.only in (None, name):
            begin = time.perf_counter()
            parts.append(f"## {number}. {(section.__doc__ or '').strip()}\n\n{section(setting)}")
            print(f"{parts[-1]}\n({time.perf_counter() - begin:.0f} s)\n", flush=True)
    if output:
        output.write_text("\n".join(parts))


def heading(setting: Setting) -> str:
    cpu = platform.processor() or platform.machine()
    names = Path("/proc/cpuinfo")
    if names.exists():
        lines = [line for line in names.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    where = torch.cuda.get_device_name() if setting.device == "cuda" else f"{cpu}, one thread"
    return f"""# Benchmarks

`python benchmarks/speed.py`, on {where}; torch {torch.__version__}, Pyro {pyro.__version__}.

Seconds are medians of interleaved runs in one process. MiB are the peak of a process of its own,
above the same process with everything imported and the data loaded. Errors are those of the log
evidence, medians over runs: negative, since the logarithm of an unbiased estimate is biased low.
"""


if __name__ == "__main__":
    main()
