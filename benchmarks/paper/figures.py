# SPDX-License-Identifier: Apache-2.0
"""The paper's figures 1 to 3 from our own runs, with the authors' values beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import Estimate, Row, authors


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    label: str
    colour: str  # of the palette of Okabe and Ito
    marker: str


LOOKS = {
    "mpis": Look("MP IS, as in the paper", "#0072B2", "o"),
    "mpis_even": Look("MP IS, spread evenly", "#6A3D9A", "D"),
    "mpis_grouped": Look("MP IS, beta_P and beta_PC grouped", "#56B4E9", "p"),
    "mpis_summed": Look("MP IS, presence summed", "#009E73", "^"),
    "global": Look("global IS", "#D55E00", "s"),
    "adapt": Look("MP IS after adapt", "#8B0000", "*"),
    "vi": Look("VI", "#CC79A7", "v"),
    "iwae": Look("IWAE, K = 10", "#E69F00", "P"),
    "rws": Look("RWS, K = 10", "#000000", "X"),
}
TITLES = {
    "bus_breakdown": "NYC bus breakdown",
    "chimpanzees": "Chimpanzees",
    "movielens": "MovieLens",
    "movielens_100k": "MovieLens 100K",
    "occupancy": "Bird occupancy",
}
K_LABEL = "K, samples of each latent"
TIME_LABEL = "time / s"
LARGEST_RATIO = 100  # of the worst to the best on one axis; what is beyond is cut off
SAMPLING = ("mpis", "mpis_even", "mpis_grouped", "mpis_summed", "global")
PANELS: Sequence[tuple[str, Callable[[Row], Estimate], Callable[[Row], float]]] = (
    ("ELBO / nats", lambda row: row.elbo, lambda row: row.elbo_seconds),
    ("predictive log-lik. / nats", lambda row: row.p_ll, lambda row: row.p_ll_seconds),
)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the three figures of each variant that there are rows of; return their files."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for variant in ("published", "intended"):
        of_variant = [_renamed(row) for row in rows if row.variant == variant]
        for number, figure in enumerate((against_k, against_time, against_iterative), 1):
            path = folder / f"figure{number}_{variant}.png"
            if figure(of_variant, path):
                paths.append(path)
    return paths


@dataclass(frozen=True)
class _Shown:
    """A row with the names of the panel and of the line that it belongs to."""

    row: Row
    panel: str
    line: str


def _renamed(row: Row) -> _Shown:
    panel = row.experiment.removesuffix("_summed")
    summed = panel != row.experiment and row.method == "mpis"
    return _Shown(row, panel, "mpis_summed" if summed else row.method)


def against_k(rows: Sequence[_Shown], path: Path) -> bool:
    """Figure 1: against K; the authors' values at the same K as open symbols."""

    def panel(axes: Any, number: int, shown: Sequence[_Shown]) -> None:
        _, figure, _ = PANELS[number]
        for line in SAMPLING:
            of_line = sorted((x.row for x in shown if x.line == line), key=lambda row: row.k)
            ours = [(row.k, figure(row)) for row in of_line]
            _line(axes, line, ours)
            if line in ("mpis", "global") and ours and shown[0].row.variant == "published":
                theirs = authors(shown[0].panel, line)
                points = [(k, theirs[k][number]) for k, _ in ours if k in theirs]
                _line(axes, line, points, open_symbols=True)

    shown = [x for x in rows if x.line in SAMPLING and not _global_of_summed(x)]
    return _grid(shown, path, K_LABEL, panel)


def against_time(rows: Sequence[_Shown], path: Path) -> bool:
    """Figure 2: against seconds; K grows along each line."""

    def panel(axes: Any, number: int, shown: Sequence[_Shown]) -> None:
        _, figure, seconds = PANELS[number]
        for line in SAMPLING:
            of_line = sorted(
                (x.row.k, seconds(x.row), figure(x.row)) for x in shown if x.line == line
            )
            _line(axes, line, [(x, y) for _, x, y in of_line])

    shown = [x for x in rows if x.line in SAMPLING and not _global_of_summed(x)]
    return _grid(shown, path, TIME_LABEL, panel)


