# SPDX-License-Identifier: Apache-2.0
"""Means over seeds, and tables of them beside the authors' figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from . import published
from .methods import METHODS, Point, mean_and_error
from .runs import AUTHORS, Result


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{self.mean:,.1f}"
        digits = 1 if self.error < 10 else 0
        return f"{self.mean:,.{digits}f} ± {self.error:,.{digits}f}"

    def z(self, other: Estimate) -> str:
        """Return the difference in combined standard errors."""
        return f"{(self.mean - other.mean) / math.hypot(self.error, other.error):+.1f}"


@dataclass(frozen=True)
class Row:
    """One method at one K, after some iterations if it is iterative; seconds are medians."""

    variant: str
    experiment: str
    method: str
    k: int
    lr: float | None
    iteration: int | None
    seeds: int
    elbo: Estimate
    p_ll: Estimate
    elbo_seconds: float
    p_ll_seconds: float


def summarise(results: Iterable[Result]) -> list[Row]:
    """
    Average over seeds; values that are not finite are left out, as the authors do.

    Of runs with several numbers of iterations, the longest count.
    """
    results = list(results)
    longest: dict[tuple[str, str, str], int] = {}
    for result in results:
        name = (result.cell.variant, result.cell.experiment, result.cell.method)
        longest[name] = max(longest.get(name, 0), result.cell.iterations or 0)
    groups: dict[tuple[str, str, str, int, float | None, int | None], list[Point]] = {}
    for result in results:
        cell = result.cell
        name = (cell.variant, cell.experiment, cell.method)
        if (cell.iterations or 0) < longest[name]:
            continue
        for point in result.points:
            if math.isfinite(point.elbo) and math.isfinite(point.p_ll):
                groups.setdefault((*name, cell.k, cell.lr, point.iteration), []).append(point)
    rows = [
        Row(
            *key,
            seeds=len(points),
            elbo=Estimate(*mean_and_error([point.elbo for point in points])),
            p_ll=Estimate(*mean_and_error([point.p_ll for point in points])),
            elbo_seconds=median(point.elbo_seconds for point in points),
            p_ll_seconds=median(point.p_ll_seconds for point in points),
        )
        for key, points in groups.items()
    ]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[bool, int, int, float, int, int]:
    """Sort by variant, experiment, method, rate, K, iteration."""
    names = [*published.NAMES, row.experiment]  # those that it does not have come last
    place = (row.variant != "published", names.index(row.experiment))
    return *place, METHODS.index(row.method), row.lr or 0.0, row.k, row.iteration or 0


def authors(experiment: str, method: str) -> dict[int, tuple[Estimate, Estimate]]:
    """Return the authors' ELBO and predictive log-likelihood by K, of importance sampling."""
    rows = AUTHORS.get(experiment, {}).get(method)
    if not isinstance(rows, list):  # an iterative method, or none of theirs
        return {}
    return {row[0]: (Estimate(*row[1:3]), Estimate(*row[3:5])) for row in rows if row[3]}


