# SPDX-License-Identifier: Apache-2.0
"""
Pictures of a posterior's particles and weights, on matplotlib.

ArviZ plots draws from the posterior: ``az.plot_forest(posterior.to_arviz())``. The functions here
show the weights, which no ArviZ plot takes. Each returns its axes, for you to change. None changes
matplotlib's settings.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.importance import MPImportance
from pyro_mpis.results import diagnostics

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

MAX_ROWS = 40  # elements of a site that a panel has lines for
MAX_BARS = 30  # values of a discrete site
MAX_PARTICLES = (
    60  # particles of a scalar that can be told apart; of more, only heavy ones are drawn
)
HEAVY = 0.01  # share of the weight from which a particle is drawn whatever their number
COLUMNS = 3  # panels in a row
PARTICLES, POSTERIOR, POOR, PROPOSAL = "C3", "C0", "C1", "0.45"  # colours


def plot_marginals(
    posterior: MPImportance,
    *sites: str,
    coords: Mapping[str, Sequence[object]] | None = None,
    axes: "Sequence[Axes] | None" = None,
) -> "list[Axes]":
    """
    Draw posterior marginals with the particles and weights that they consist of.

    Each site has a panel. For a scalar, it shows the weighted histogram, a line at each particle as
    high as its weight, and the outline of the proposal: the prior or a guide. For more than one
    scalar, it has a row for each (at most 40). A dot is a particle, and its area is the weight. The
    bar goes from the 5 % to the 95 % quantile, and has a mark at the median. The axis shows the
    range of the posterior. A proposal may reach far beyond it.

    Of more than 60 particles, only those that have 1 % of the weight or more are drawn: if there
    are none, no single particle matters. Rows then have a histogram too.

    :param sites: names of sites; all of them by default.
    :param coords: plate -> names of its elements, as :meth:`MPImportance.to_arviz` takes them.
    :param axes: axes to draw into, one for each site; a new figure by default.
    :raises ValueError: if a site is unknown, there are not as many axes as sites, or a plate has
        not as many elements as names.
    :raises ImportError: without matplotlib.
    """
    marginals = {site: posterior.marginals(site) for site in sites} or posterior.marginals()
    if axes is None:
        axes = _panels([_num_rows(marginal) for marginal in marginals.values()])
    if len(axes) != len(marginals):
        raise ValueError(f"axes: expected one for each of {len(marginals)} sites, not {len(axes)}.")
    known = {site.name: site for site in posterior.diagnose(show=False).sites}
    explained: set[str] = set()  # what some panel's legend has said
    for ax, (name, marginal) in zip(axes, marginals.items(), strict=True):
        site = known.get(name)
        if _num_rows(marginal) == 1:
            _draw_scalar(ax, marginal, site.proposal if site else "")
        else:
            _draw_elements(ax, marginal, site.plates if site else (), coords or {})
        ax.set_title(name)
        _explain(ax, explained)
    return list(axes)


def plot_ess(posterior: MPImportance, *, ax: "Axes | None" = None) -> "Axes":
    """
    Draw the effective sample size of every site: a dot for each plate element.

    The line at the right of each site is its number of particles. ``diagnose`` calls sizes in the
    shaded part poor.

    :param ax: axes to draw into; a new figure by default.
    :raises ImportError: without matplotlib.
    """
    pyplot = _pyplot()
    sites = posterior.diagnose(show=False).sites
    if ax is None:
        height = 1.4 + 0.3 * max(1, len(sites))
        _, ax = pyplot.subplots(figsize=(6.4, height), layout="constrained")
    low = diagnostics.LOW_ESS
    ax.axvspan(0.5, low, color=POOR, alpha=0.12, lw=0)
    for row, site in enumerate(sites):
        ess = site.ess.reshape(-1).numpy()
        spread = np.linspace(-0.22, 0.22, len(ess)) if len(ess) > 1 else np.zeros(1)
        ax.scatter(ess, row + spread, s=16, color=POSTERIOR, alpha=0.6, lw=0)
        ax.plot(2 * [site.num_particles], [row - 0.32, row + 0.32], color="0.4", lw=1.5)
    most = max((site.num_particles for site in sites), default=1)
    ax.set_xscale("log")
    ax.set(
        xlim=(0.9, max(1.3 * most, 2 * low)),
        ylim=(len(sites) - 0.4, -0.6),
        yticks=range(len(sites)),
        yticklabels=[site.name for site in sites],
        xlabel=f"effective sample size (poor below {low:g}; line: number of particles)",
    )
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return ax


def plot_evidence(posterior: MPImportance, *, ax: "Axes | None" = None) -> "Axes":
    """
    Draw the log evidence of every replicate, and of all together with its standard error.

    Replicates with an evidence of zero are triangles at the bottom.

    :param ax: axes to draw into; a new figure by default.
    :raises ValueError: with a single replicate.
    :raises ImportError: without matplotlib.
    """
    pyplot = _pyplot()
    diagnosis = posterior.diagnose(show=False)
    if diagnosis.evidence_error is None:
        raise ValueError(
            "num_replicates: one set of particles has no spread to draw. Ask for several, "
            "num_replicates=8 for example."
        )
    if ax is None:
        _, ax = pyplot.subplots(layout="constrained")
    values = diagnosis.log_evidences.numpy()
    numbers = np.arange(1, len(values) + 1)
    possible = np.isfinite(values)
    middle, error = diagnosis.log_evidence, diagnosis.evidence_error
    ax.axhspan(middle - error, middle + error, color=POSTERIOR, alpha=0.18, lw=0)
    ax.axhline(middle, color=POSTERIOR, lw=1.2, label=f"all: {middle:.2f}, s.e. {error:.2g}")
    ax.scatter(numbers[possible], values[possible], s=24, color=PARTICLES, label="replicates")
    if not bool(possible.all()):
        lost = numbers[~possible]
        ax.scatter(
            lost,
            np.full(lost.shape, 0.02),
            marker="v",
            color=PARTICLES,
            transform=ax.get_xaxis_transform(),
            label="evidence zero",
        )
    ax.set(xlabel="replicate", ylabel="log evidence (nats)")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False)
    return ax


def _pyplot() -> "ModuleType":
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return pyplot


def _panels(num_rows: Sequence[int]) -> "list[Axes]":
    """Make a figure with a panel for each site, as high as the lines in it need."""
    columns = min(COLUMNS, max(1, len(num_rows)))
    lines = [num_rows[start : start + columns] for start in range(0, len(num_rows), columns)]
    heights = [max(3.2, 0.8 + 0.2 * max(line)) for line in lines] or [3.2]
    _, grid = _pyplot().subplots(
        len(heights),
        columns,
        figsize=(3.4 * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for spare in grid.flat[len(num_rows) :]:
        spare.remove()
    return list(grid.flat[: len(num_rows)])


def _num_rows(marginal: Marginal) -> int:
    return min(MAX_ROWS, int((marginal.batch_shape + marginal.event_shape).numel()))


def _explain(ax: "Axes", explained: set[str]) -> None:
    """Give a panel a legend of what no panel before it has explained."""
    handles, labels = ax.get_legend_handles_labels()
    new = [(h, label) for h, label in zip(handles, labels, strict=True) if label not in explained]
    if new:
        explained.update(label for _, label in new)
        ax.legend(*zip(*new, strict=True), frameon=False, fontsize="small", loc="upper right")


def _draw_scalar(ax: "Axes", marginal: Marginal, proposal: str) -> None:
    """
    Draw the weighted histogram, or the probability of each value, and the particles.

    :param proposal: what the particles were drawn from; empty if all values are summed.
    """
    samples, weights = _scalars(marginal)
    samples, weights = samples[0], weights[0]
    values, place = np.unique(samples, return_inverse=True)
    if len(values) <= MAX_BARS and bool((values == values.round()).all()):
        shares = np.bincount(place, weights)
        ax.bar(values, shares, width=0.6, color=POSTERIOR, alpha=0.5, label="posterior")
        ax.set(xticks=values, ylabel="probability")
        return
    limits = _limits(marginal)
    edges, heights = _histogram(samples, weights, limits)
    _, drawn_from = _histogram(samples, np.full(weights.shape, 1 / len(weights)), limits, edges)
    top = float(heights.max())
    ax.stairs(heights, edges, fill=True, color=POSTERIOR, alpha=0.35, label="posterior")
    if proposal:
        ax.stairs(drawn_from, edges, color=PROPOSAL, lw=1.2, label=f"proposal: {proposal}")
    shown, which = _shown_particles(weights)
    shown &= (samples >= limits[0]) & (samples <= limits[1])
    if bool(shown.any()):
        stems = 0.3 * top * weights[shown] / weights.max()
        label = f"{which}, by weight"
        ax.vlines(samples[shown], 0, stems, color=PARTICLES, lw=0.9, label=label)
    mean, ess = float(weights @ samples), float(1 / np.square(weights).sum())
    ax.plot([mean, mean], [0, top], color=POSTERIOR, lw=1.2, label="mean")
    room = 1.6  # for the legend
    ax.set(xlim=limits, ylim=(0, room * max(top, float(drawn_from.max()))), yticks=[])
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"mean {mean:.3g}, ESS {ess:.{int(ess < 100)}f} of {len(weights)}")


def _draw_elements(
    ax: "Axes",
    marginal: Marginal,
    plates: Sequence[str],
    coords: Mapping[str, Sequence[object]],
) -> None:
    """Draw a row for each scalar of a site."""
    shape = marginal.batch_shape + marginal.event_shape
    samples, weights = _scalars(marginal)
    quantiles = marginal.quantile([0.05, 0.5, 0.95]).double().flatten(1).cpu()
    limits = _limits(marginal)
    rows = _num_rows(marginal)
    largest = max(0.1, float(weights.max()))  # many particles of even weight: small dots
    for row in range(rows):
        _draw_row(ax, row, samples[row], weights[row], limits, largest)
        left, middle, right = quantiles[:, row].tolist()
        ax.plot(
            [left, right],
            2 * [row + 0.28],
            color=POSTERIOR,
            lw=1.6,
            solid_capstyle="butt",
            label=None if row else "5 % to 95 %, median",
        )
        ax.plot(middle, row + 0.28, marker="|", color=POSTERIOR, ms=7, mew=1.6)
    labels = _labels(shape, plates, coords)[:rows]
    top = -0.9 - 0.14 * (rows + 4)  # room for the legend
    ax.set(xlim=limits, ylim=(rows - 0.3, top), yticks=range(rows), yticklabels=labels)
    ax.locator_params(axis="x", nbins=5)
    if rows > 12:
        ax.tick_params(axis="y", labelsize=7)
    parts = [plate for plate in plates if plate]
    if rows < shape.numel():
        parts.append(f"{rows} of {shape.numel()}")
    ax.set_ylabel(", ".join(parts))


def _draw_row(
    ax: "Axes",
    row: int,
    samples: "NDArray[np.double]",
    weights: "NDArray[np.double]",
    limits: tuple[float, float],
    largest: float,
) -> None:
    """
    Draw the particles of one scalar, and its histogram if they are many.

    :param largest: the weight of the largest dot.
    """
    if len(samples) > MAX_PARTICLES:
        edges, density = _histogram(samples, weights, limits)
        tops = row - 0.6 * density / density.max()  # the axis points down
        label = None if row else "posterior"
        ax.stairs(tops, edges, baseline=row, fill=True, color=POSTERIOR, alpha=0.35, label=label)
    values, place = np.unique(samples, return_inverse=True)
    shares = np.bincount(place, weights).astype(np.double)
    shown, which = _shown_particles(shares)
    if bool(shown.any()):
        label = f"{which}, area by weight"
        ax.scatter(
            values[shown],
            np.full(int(shown.sum()), float(row)),
            s=120 * shares[shown] / largest,
            color=PARTICLES,
            alpha=0.35,
            lw=0,
            label=None if label in ax.get_legend_handles_labels()[1] else label,
        )


def _shown_particles(weights: "NDArray[np.double]") -> "tuple[NDArray[np.bool_], str]":
    """Return which particles of a scalar are drawn, and what the legend calls them."""
    if len(weights) <= MAX_PARTICLES:
        return np.full(weights.shape, True), "particles"
    return weights >= HEAVY, f"particles above {HEAVY:.0%}"


def _histogram(
    samples: "NDArray[np.double]",
    weights: "NDArray[np.double]",
    limits: tuple[float, float],
    edges: "NDArray[np.double] | None" = None,
) -> "tuple[NDArray[np.double], NDArray[np.double]]":
    """
    Return the edges of bins within the particles and the limits, and the density in each.

    The density is that of all particles: those beyond the limits have their part of it.
    """
    if edges is None:
        bins = min(30, max(5, math.ceil(2 / math.sqrt(np.square(weights).sum()))))
        within = max(limits[0], float(samples.min())), min(limits[1], float(samples.max()))
        within = within if within[0] < within[1] else limits
        edges = np.histogram_bin_edges(samples, bins, within)
    return edges, np.histogram(samples, edges, weights=weights)[0] / np.diff(edges)


def _scalars(marginal: Marginal) -> "tuple[NDArray[np.double], NDArray[np.double]]":
    """Return the particles and their weights, one row for each scalar: (scalars, K)."""
    samples, num_batch = marginal.samples, len(marginal.batch_shape)
    weights = marginal.weights
    weights = weights.reshape(weights.shape + (1,) * len(marginal.event_shape))
    rows = (
        tensor.expand(samples.shape).double().movedim(num_batch, -1).flatten(0, -2)
        if samples.dim() > 1
        else tensor.double().unsqueeze(0)
        for tensor in (samples, weights)
    )
    values, shares = (tensor.cpu().numpy() for tensor in rows)
    return values, shares


def _labels(
    shape: Sequence[int], plates: Sequence[str], coords: Mapping[str, Sequence[object]]
) -> list[str]:
    """Return the names of the scalars of a site, dims of size one left out."""
    names: list[Sequence[object]] = []
    for dim, size in enumerate(shape):
        plate = plates[dim] if dim < len(plates) else ""
        if plate in coords and len(coords[plate]) != size:
            raise ValueError(
                f"coords: plate '{plate}' has {size} elements, but {len(coords[plate])} names."
            )
        if size > 1:
            names.append(coords[plate] if plate in coords else range(size))
    return [",".join(map(str, position)) for position in itertools.product(*names)]


def _limits(marginal: Marginal) -> tuple[float, float]:
    """Return the range of nearly all of the posterior, with some room around it."""
    low, high = marginal.quantile([0.005, 0.995]).double().reshape(2, -1)
    left, right = float(low.min()), float(high.max())
    room = 0.15 * (right - left) or 0.5
    return left - room, right + room
