# SPDX-License-Identifier: Apache-2.0
"""
A learned proposal beside Pyro's own inference, from cold: accuracy against CPU seconds.

    python benchmarks/adapt.py [--models NAMES] [--methods NAMES] [--seeds 0-9] [--output FOLDER]

Every cell (a model, a method, a seed) runs in a process of its own, on one thread; imports and
loading are not counted. Finished cells are kept in FOLDER/results.jsonl: called again, the program
runs those that are missing. It writes FOLDER/adapt.md, a table, and FOLDER/adapt.png.

The paper's models need their data, in the folder that ``PYRO_MPIS_DATA`` names. Errors of their
moments need long runs of NUTS, files ``MODEL.json`` in the folder that ``PYRO_MPIS_REFERENCE``
names: ``{"latents": {site: {"mean": ..., "sd": ...}}}``. Eight schools and radon have exact answers
by quadrature.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyro
import torch
from _learners import METHODS
from _learning import PROBLEMS, SECONDS
from _measure import processor, table

Cell = tuple[str, str, int]  # model, method, seed
Found = dict[Cell, list[dict[str, object]]]

# What is asked for: of the log evidence in nats, of means in posterior sds, of sds as a share.
GOALS = {
    "eight_schools": (0.02, 0.02, 0.15),
    "radon": (0.12, 0.05, 0.15),
    "chimpanzees": (0.3, 0.065, 0.15),
    "bus_breakdown": (0.4, 0.1, 0.15),
    "movielens": (0.2, 0.07, 0.15),
    "occupancy": (1.0, 0.15, 0.35),
}
LEFT_OUT = {
    ("occupancy", "AutoMultivariateNormal, Trace_ELBO"): "as AutoNormal: hundreds of nats off",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.cell:
        _measured(json.loads(options.cell))
        return
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    found = _read(path)
    for seed in _numbers(options.seeds):
        for model in options.models or PROBLEMS:
            for method in options.methods or METHODS:
                cell = model, method, seed
                if cell in found or (model, method) in LEFT_OUT:
                    continue
                rows = _run(cell)
                line = {"model": model, "method": method, "seed": seed, "rows": rows}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                found[cell] = rows
                print(model, method, seed, *rows, sep="\n  ", flush=True)
    (folder / "adapt.md").write_text(report(found))
    draw(found, folder / "adapt.png")
    print(report(found))


def _run(cell: Cell) -> list[dict[str, object]]:
    """Measure a cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1][:200]
        return [{"note": f"failed: {last}"}]
    rows: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _measured(cell: Cell) -> None:
    model, method, seed = cell
    torch.set_num_threads(1)
    problem = PROBLEMS[model]()
    _import_all()
    pyro.set_rng_seed(seed)
    print(json.dumps([vars(row) for row in METHODS[method](problem, problem.seconds)]))


def _import_all() -> None:
    """Have torch import what it first imports when it is used: seconds that are not counted."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    torch.optim.Adam([parameter]).step()
    torch.vmap(torch.exp)(torch.zeros(2))
    torch.jit.trace(torch.exp, torch.zeros(2))


def _read(path: Path) -> Found:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["model"], line["method"], line["seed"]): line["rows"] for line in lines}


def _numbers(text: str) -> list[int]:
    """Read ``0-2,5`` as 0, 1, 2, 5."""
    result: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result


# --- what is written


def report(found: Found) -> str:
    """Return two tables: this package's seeds one by one, and all methods."""
    own: list[list[object]] = []
    for (model, method, seed), rows in sorted(found.items(), key=lambda item: _order(item[0])):
        if method == "adapt":
            for row in rows:
                own.append([model, seed, *_figures(row), _verdict(model, row), row["note"]])
    rates = [_rate(model, found) for model in GOALS]
    others: list[list[object]] = []
    for model in PROBLEMS:
        for method in METHODS:
            others += _summary(model, method, found)
    head = (
        f"`python benchmarks/adapt.py` on one thread of {processor('cpu')}; torch "
        f"{torch.__version__}, Pyro {pyro.__version__}, Python {platform.python_version()}.\n"
        "CPU seconds from cold, imports left out. Evidence: estimate minus truth, nats. Means: "
        "errors in posterior sds; sds: errors as a share; the means over elements of latents "
        "outside of plates and of those in plates, half each.\n\n"
    )
    return (
        head
        + "## How often the goals are met\n\n"
        + table("model,seeds,seconds,evidence,means,sds,within 3 standard errors,all", rates)
        + "\n## All methods, medians over seeds\n\n"
        + table("model,method,seeds,CPU s,evidence,means,sds,note", others)
        + "\n## Each seed\n\n"
        + table("model,seed,CPU s,evidence,reported error,means,sds,misses,note", own)
    )


