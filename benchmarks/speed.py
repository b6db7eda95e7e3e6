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
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import opt_einsum
import pyro
import torch
from _cases import HAS_DATA, TRUTHS, Case, eight_schools_model, load
from _competitors import floor, functions, one_block, samples
from _measure import GIB, Peak, Timing, interleaved, peaks, processor, report_peak, table
from _workers import sent, timed
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_mpis import MPImportance
from pyro_mpis.factor_graph import evidence
from pyro_mpis.factor_graph.logspace import log_matmul

Job = tuple[str, int, str]  # the name of a case, K, a key of ``functions``
NOT_TIMED = Timing(math.nan, math.nan, None, 0)
PROCESS_LIMIT = 6 * GIB

# CPU seconds and peak MB on one thread of a 2.5 GHz Xeon, measured once with the authors' library
# under torch 2.2: sampling and evidence, all marginals, the peaks of both; a process without a
# problem has 360 MB. None: stopped at 6,144 MB.
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

    def peaks(
        self, jobs: Iterable[Job], *, seconds: float = 60.0, workers: int = 2
    ) -> dict[Job, Peak]:
        """Run jobs in processes of their own, for their memory and to see whether they can."""
        jobs = list(jobs)
        command = [sys.executable, __file__, "--device", self.device, "--job"]
        found = peaks(command, [{"job": job} for job in jobs], seconds=seconds, workers=workers)
        return dict(zip(jobs, found, strict=True))


def error(measured: Timing | Peak) -> str:
    return "-" if measured.value is None else f"{measured.value:+.3g}"


def ratio(a: float | None, b: float | None) -> float:
    return a / b if a is not None and b else math.nan


def ratio_of(times: dict[str, Timing], a: str, b: str) -> float:
    return times[a].seconds / times[b].seconds


def against_tmc(setting: Setting) -> str:
    """
    Evidence against Pyro's TraceTMC_ELBO

    The same model, guide and K. Up to some 30 MiB, memory is what libraries take when they are
    first used. Up to some 20 ms, time is that of the plain runs and the checks, which TMC does not
    have (section 6). A chain has many sites, so its plain runs and checks take longer.
    """
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
    both = ("evidence", "tmc")
    memory = setting.peaks((*job, what) for job in jobs for what in both)
    rows = []
    for name, k in jobs:
        peak = [memory[name, k, what] for what in both]
        runs = functions(setting.case(name), k)
        possible = [what for what in both if not memory[name, k, what].failure]
        times = interleaved({what: runs[what] for what in possible})
        t = [times.get(what, NOT_TIMED) for what in both]
        seconds = [p.failure or timing.seconds for p, timing in zip(peak, t, strict=True)]
        mib = [p.mib for p in peak]
        row = [name, k, *seconds, t[0].seconds / t[1].seconds, *mib, mib[0] / mib[1]]
        rows.append([*row, error(t[0]), error(t[1])])
    return table("model,K,s,TMC s,ratio,MiB,TMC MiB,ratio,error,TMC error", rows)


# --- three sections of the same runs --------------------------------------------------------

QUERIES = ("evidence", "queries")


@functools.cache
def standard_runs(
    setting: Setting,
) -> tuple[dict[tuple[str, int], dict[str, Timing]], dict[Job, Peak]]:
    """Time the floor, evidence, all queries and 1,000 samples, each where it fits into memory."""
    jobs = list(AUTHORS) if HAS_DATA else []
    jobs += [("eight_schools", 30), ("chain-300", 30)]
    if setting.quick:
        jobs = [("eight_schools", 5), ("hierarchy-1000", 5)]
    memory = setting.peaks((*job, what) for job in jobs for what in QUERIES)
    result = {}
    for name, k in jobs:
        case = setting.case(name)
        runs = functions(case, k)
        competitors = {what: runs[what] for what in QUERIES if not memory[name, k, what].failure}
        if "evidence" in competitors:
            competitors |= {"samples": samples(case, k), "floor": floor(case, k)}
        times = interleaved(competitors, budget=4.0)
        names = (*QUERIES, "samples", "floor")
        result[name, k] = {what: times.get(what, NOT_TIMED) for what in names}
    return result, memory


