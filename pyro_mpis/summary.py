# SPDX-License-Identifier: Apache-2.0
"""A table of the posterior, one row a scalar."""

import itertools
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields

import torch
from pyro import settings
from torch import Tensor

from pyro_mpis.marginals import Marginal

LOW_ESS = 5.0  # particles: with fewer, quantiles are those of a handful of draws
HIGH_K_HAT = 0.7  # Vehtari et al. (2024)


def _check_threshold(value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected a positive threshold, but found {value!r}.")


settings.register("mpis_low_ess", __name__, "LOW_ESS", _check_threshold)
settings.register("mpis_high_k_hat", __name__, "HIGH_K_HAT", _check_threshold)


@dataclass(frozen=True)
class Row:
    """Posterior of one scalar; quantiles on the particles, weights' ESS and k-hat of its site."""

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
    """The rows, and the log evidence; ``str()`` is a table for a terminal."""

    rows: tuple[Row, ...]
    log_evidence: float
    evidence_error: float | None  # standard error of the log evidence, over replicates
    num_samples: int
    prob: float = 0.9  # between the lower and the upper quantile

    def __str__(self) -> str:
        """Return the table."""
        lower, upper = (f"{50 * (1 + sign * self.prob):.3g}%" for sign in (-1, 1))
        header = ("", "mean", "sd", lower, "50%", upper, "ESS", "k-hat")
        lines: list[tuple[str, ...]] = [header]
        for row in self.rows:
            numbers = [getattr(row, field.name) for field in fields(row)[1:6]]
            cells = [f"{x:.3g}" if abs(x) >= 1e4 else f"{x:.2f}" for x in numbers]
            ess = "-" if math.isnan(row.ess) else f"{row.ess:.1f}"
            k_hat = "-" if math.isnan(row.k_hat) else f"{row.k_hat:.2f}"
            lines.append((row.name, *cells, ess, k_hat))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        error = (
            "" if self.evidence_error is None else f" (standard error {self.evidence_error:.2g})"
        )
        title = f"log evidence {self.log_evidence:.2f}{error}, {self.num_samples} particles a site"
        return "\n".join([*table, title])


def summarise(
    marginals: Mapping[str, Marginal],
    sampled: Set[str],
    log_evidence: float,
    evidence_error: float | None,
    num_samples: int,
    prob: float,
) -> tuple[Summary, list[str]]:
    """
    Make the table, and say what is poor.

    :param sampled: the sites that have particles; ESS and k-hat of others (summed over their whole
        support, or fixed) say nothing, and are nan.
    :param prob: probability between the lower and the upper quantile.
    :return: the summary, and one sentence for each kind of problem.
    """
    rows: list[Row] = []
    for name, marginal in marginals.items():
        rows += _rows(name, marginal, name in sampled, prob)
    summary = Summary(tuple(rows), log_evidence, evidence_error, num_samples, prob)
    return summary, _problems(rows, num_samples)


def _rows(name: str, marginal: Marginal, sampled: bool, prob: float) -> list[Row]:
    batch, shape = marginal.batch_shape, marginal.batch_shape + marginal.event_shape
    tail = (1,) * len(marginal.event_shape)
    quantiles = marginal.quantile([0.5 - prob / 2, 0.5, 0.5 + prob / 2])
    unknown = torch.full_like(marginal.ess, math.nan)
    columns: list[Tensor] = [
        marginal.mean,
        marginal.variance.sqrt(),
        *quantiles,
        (marginal.ess if sampled else unknown).reshape(batch + tail).expand(shape),
        (marginal.pareto_k if sampled else unknown).reshape(batch + tail).expand(shape),
    ]
    numbers = torch.stack([column.double().reshape(-1).cpu() for column in columns], 1).tolist()
    positions = itertools.product(*(range(size) for size in shape))
    labels = [f"{name}[{','.join(map(str, p))}]" if p else name for p in positions]
    return [Row(label, *row) for label, row in zip(labels, numbers, strict=True)]


def _problems(rows: list[Row], num_samples: int) -> list[str]:
    problems = []
    poor = [row for row in rows if row.ess < min(LOW_ESS, 0.9 * num_samples)]
    if poor:
        worst = min(poor, key=lambda row: row.ess)
        problems.append(
            f"{len(poor)} of {len(rows)} scalars have an effective sample size below {LOW_ESS:g} "
            f"(lowest: {worst.name}, {worst.ess:.1f} of {num_samples}): their moments and "
            "quantiles rest on a handful of particles. Raise num_samples, fit a guide (AutoNormal, "
            "SVI), group strongly dependent sites (groups=), or enumerate discrete ones."
        )
    # with nearly even weights, the tail that k-hat is fitted to is noise
    heavy = [row for row in rows if row.k_hat > HIGH_K_HAT and row.ess < 0.5 * num_samples]
    if heavy:
        worst = max(heavy, key=lambda row: row.k_hat)
        problems.append(
            f"{len(heavy)} of {len(rows)} scalars have a Pareto k-hat above {HIGH_K_HAT} (highest: "
            f"{worst.name}, {worst.k_hat:.2f}): the guide's tails are too light, and more "
            "particles help only slowly. Use a wider guide for these sites, or the prior."
        )
    return problems