def unbiased(experiment: str) -> dict[int, Estimate]:
    """Return the ELBO of the authors' code with its bias taken out, by K."""
    rows = AUTHORS.get(experiment, {}).get("unbiased", [])
    return {row[0]: Estimate(*row[1:]) for row in rows}


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write all rows (JSON), and tables of them (Markdown), to a folder."""
    summary = [asdict(row) for row in rows]
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    parts = [
        "## Massively parallel importance sampling, as published",
        beside_authors([row for row in rows if row.method == "mpis"]),
        "## With particles spread evenly, as published",
        of_variant([row for row in rows if row.method == "mpis_even"], "published"),
        "## Global importance sampling, as published",
        beside_authors([row for row in rows if row.method == "global"]),
        "## The authors' estimate of occupancy without its bias",
        beside_unbiased(rows),
        "## Occupancy with presence summed out, as published",
        of_variant([row for row in rows if row.experiment == "occupancy_summed"], "published"),
        "## Importance sampling, as intended",
        of_variant(rows, "intended"),
        "## A learned proposal",
        adapted(rows),
        "## Iterative methods, after their last iteration, as published",
        iterative(rows, "published"),
        "## Iterative methods, after their last iteration, as intended",
        iterative(rows, "intended"),
    ]
    (folder / "tables.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def beside_authors(rows: Sequence[Row]) -> str:
    """Return the table of all figures that the authors have too."""
    lines = []
    for row in rows:
        theirs = authors(row.experiment, row.method).get(row.k)
        if row.variant == "published" and theirs is not None:
            elbo = (row.elbo, theirs[0], row.elbo.z(theirs[0]))
            p_ll = (row.p_ll, theirs[1], row.p_ll.z(theirs[1]))
            figures = (*elbo, *p_ll, f"{row.p_ll_seconds:.2g}")
            lines.append([row.experiment, f"{row.k:,}", row.seeds, *figures])
    header = "model,K,seeds,ELBO,authors,z,predictive LL,authors,z,seconds"
    return table(header, lines)


def beside_unbiased(rows: Sequence[Row]) -> str:
    """Return the ELBO of occupancy beside that of the authors' code without its bias."""
    lines = []
    for row in rows:
        reference = unbiased(row.experiment).get(row.k)
        if (row.variant, row.method) == ("published", "mpis") and reference is not None:
            theirs = authors(row.experiment, row.method)[row.k][0]
            figures = (row.elbo, reference, row.elbo.z(reference), theirs)
            lines.append([row.experiment, f"{row.k:,}", row.seeds, *figures])
    return table("model,K,seeds,ELBO,authors' code unbiased,z,authors", lines)


def of_variant(rows: Sequence[Row], variant: str) -> str:
    """Return a table of importance sampling, without the authors."""
    lines = []
    for row in rows:
        if row.variant == variant and row.iteration is None and row.method != "adapt":
            elbo = (row.elbo, f"{row.elbo_seconds:.2g}")
            lines.append([*_key(row), *elbo, row.p_ll, f"{row.p_ll_seconds:.2g}"])
    return table("model,method,K,seeds,ELBO,seconds,predictive LL,seconds", lines)


def adapted(rows: Sequence[Row]) -> str:
    """Return the table of `adapt`, which has no K of its own."""
    lines = []
    for row in rows:
        if row.method == "adapt":
            figures = (row.elbo, f"{row.elbo_seconds:.2g}", row.p_ll, f"{row.p_ll_seconds:.2g}")
            lines.append([row.variant, row.experiment, row.seeds, *figures])
    return table("variant,model,seeds,ELBO,seconds,predictive LL,seconds", lines)


def iterative(rows: Sequence[Row], variant: str) -> str:
    """Return a table of the iterative methods after their last iteration."""
    lines = []
    last = max((row.iteration or 0 for row in rows), default=0)
    for row in rows:
        if row.iteration is None or row.iteration != last or row.variant != variant:
            continue
        theirs = AUTHORS.get(row.experiment, {}).get(row.method, {})
        elbo, p_ll = "-", "-"
        if row.variant == "published" and theirs.get("iterations") == last:
            elbo, p_ll = (str(Estimate(*theirs["row"][i : i + 2])) for i in (0, 2))
        seconds = f"{row.p_ll_seconds:.2g}"
        lines.append([*_key(row)[:2], row.seeds, row.lr, row.elbo, elbo, row.p_ll, p_ll, seconds])
    header = "model,method,seeds,rate,ELBO,authors,predictive LL,authors,seconds"
    return table(header, lines)


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.experiment, row.method, f"{row.k:,}", str(row.seeds)


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, or nothing without rows."""
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    if not body:
        return ""
    columns = header.split(",")
    rule = "|" + "---|" * len(columns)
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *body])