def against_authors(setting: Setting) -> str:
    """
    Evidence, and all queries, against the authors' library

    Queries are the evidence and all moments and marginals. The authors' figure is for all marginals
    alone, on one thread of a 2.5 GHz Xeon. Memory is what comes on top of the bare process.
    """
    runs, memory = standard_runs(setting)
    rows = []
    for job, figures in AUTHORS.items():
        for number, what in enumerate(QUERIES if job in runs else ()):
            theirs, their_peak = figures[number], figures[2 + number]
            above = their_peak and their_peak - AUTHORS_BARE
            ours, peak = runs[job][what], memory[(*job, what)]
            row = [*job, what, peak.failure or ours.cpu_seconds, theirs]
            row += [ratio(ours.cpu_seconds, theirs)]
            row += [ours.cpu_seconds / runs[job]["floor"].cpu_seconds]
            rows.append([*row, peak.mib, above, ratio(peak.mib, above), error(ours)])
    header = "model,K,what,CPU s,authors' CPU s,ratio,x floor,MiB,authors' MB,ratio,error"
    return table(header, rows)


def against_floor(setting: Setting) -> str:
    """
    Evidence against the floor

    The floor is to evaluate every log_prob of the model once, with each site's particles in a dim
    of their own. An evaluation in pieces that fit into the cache can be faster. Where the ratio is
    high, the contraction (bus, occupancy) or the overhead of a run (eight schools, the chain) takes
    longer than the log_probs.
    """
    rows = []
    for job, t in standard_runs(setting)[0].items():
        seconds = (t["floor"].seconds, t["evidence"].seconds)
        times = ratio_of(t, "evidence", "floor")
        entries = f"{t['floor'].value or 0:,.0f}"
        rows.append([*job, entries, *seconds, times, error(t["evidence"]), t["evidence"].runs])
    return table("model,K,entries of the largest,floor s,evidence s,ratio,error,runs", rows)


def queries(setting: Setting) -> str:
    """
    All queries against evidence alone

    Queries are the evidence and all moments and marginals, with the run. The time of 1,000 samples
    is without the run.
    """
    rows = []
    for job, t in standard_runs(setting)[0].items():
        seconds = [t[name].seconds for name in (*QUERIES, "samples")]
        ratios = [ratio_of(t, what, "evidence") for what in ("queries", "samples")]
        rows.append([*job, *seconds, *ratios, error(t["evidence"])])
    header = (
        "model,K,evidence s,queries s,1000 samples s,queries / evidence,samples / evidence,error"
    )
    return table(header, rows)


# --------------------------------------------------------------------------------------------