def against_iterative(rows: Sequence[_Shown], path: Path) -> bool:
    """Figure 3: against seconds, beside `adapt` and guides in training at their best rate."""

    def panel(axes: Any, number: int, shown: Sequence[_Shown]) -> None:
        _, figure, seconds = PANELS[number]
        for line in LOOKS:
            of_line = [x.row for x in shown if x.line == line]
            if any(row.iteration is not None for row in of_line):
                last = max(row.iteration or 0 for row in of_line)
                ends = {row.lr: figure(row).mean for row in of_line if row.iteration == last}
                best = max(ends, key=lambda rate: ends[rate])
                of_line = [row for row in of_line if row.lr == best]
            of_line.sort(key=lambda row: (row.k, row.iteration or 0))
            _line(axes, line, [(seconds(row), figure(row)) for row in of_line])

    trained = {x.panel for x in rows if x.row.iteration is not None}
    shown = [x for x in rows if x.panel in trained and x.line != "global"]
    return _grid(shown, path, TIME_LABEL, panel)


def _global_of_summed(shown: _Shown) -> bool:
    return shown.line == "global" and shown.panel != shown.row.experiment


def _line(
    axes: Any, line: str, points: Sequence[tuple[float, Estimate]], *, open_symbols: bool = False
) -> None:
    if not points:
        return
    look = LOOKS[line]
    axes.errorbar(
        [x for x, _ in points],
        [-y.mean for _, y in points],
        yerr=[0.0 if y.error != y.error else y.error for _, y in points],
        color=look.colour,
        marker=look.marker,
        linestyle="none" if open_symbols else "-",
        markersize=9 if open_symbols or line == "adapt" else 4.5,
        markerfacecolor="none" if open_symbols else look.colour,
        linewidth=1.2,
        capsize=2,
        label=f"{look.label}, authors" if open_symbols else look.label,
    )


def _grid(
    shown: Sequence[_Shown],
    path: Path,
    x_label: str,
    panel: Callable[[Any, int, Sequence[_Shown]], None],
) -> bool:
    """Draw both figures of each data set, two data sets beside each other; better is up."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    names = [name for name in TITLES if any(x.panel == name for x in shown)]
    if not names:
        return False
    across = min(2, len(names))
    down = -(-len(names) // across)
    picture, grid = pyplot.subplots(
        2 * down, across, figsize=(1 + 4 * across, 5.4 * down), squeeze=False
    )
    handles: dict[str, Any] = {}
    for place, name in enumerate(names):
        row, column = divmod(place, across)
        of_panel = [x for x in shown if x.panel == name]
        for number, (label, _, _) in enumerate(PANELS):
            axes = grid[2 * row + number, column]
            panel(axes, number, of_panel)
            axes.set_xscale("log")
            if x_label == K_LABEL and max(x.row.k for x in of_panel) <= 100:
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            axes.set_yscale("log")
            best, worst = axes.get_ylim()
            axes.set_ylim(min(worst, LARGEST_RATIO * best), best)  # of -log p: better is up
            narrow = worst < 3 * best
            axes.yaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"\N{MINUS SIGN}{y:,.0f}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(True, color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            if column == 0:
                axes.set_ylabel(label)
            if number == 0:
                axes.set_title(TITLES[name], fontsize=10)
            else:
                axes.set_xlabel(x_label)
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(text, handle)
    for axes in grid.flat:
        axes.set_visible(axes.has_data())
    columns = min(3, 1 + across)
    picture.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncol=columns,
        frameon=False,
        fontsize=9,
    )
    lines = -(-len(handles) // columns)
    picture.tight_layout(rect=(0, 0.045 * lines / down, 1, 1))
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
    return True