def _order(cell: Cell) -> tuple[int, int, int]:
    model, method, seed = cell
    return list(PROBLEMS).index(model), list(METHODS).index(method), seed


def _figures(row: dict[str, object]) -> list[object]:
    return [row.get(key) for key in ("seconds", "evidence", "error", "means", "sds")]


def _misses(model: str, row: dict[str, object]) -> dict[str, bool]:
    """Say which goals a run misses."""
    if "seconds" not in row:
        return dict.fromkeys(("seconds", "evidence", "means", "sds", "error"), True)
    evidence, means, sds = GOALS[model]
    off = abs(float(row["evidence"]))  # type: ignore[arg-type]
    return {
        "seconds": float(row["seconds"]) > SECONDS[model],  # type: ignore[arg-type]
        "evidence": off > evidence,
        "means": float(row["means"]) > means,  # type: ignore[arg-type]
        "sds": float(row["sds"]) > sds,  # type: ignore[arg-type]
        "error": off > 3 * float(row["error"]),  # type: ignore[arg-type]
    }


def _verdict(model: str, row: dict[str, object]) -> str:
    return " ".join(name for name, missed in _misses(model, row).items() if missed) or "none"


def _rate(model: str, found: Found) -> list[object]:
    """Count the seeds that meet each goal."""
    cells = [rows[0] for (m, method, _), rows in found.items() if m == model and method == "adapt"]
    missed = [_misses(model, row) for row in cells]
    number = len(cells)
    goals = ("seconds", "evidence", "means", "sds", "error")
    counts = [f"{sum(not m[goal] for m in missed)}/{number}" for goal in goals]
    in_all = sum(not any(m[g] for g in goals if g != "error") for m in missed)
    return [model, number, *counts, f"{in_all}/{number}"]


def _summary(model: str, method: str, found: Found) -> list[list[object]]:
    """Return medians over seeds of each row of a method."""
    if (model, method) in LEFT_OUT:
        return [[model, method, 0, None, None, None, None, f"left out: {LEFT_OUT[model, method]}"]]
    cells = [rows for (m, other, _), rows in found.items() if (m, other) == (model, method)]
    result: list[list[object]] = []
    for number in range(max((len(rows) for rows in cells), default=0)):
        rows = [cell[number] for cell in cells if number < len(cell)]
        note = str(rows[0].get("note", ""))
        keys = ("seconds", "evidence", "means", "sds")
        figures = [_median(row.get(key) for row in rows) for key in keys]
        note = "" if method == "adapt" else note
        result.append([model, method, len(rows), *figures, note])
    return result


def _median(values: Iterable[object]) -> float | None:
    given = [float(v) for v in values if v is not None]  # type: ignore[arg-type]
    given = [value for value in given if not math.isnan(value)]
    return statistics.median(given) if given else None


def draw(found: Found, path: Path) -> None:
    """Draw errors of the log evidence and of means against CPU seconds, a column a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"evidence": "error of log evidence, nats", "means": "error of means, sds"}
    figure, axes = plt.subplots(2, len(PROBLEMS), figsize=(3 * len(PROBLEMS), 6), squeeze=False)
    for column, model in enumerate(PROBLEMS):
        goals = dict(zip(titles, GOALS[model][:2], strict=True))
        for row, (key, title) in enumerate(titles.items()):
            axis = axes[row][column]
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.axhline(goals[key], color="0.7", lw=1, ls=":")
            for number, method in enumerate(METHODS):
                points = _points(found, model, method, key)
                marker = "o" if method == "adapt" else "x"
                if points:
                    axis.plot(*zip(*points, strict=True), marker, color=f"C{number}", label=method)
            if row == 0:
                axis.set_title(model)
            if column == 0:
                axis.set_ylabel(title)
            if row == 1:
                axis.set_xlabel("CPU seconds")
    shown = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=80)


def _points(found: Found, model: str, method: str, key: str) -> list[tuple[float, float]]:
    """Return CPU seconds and sizes of an error, of the best that a method offers."""
    result = []
    for (m, other, _), rows in found.items():
        if (m, other) == (model, method):
            kept = rows if method in ("adapt", "NUTS") else rows[-1:]
            for row in kept:
                value = row.get(key)
                if value is not None and not math.isnan(float(value)):  # type: ignore[arg-type]
                    seconds = float(row["seconds"])  # type: ignore[arg-type]
                    result.append((seconds, max(abs(float(value)), 1e-4)))  # type: ignore[arg-type]
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", default="0-2", help="as 0-9 or 0,3")
    parser.add_argument("--output", default="output/adapt")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
