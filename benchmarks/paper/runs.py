# SPDX-License-Identifier: Apache-2.0
"""Which cells there are to run, and the file that keeps the finished ones."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from pyro_mpis import MPISWarning

from . import intended, published
from .experiment import Experiment
from .methods import CHOSEN, GROUPS, ITERATIVE, Cell, Point, mean_and_error, run
from .sources import Unavailable

AUTHORS = json.loads(Path(__file__).with_name("authors.json").read_text())


@dataclass(frozen=True)
class Size:
    """
    How much to run.

    Numbers of samples are by experiment, those of ``""`` for the others. The first seed of each
    number of samples runs twice, to warm up.
    """

    ks: Mapping[str, Sequence[int]]  # of massively parallel importance sampling
    global_ks: Mapping[str, Sequence[int]]
    seeds: int
    global_seeds: int
    iterations: int
    iterative_seeds: int
    adapt_seeds: int
    learning_rates: Sequence[float] | None  # None: the one that the authors chose
    costly_seeds: int  # of global importance sampling with ``COSTLY`` samples or more

    def with_seeds(self, seeds: int) -> Size:
        """Return the same with another number of seeds everywhere."""
        return replace(
            self,
            seeds=seeds,
            global_seeds=seeds,
            iterative_seeds=seeds,
            adapt_seeds=seeds,
            costly_seeds=seeds,
        )


COSTLY = 10**5
SIZES = {
    "quick": Size(
        ks={"": (3,)},
        global_ks={"": (3, 30)},
        seeds=2,
        global_seeds=2,
        iterations=8,
        iterative_seeds=1,
        adapt_seeds=0,
        learning_rates=None,
        costly_seeds=1,
    ),
    "default": Size(
        ks={"": (1, 3, 5, 10), "chimpanzees, grouped": (3, 5, 10, 20)},
        global_ks={
            "": (1, 3, 10, 100, 1000),
            "bus_breakdown": (1, 3, 10, 100, 1000, 10_000),
            "chimpanzees": (1, 3, 10, 100, 1000, 10_000, 10**6),
        },
        seeds=30,
        global_seeds=10,
        iterations=100,
        iterative_seeds=5,
        adapt_seeds=5,
        learning_rates=None,
        costly_seeds=3,
    ),
    "full": Size(
        ks={
            "bus_breakdown": (1, 3, 5, 10, 15, 20, 25, 30, 45),
            "chimpanzees": (1, 3, 5, 10, 15, 20),
            "chimpanzees, grouped": (3, 5, 10, 20, 30, 40),
            "occupancy": (1, 3, 5, 10, 15),
            "": (1, 3, 5, 10, 15, 20, 30, 45, 60, 80, 100),
        },
        global_ks={
            "": (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 10**5, 10**6),
            "occupancy": (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000),
        },
        seeds=100,
        global_seeds=100,
        iterations=250,
        iterative_seeds=100,
        adapt_seeds=10,
        learning_rates=(0.3, 0.1, 0.03, 0.01),
        costly_seeds=100,
    ),
}


def plan(experiment: Experiment, variant: str, size: Size, methods: Sequence[str]) -> list[Cell]:
    """List the cells of an experiment in the order to run them."""
    name = experiment.name
    key = name.removesuffix("_summed")
    cells = []
    for method in methods:
        if method in ITERATIVE:
            cells += _iterative(experiment, variant, size, method)
            continue
        if method == "adapt":
            seeds = 0 if name != key else size.adapt_seeds  # it sums presence by itself
            cells += [Cell(variant, name, method, CHOSEN, seed) for seed in range(seeds)]
            continue
        if method == "mpis_grouped" and name not in GROUPS:
            continue
        if method == "mpis_even" and name != key:
            continue
        ks = size.global_ks if method == "global" else size.ks
        for k in ks.get(f"{key}, grouped" if method == "mpis_grouped" else key, ks[""]):
            seeds = size.global_seeds if method == "global" else size.seeds
            if k >= COSTLY:
                seeds = size.costly_seeds
            cells += [Cell(variant, name, method, k, seed) for seed in range(seeds)]
    return cells


def _iterative(experiment: Experiment, variant: str, size: Size, method: str) -> list[Cell]:
    """List runs of an iterative method, where the authors have run it."""
    theirs = AUTHORS.get(experiment.name.removesuffix("_100k"), {}).get(method)
    if theirs is None:
        return []
    return [
        Cell(variant, experiment.name, method, theirs["K"], seed, lr, size.iterations)
        for lr in size.learning_rates or (theirs["lr"],)
        for seed in range(size.iterative_seeds)
    ]


@dataclass(frozen=True)
class Result:
    """A finished cell, or one that failed, which is not run again either."""

    cell: Cell
    points: tuple[Point, ...]
    error: str = ""


class Store:
    """A file with one line of JSON for each finished cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[Cell, Result]:
        """Read all finished cells; the last line may have been cut off by an interruption."""
        results = {}
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.split("\n")[:-1]:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            cell = Cell(**entry["cell"])
            points = tuple(Point(**point) for point in entry["points"])
            results[cell] = Result(cell, points, entry["error"])
        return results

    def add(self, result: Result) -> None:
        """Append a finished cell, on a line of its own even if the one before was cut off."""
        start = ""
        if self.path.exists():
            text = self.path.read_text()
            start = "" if not text or text.endswith("\n") else "\n"
        with self.path.open("a") as file:
            file.write(f"{start}{json.dumps(asdict(result))}\n")


