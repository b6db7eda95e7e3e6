# SPDX-License-Identifier: Apache-2.0
"""
Run the paper's experiments, and draw its figures from the runs.

    python -m benchmarks.paper [--quick | --full] [--output FOLDER] [--models ...] ...

Results go to FOLDER/results.jsonl, one line for each finished cell (a method with K samples at
one seed); called again, it runs the cells that are missing. Means are written to summary.json,
tables beside the authors' figures to tables.md, figures to figure*.png.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch

from benchmarks._measure import processor

from . import bias, figures, intended, published, report
from .methods import METHODS
from .runs import SIZES, Store, load, plan, run_cells

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    _describe_machine(folder, options.device)
    store = Store(folder / "results.jsonl")
    size = SIZES[options.size]
    if options.seeds is not None:
        size = size.with_seeds(options.seeds)
    limit = int(options.memory_limit * GIB)
    begin = time.perf_counter()
    experiments = load(
        options.variants,
        options.models,
        download=options.size != "quick",
        device=options.device,
    )
    for variant, experiment in experiments:
        cells = plan(experiment, variant, size, options.methods)
        if options.ks:
            cells = [cell for cell in cells if cell.k in options.ks]
        run_cells(experiment, cells, store, limit)
    rows = report.summarise(store.read().values())
    report.write(rows, folder)
    pictures = figures.draw(rows, folder)
    if options.bias:
        (folder / "bias.md").write_text(bias.table(10_000 if options.size == "quick" else 10**6))
    written = ", ".join(["summary.json", "tables.md", *(path.name for path in pictures)])
    print(f"{folder}: {written}; {time.perf_counter() - begin:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    for size, text in (
        ("quick", "a minute in all, to see that everything works; downloads nothing"),
        ("full", "the paper's own size, for a GPU"),
    ):
        sizes.add_argument(f"--{size}", action="store_const", const=size, dest="size", help=text)
    parser.set_defaults(size="default")
    names = list(dict.fromkeys([*published.NAMES, *intended.NAMES]))
    variants = ["published", "intended"]
    for name, choices in (("models", names), ("variants", variants), ("methods", list(METHODS))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--ks", nargs="+", type=int, metavar="K", help="only these numbers")
    parser.add_argument("--seeds", type=int, help="how many, in place of the size's number")
    parser.add_argument("--output", default="output/paper", metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0 leaves it its own")
    parser.add_argument("--memory-limit", type=float, default=1.5, metavar="GIB")
    parser.add_argument(
        "--no-bias", action="store_false", dest="bias", help="without the toy of the biased scheme"
    )
    return parser


def _describe_machine(folder: Path, device: str) -> None:
    """Note what the figures come from; of the last call, if there were several."""
    about: dict[str, str | int] = {"device": processor(device), "torch": str(torch.__version__)}
    about |= {"pyro": pyro.__version__, "threads": torch.get_num_threads()}
    (folder / "machine.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
