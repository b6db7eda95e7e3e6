# SPDX-License-Identifier: Apache-2.0
"""What a finished run holds: the sums of its replicates, and weights that were asked for."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import torch
from torch import Tensor

from pyro_mpis.factor_graph import moments as _moments
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.queries import joint_weights_of
from pyro_mpis.replicate import BlockSum
from pyro_mpis.results.trace_posterior import ImportanceTraces
from pyro_mpis.workers import Workers

Answer = TypeVar("Answer")


class Sums(ImportanceTraces):
    """The sums of a run's replicates, and what they have in common."""

    num_replicates: int  # of the next run
    executor: Executor | None
    disable_progbar: bool
    _sums: list[BlockSum]  # of the replicates with a positive evidence
    _weights: list[dict[str, Tensor]]  # of each, those that have been asked for
    _number: int  # of replicates of the run, those of zero evidence too

    def __copy__(self) -> "Sums":
        """Return a copy that shares the result and the executor."""
        result = self.__class__.__new__(self.__class__)
        vars(result).update(vars(self))
        return result

    def __getstate__(self) -> dict[str, object]:
        """Leave out the executor, which cannot be pickled."""
        return {**vars(self), "executor": None}

    @property
    def _workers(self) -> Workers:
        return Workers(self.executor, not self.disable_progbar)

    def _ran(self) -> list[BlockSum]:
        if not self._sums:
            raise RuntimeError("no particles yet: call .run(*args, **kwargs) before any query.")
        return self._sums

    def _replicates(self) -> Tensor:
        """Return each replicate's log evidence, those of zero last: (replicates,), float64."""
        log_evidences = torch.full((self._number,), -math.inf, dtype=torch.double)
        for number, total in enumerate(self._ran()):
            log_evidences[number] = total.log_evidence
        return log_evidences

    def _counts(self) -> set[int]:
        """Return the numbers of particles that the indices of the run have."""
        structure = self._ran()[0].replicate.structure
        counts = {index.num_samples for index in structure.indices if not index.enumerated}
        return counts or {self._sums[0].replicate.plan.num_samples}

    def _sites(self) -> list[str]:
        return list(self._ran()[0].whole.values)

    def _sampled(self) -> set[str]:
        """Return the sites that have particles, not their whole support or a fixed value."""
        total = self._ran()[0]
        by_symbol = total.replicate.structure.by_symbol
        return {
            name
            for name, site in total.whole.values.items()
            if any(not by_symbol[symbol].enumerated for symbol in site.indices)
        }

    def _log_shares(self) -> Tensor:
        """Return the log of each replicate's share of the evidence."""
        return torch.stack([total.log_evidence for total in self._ran()]).log_softmax(0)

    def _in_each(
        self,
        tuples: Sequence[Sequence[str]],
        query: Callable[[FactorGraph, Mapping[str, Tensor]], Answer],
    ) -> list[Answer]:
        """Answer a query from each replicate's weights; those not known yet take one pass."""
        sums = self._ran()
        wanted = [_moments.joint_indices(sums[0].whole, sites) for sites in tuples]
        missing = [symbols for symbols in wanted if symbols not in self._weights[0]]
        if missing:
            found = joint_weights_of(sums, missing, self._workers)
            for weights, new in zip(self._weights, found, strict=True):
                weights |= new
        return [
            query(total.whole, weights) for total, weights in zip(sums, self._weights, strict=True)
        ]

    def _averaged(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Average moments over replicates by their shares of the evidence."""
        if len(values) == 1:
            return dict(values[0])
        shares = self._log_shares().exp()
        counted = [(share, value) for share, value in zip(shares, values, strict=True) if share > 0]
        averages = {}
        for name, first in values[0].items():
            parts = (share * value[name].double() for share, value in counted)  # not 0 * inf
            averages[name] = sum(parts, torch.zeros_like(first, dtype=torch.double)).to(first.dtype)
        return averages