def load(
    variants: Sequence[str], names: Sequence[str], *, download: bool, device: str
) -> Iterator[tuple[str, Experiment]]:
    """Load the experiments that there are data for, and say which are left out and why."""
    for variant in variants:
        module = {"published": published, "intended": intended}[variant]
        for name in names:
            if name not in module.NAMES:
                continue
            try:
                if variant == "published":
                    experiment = published.load(name)
                else:
                    experiment = intended.load(name, download=download)
            except (Unavailable, FileNotFoundError) as error:
                print(f"{variant} {name}: left out. {error}")
                continue
            yield variant, experiment.to(device)


def run_cells(
    experiment: Experiment, cells: Sequence[Cell], store: Store, memory_limit: int
) -> None:
    """Run the cells that are not finished, and print one line for each set of seeds."""
    finished = store.read()
    bar = tqdm(total=len(cells), disable=None, leave=False)
    for label, of_label in _by_label(cells).items():
        bar.set_description(label)
        todo = [cell for cell in of_label if cell not in finished]
        begin = time.perf_counter()
        for number, cell in enumerate(todo):
            if number == 0 and cell.method not in (*ITERATIVE, "adapt") and cell.k < COSTLY:
                _attempt(experiment, cell, memory_limit)  # warms up
            finished[cell] = _attempt(experiment, cell, memory_limit)
            store.add(finished[cell])
            bar.update()
        bar.update(len(of_label) - len(todo))
        line = _describe([finished[cell] for cell in of_label])
        bar.write(f"{label}: {line} ({time.perf_counter() - begin:.1f} s)")
    bar.close()


def _attempt(experiment: Experiment, cell: Cell, memory_limit: int) -> Result:
    """Run a cell; whatever stops it is its result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MPISWarning)
        try:
            return Result(cell, tuple(run(experiment, cell, memory_limit)))
        except (ArithmeticError, MemoryError, NotImplementedError, RuntimeError, ValueError) as e:
            return Result(cell, (), f"{type(e).__name__}: {str(e).splitlines()[0][:200]}")


def label_of(cell: Cell) -> str:
    rate = "" if cell.lr is None else f" lr={cell.lr}"
    k = "" if cell.k == CHOSEN else f" K={cell.k}"
    return f"{cell.variant} {cell.experiment} {cell.method}{k}{rate}"


def _by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label_of(cell), []).append(cell)
    return groups


def _describe(results: Sequence[Result]) -> str:
    last = [result.points[-1] for result in results if result.points]
    failures = [result.error for result in results if result.error]
    text = f"{len(failures)} failed ({failures[0]}) " if failures else ""
    if last:
        figures: list[tuple[str, Callable[[Point], float]]] = [
            ("ELBO", lambda point: point.elbo),
            ("predictive", lambda point: point.p_ll),
        ]
        for name, figure in figures:
            mean, error = mean_and_error([figure(point) for point in last])
            text += f"{name} {mean:,.1f} +- {error:.1f}  "
    return text.strip()
