# SPDX-License-Identifier: Apache-2.0
"""A table of the posterior, one row a scalar."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_mpis._text import data_frame, html_table, range_of, scalars, table
from pyro_mpis.factor_graph.marginals import Marginal
from pyro_mpis.results.site_diagnosis import UNEVEN_ESS

if TYPE_CHECKING:
    from pandas import DataFrame

# A longer table is printed in part: so many rows, and so many elements of each site.
MOST_ROWS = 100
MOST_ELEMENTS = 10


@dataclass(frozen=True)
class Row:
    """The posterior of one scalar; ESS and k-hat are those of its site's weights."""

    name: str
    mean: float
    sd: float
    lower: float
    median: float
    upper: float
    ess: float
    k_hat: float


@dataclass(frozen=True)
class Summary:
    """
    The table that :meth:`~pyro_mpis.MPImportance.summary` makes.

    ``print`` it in a terminal; in a notebook it shows itself. Of more than 100 rows it shows the
    first ten of each site; ``rows`` and :meth:`to_dataframe` have all of them.
    """

    rows: tuple[Row, ...]
    log_evidence: float
    evidence_error: float | None  # standard error of the log evidence, over replicates
    num_samples: frozenset[int]  # numbers of particles that sites have, over replicates
    prob: float = 0.9  # between the lower and the upper quantile
    time_limit: float | None = None  # seconds that the numbers were chosen by, if they were

    def __str__(self) -> str:
        """Return the table."""
        return f"{table(self._lines())}\n{self._title()}"

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        return html_table(self._lines(), self._title().replace("\n", "; "))

    def to_dataframe(self) -> "DataFrame":
        """
        Return the rows as a pandas ``DataFrame``, indexed by the names of the scalars.

        :raises ImportError: without pandas.
        """
        columns = [field.name for field in fields(Row)]
        rows = {name: [getattr(row, name) for row in self.rows] for name in columns}
        return data_frame(rows).set_index("name")

    def _lines(self) -> list[tuple[str, ...]]:
        lower, upper = (f"{50 * (1 + sign * self.prob):.3g}%" for sign in (-1, 1))
        lines: list[tuple[str, ...]] = [("", "mean", "sd", lower, "50%", upper, "ESS", "k-hat")]
        for row in self._shown():
            numbers = [getattr(row, field.name) for field in fields(row)[1:6]]
            cells = [f"{x:.3g}" if abs(x) >= 1e4 else f"{x:.2f}" for x in numbers]
            ess = "-" if math.isnan(row.ess) else f"{row.ess:.1f}"
            k_hat = "-" if math.isnan(row.k_hat) else f"{row.k_hat:.2f}"
            lines.append((row.name, *cells, ess, k_hat))
        return lines

    def _shown(self) -> Sequence[Row]:
        if len(self.rows) <= MOST_ROWS:
            return self.rows
        shown, elements = [], Counter[str]()
        for row in self.rows:
            site = row.name.partition("[")[0]
            elements[site] += 1
            if elements[site] <= MOST_ELEMENTS:
                shown.append(row)
        return shown[:MOST_ROWS]

    def _title(self) -> str:
        error = (
            "" if self.evidence_error is None else f" (standard error {self.evidence_error:.2g})"
        )
        title = f"log evidence {self.log_evidence:.2f}{error}"
        if not all(math.isnan(row.ess) for row in self.rows):
            title += f", {range_of(self.num_samples)} particles a site"
            if self.time_limit is not None:
                title += f" (chosen to fit into {self.time_limit:g} s and memory)"
        left_out = len(self.rows) - len(self._shown())
        return f"and {left_out} more rows: see .to_dataframe()\n{title}" if left_out else title

    __repr__ = __str__


def summarise(
    marginals: Mapping[str, Marginal],
    sampled: Set[str],
    log_evidence: float,
    evidence_error: float | None,
    num_samples: Set[int],
    prob: float,
    time_limit: float | None = None,
) -> Summary:
    """
    Make the table; k-hat is nan where the weights are too even for it to say something.

    :param sampled: the sites that have particles; ESS and k-hat of others (summed over their whole
        support, or fixed) say nothing, and are nan.
    :param prob: probability between the lower and the upper quantile.
    :param time_limit: seconds that the numbers of particles were chosen by, if they were.
    """
    rows: list[Row] = []
    for name, marginal in marginals.items():
        rows += _rows(name, marginal, name in sampled, prob)
    return Summary(
        tuple(rows), log_evidence, evidence_error, frozenset(num_samples), prob, time_limit
    )


def _rows(name: str, marginal: Marginal, sampled: bool, prob: float) -> list[Row]:
    batch, shape = marginal.batch_shape, marginal.batch_shape + marginal.event_shape
    tail = (1,) * len(marginal.event_shape)
    quantiles = marginal.quantile([0.5 - prob / 2, 0.5, 0.5 + prob / 2])
    nans = torch.full_like(marginal.ess, math.nan)
    even = marginal.ess >= UNEVEN_ESS * marginal.log_weights.shape[-1]
    columns: list[Tensor] = [
        marginal.mean,
        marginal.variance.sqrt(),
        *quantiles,
        (marginal.ess if sampled else nans).reshape(batch + tail).expand(shape),
        (torch.where(even, nans, marginal.pareto_k) if sampled else nans)
        .reshape(batch + tail)
        .expand(shape),
    ]
    numbers = torch.stack([column.double().reshape(-1).cpu() for column in columns], 1).tolist()
    return [Row(label, *row) for label, row in zip(scalars(name, shape), numbers, strict=True)]