def growth(setting: Setting) -> str:
    """
    Cost as K and the data grow

    The time of the evidence. When the largest tensor is large, time should grow as this tensor
    does: in proportion to the number of observations, and as K to the power of the number of
    latents that it has dims for. For bus_breakdown the largest tensor is not a factor. It arises in
    the sum, and has dims for two pairs of latents.
    """
    lines = {"hierarchy, 100,000 observations": (1, "hierarchy-100000", (5, 10, 20, 40, 80))}
    if HAS_DATA:
        lines["bus_breakdown"] = (4, "bus_breakdown", (5, 10, 20, 40))
        lines["chimpanzees"] = (5, "chimpanzees", (4, 6, 8, 10, 12))
    sizes = (10**3, 10**4, 10**5, 10**6)
    jobs = {label: [(name, k) for k in ks] for label, (_, name, ks) in lines.items()}
    by_data = "hierarchy, K = 10"
    jobs[by_data] = [(f"hierarchy-{size}", 10) for size in sizes]
    if setting.quick:
        lines = {"hierarchy, 1,000 observations": (1, "", ())}
        jobs = {next(iter(lines)): [("hierarchy-1000", 5), ("hierarchy-1000", 10)]} | {
            by_data: jobs[by_data][:2]
        }
    memory = setting.peaks((*job, "evidence") for own in jobs.values() for job in own)
    rows, curves = [], []
    for label, own in jobs.items():
        slope = lines[label][0] if label in lines else 1
        xs: list[int] = []
        ys: list[float] = []
        for name, k in own:
            x = k if label in lines else int(name.split("-")[1])
            peak = memory[name, k, "evidence"]
            if peak.failure:
                rows.append([label, f"{x:,}", peak.failure, *[None] * 4])
                continue
            runs = {"evidence": functions(setting.case(name), k)["evidence"]}
            timing = interleaved(runs, rounds=5, budget=1.5)["evidence"]
            xs.append(x)
            ys.append(timing.seconds)
            here = math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2]) if len(xs) > 1 else None
            rows.append([label, f"{x:,}", ys[-1], here, slope, peak.mib, error(timing)])
        curves.append((label, label in lines, xs, ys, slope))
    text = table("model,K or observations,s,slope,expected,MiB,error", rows)
    if setting.picture:
        draw(curves, setting.picture)
        name = setting.picture.name
        text += f"\n[![seconds against K and observations]({name})]({name})\n"
    return text


def draw(
    curves: Sequence[tuple[str, bool, list[int], list[float], int]],
    picture: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for label, by_k, xs, ys, slope in curves:
        axis = axes[0 if by_k else 1]
        (line,) = axis.loglog(xs, ys, "o-", label=label)
        expected = [ys[-1] * (x / xs[-1]) ** slope for x in xs]
        axis.loglog(xs, expected, ":", color=line.get_color(), label=f"slope {slope}")
    lowest = min(y for _, _, _, ys, _ in curves for y in ys)
    for axis, name in zip(axes, ("particles K", "observations"), strict=True):
        axis.set(xlabel=name, ylabel="seconds for the evidence")
        axis.set_ylim(bottom=lowest / 3)
        axis.xaxis.set_minor_formatter("")
        axis.legend(fontsize=8)
    axes[0].set_xticks((5, 10, 20, 40, 80), ("5", "10", "20", "40", "80"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def overhead(setting: Setting) -> str:
    """
    Overhead of a run

    Eight schools, K = 30, beside one plain trace of the guide and one of the model (without a
    guide, two of the model). A run executes the programs three times: plainly, for the draws, and
    for the factors. The check of plates is evaluated together with the factors.
    """
    case = setting.case("eight_schools")
    args, model = tuple(case.data.values()), eight_schools_model
    auto = AutoNormal(model, init_scale=1.0)
    auto(*args)

    def traces(guide: Callable[..., object]) -> None:
        guide_trace = poutine.trace(guide).get_trace(*args)
        poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)

    def run(guide: Callable[..., object] | None) -> float:
        return MPImportance(model, guide, 30).run(*args).evidence().item() - case.truth

    def with_validation(is_on: bool, job: Callable[[], float | None]) -> float | None:
        with pyro.validation_enabled(is_on):
            return job()

    guides = {"AutoNormal": (auto, auto), "none": (model, None)}  # the prior is the guide
    competitors = {}
    for name, (traced, guide) in guides.items():
        for is_on in (True, False):
            key = f"{name}, {'on' if is_on else 'off'}"
            competitors[f"{key} traces"] = functools.partial(
                with_validation, is_on, functools.partial(traces, traced)
            )
            competitors[key] = functools.partial(
                with_validation, is_on, functools.partial(run, guide)
            )
    times = interleaved(competitors, rounds=5 if setting.quick else 50)
    rows = []
    for key in competitors:
        if not key.endswith("traces"):
            ms = [1e3 * times[name].seconds for name in (f"{key} traces", key)]
            rows.append([*key.split(", "), *ms, ms[1] / ms[0], error(times[key])])
    return table("guide,validation,two plain traces (ms),run and evidence (ms),ratio,error", rows)


@contextmanager
def seconds_of_calls(module: ModuleType, name: str) -> Iterator[list[float]]:
    """Collect the seconds spent in each call of a module's function."""
    seconds: list[float] = []
    function = getattr(module, name)

    def timed(*args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begin)

    with mock.patch.object(module, name, timed):
        yield seconds


def many_sites(setting: Setting) -> str:
    """
    Many sites

    K = 10. ``steps`` is a chain with two globals, without ``pyro.markov``. ``chain`` has
    ``pyro.markov`` and no globals. ``loop`` has independent latents, and ``plated`` has latents
    under one plate of ten. Steps are the batched operations of the contraction, of some kernel
    launches each. A chain takes about the logarithm of its length. A chain with two globals does so
    only up to K = 9 (K = 26 on a GPU), because larger tensors are not worth it.
    """
    k = 10
    names = [
        "steps-250",
        "steps-1000",
        "chain-250",
        "chain-1000",
        "loop-250",
        "loop-1000",
        "plated-200",
    ]
    if setting.quick:
        names = ["steps-10", "steps-20", "loop-20", "plated-10"]
    memory = setting.peaks((name, k, "evidence") for name in names)
    competitors = {name: functions(setting.case(name), k)["evidence"] for name in names}
    times = interleaved(competitors, rounds=5, budget=30.0)
    rows = []
    for name in names:
        shares = []
        for _ in range(3):
            with seconds_of_calls(opt_einsum, "contract_path") as seconds:
                begin = time.perf_counter()
                competitors[name]()
                shares.append(sum(seconds) / (time.perf_counter() - begin))
        share = statistics.median(shares)
        with seconds_of_calls(evidence, "sum_product") as steps:
            competitors[name]()
        before = next(n for n in names if n.split("-")[0] == name.split("-")[0])
        times_ = ratio_of(times, name, before) if before != name else None
        mib = memory[name, k, "evidence"].mib
        seconds_, order = times[name].seconds, f"{share:.1%}"
        rows.append([name, seconds_, times_, order, len(steps), mib, error(times[name])])
    columns = "model,s,x the smaller one,share of the order's search,steps,MiB,error"
    return table(columns, rows)


def kernel(setting: Setting) -> str:
    """
    Matrix products in log space

    100 products of 100 by 100 in float32, beside the naive way (``exp``, ``bmm``, ``log``). Errors
    are relative to float64. An entry that is off by more than 1e-3 counts as wrong.
    """
    batch, size = (5, 20) if setting.quick else (100, 100)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, batch, size, size, generator=generator).to(setting.device)
    slope = 100.0 * torch.arange(size, device=a.device)
    inputs = {f"sd {sd}": (sd * a, sd * b) for sd in (1, 10, 100, 1000)}
    inputs["slopes of +-100 a particle"] = (a + slope, b - slope.unsqueeze(-1))

    def naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(a.exp(), b.exp()).log()

    kernels = {"ours": log_matmul, "naive": naive}
    rows = []
    for label, (a, b) in inputs.items():
        competitors = {
            name: lambda kernel=kernel, a=a, b=b: kernel(a, b) is None or None
            for name, kernel in kernels.items()
        }
        times = interleaved(competitors, rounds=20)
        pairs = zip(a.double(), b.double(), strict=True)
        truth = torch.stack([(x.unsqueeze(-1) + y).logsumexp(-2) for x, y in pairs])
        errors = [
            (kernel(a, b) - truth).abs() / truth.abs().clamp(min=1) for kernel in kernels.values()
        ]
        wrong = (~(errors[1] < 1e-3)).double().mean().item()  # nan is wrong too
        ms = [1e3 * times[name].seconds for name in kernels]
        rows.append([label, *ms, ms[1] / ms[0], f"{errors[0].max():.1e}", f"{wrong:.1%}"])
    return table("entries,log_matmul ms,naive ms,speed,largest error,naive wrong", rows)


def blocks(setting: Setting) -> str:
    """
    A sum in blocks

    The chimpanzees with ``memory_limit`` 1.5 GiB. The time at K = 30 is extrapolated.
    """
    if setting.quick or not HAS_DATA:
        return "Not run: needs the chimpanzees data and a minute.\n"
    (peak,) = setting.peaks([("chimpanzees", 20, "blocks")], seconds=240.0).values()
    rows = [[20, "all", peak.failure or peak.seconds, peak.mib, error(peak)]]
    seconds, count = one_block(setting.case("chimpanzees"), 30)
    rows.append([30, f"one of {count} times {count}", seconds * count, None, "-"])
    return table("K,blocks,s,MiB,error", rows)


def workers(setting: Setting) -> str:
    """
    Blocks in many processes

    The chimpanzees at K = 18 in 8 blocks, on a machine of two cores. A first run includes what
    processes need to start: in Dask less, as its workers import the package before. Below, at
    K = 10 in more blocks: what is sent to more workers, counted by its pickle. A task holds the
    programs, the data and the particles once, and a worker's share of the blocks.
    """
    if setting.quick or setting.device != "cpu" or not HAS_DATA:
        return "Not run: needs the chimpanzees data, processors and a minute.\n"
    case = setting.case("chimpanzees")
    rows = timed(case)
    (_, *alone), *_ = rows
    times = [(*row, *(one / two for one, two in zip(alone, row[1:], strict=True))) for row in rows]
    header = "in,first run s,second s,moments s,times one process: first,second,moments"
    counts = [(number, *row) for number in (1, 4, 16) for row in sent(case, number)]
    return table(header, times) + "\n" + table("workers,what,tasks,KB sent to each,KB back", counts)


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
    "workers": workers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes, under a minute")
    parser.add_argument("--only", choices=tuple(SECTIONS), help="one section")
    parser.add_argument("--output", type=Path, help="docs/speed.md for a whole run")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        torch.cuda.init()
    if arguments.job:
        name, num_samples, what = json.loads(arguments.job)["job"]
        function = functions(load(name, arguments.device), num_samples)[what]
        report_peak(function, PROCESS_LIMIT)
        return
    output = arguments.output
    if output is None and not arguments.quick and not arguments.only:
        output = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
    picture = output.with_suffix(".png") if output else None
    setting = Setting(arguments.device, arguments.quick, picture)
    parts = [heading(setting)]
    print(parts[0])
    for number, (name, section) in enumerate(SECTIONS.items(), 1):
        if arguments.only in (None, name):
            begin = time.perf_counter()
            title, _, note = inspect.cleandoc(section.__doc__ or "").partition("\n\n")
            parts.append(f"## {number}. {title}\n\n{note}\n\n{section(setting)}")
            print(f"{parts[-1]}\n({time.perf_counter() - begin:.0f} s)\n", flush=True)
    if output:
        output.write_text("\n".join(parts))


def heading(setting: Setting) -> str:
    where = processor(setting.device)
    if setting.device != "cuda":
        where = f"one thread of {where}"
    return f"""# Speed and memory, for reviewers

How long to an answer of a given error is on [another page](benchmarks.md). Here the estimators have
the same proposal, mostly the prior, and are compared by what they cost. **The errors are those of
the prior as a proposal**: with it, the log evidence of a model of some size is hundreds of nats too
low, whichever estimator is used. After `adapt` they are a few tenths of a nat.

`python benchmarks/speed.py` on {where}; torch {torch.__version__}, Pyro {pyro.__version__}.

Seconds are medians of interleaved runs in one process. MiB are the peak of a process of its own,
on top of the same process with everything imported and the data loaded. A *ratio* is this package's
number over the other's: below 1 it takes less. *Error* is that of the log evidence, in nats, the
median over runs; nearer to 0 is better. Errors are mostly negative, because the logarithm of an
unbiased estimate is biased low, and get smaller as K grows. A dash: not measured.
"""


if __name__ == "__main__":
    main()
