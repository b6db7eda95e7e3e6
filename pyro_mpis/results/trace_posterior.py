# SPDX-License-Identifier: Apache-2.0
"""
What programs written for :class:`pyro.infer.Importance` ask of its result.

``Importance`` holds ``num_samples`` traces and a log weight for each. The posterior here is over
combinations of particles, of which a trace shows one. So

* with a single particle index, outside of plates, the traces are the particles, and the log weights
  theirs: massively parallel importance sampling then is importance sampling;
* otherwise the traces are ``num_samples`` joint draws from the posterior, and each has the log
  evidence for a log weight.

Either way the exponentials of the log weights average to the evidence, and averages under the
normalised weights estimate posterior means.
"""

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import Categorical
from pyro.infer.abstract_infer import TracePosterior
from pyro.infer.importance import LogWeightsMixin
from pyro.ops.stats import waic
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_mpis.factor_graph.selection import sites_at
from pyro_mpis.programs.turns import in_turn
from pyro_mpis.queries import joint_weights_of, sample_of
from pyro_mpis.replicate import BlockSum
from pyro_mpis.workers import Workers


@dataclass(frozen=True)
class Draws:
    """Weighted joint draws of all latent sites."""

    values: Mapping[str, Tensor]  # (number, *shape)
    log_weights: Tensor  # (number,), not normalised; their exponentials average to the evidence


def weighted_draws(
    sums: Sequence[BlockSum], log_evidence: Tensor, number: int, workers: Workers
) -> Draws:
    """
    Return the particles themselves if they have one index alone, and joint draws otherwise.

    Draws random numbers in the second case only.

    :param log_evidence: of all the sums together.
    :param number: of draws.
    """
    graph, indices = sums[0].whole, sums[0].replicate.structure.indices
    if len(sums) == len(indices) == 1 and not indices[0].plates and not indices[0].enumerated:
        symbol, number = indices[0].symbol, indices[0].num_samples
        (weights,) = joint_weights_of(sums, [symbol], workers)
        values = sites_at(graph, {symbol: torch.arange(number, device=graph.device)}, number)
        log_weights = weights[symbol].log() + math.log(number) + log_evidence
        return Draws(values, log_weights.to(log_evidence.dtype))
    return Draws(sample_of(sums, number, workers), log_evidence.expand(number))


class ImportanceTraces(TracePosterior, LogWeightsMixin):
    """
    The members of ``Importance`` besides ``run``, made when they are asked for.

    Before a run they are as empty as those of ``Importance``. Draws and traces are made once a run,
    at their first use.
    """

    @abstractmethod
    def _weighted_draws(self) -> Draws | None:
        """Return the draws to show; None before a run."""

    @abstractmethod
    def _traces_at(self, values: Sequence[Mapping[str, Tensor]]) -> list[Trace]:
        """Run the model at each set of values of its latent sites."""

    @abstractmethod
    def _effective_samples(self) -> Tensor:
        """Return the smallest effective sample size."""

    @abstractmethod
    def _summed_log_likelihoods(self, draws: Draws) -> Mapping[str, Tensor]:
        """Return those of observed sites; empty if no enumerated latent is to be summed over."""

    def _reset(self) -> None:
        """Forget the draws of the last run."""
        self._draws: Draws | None = None
        self._log_weights: list[Tensor] | None = None
        self._exec_traces: list[Trace] | None = None

    def _known_draws(self) -> Draws | None:
        if self._draws is None:
            self._draws = self._weighted_draws()
        return self._draws

    @property
    @in_turn
    def log_weights(self) -> list[Tensor]:  # type: ignore[override]
        """The log weight of each of :attr:`exec_traces`: scalars, not normalised."""
        draws = self._known_draws()
        if draws is None:
            return []
        if self._log_weights is None:
            self._log_weights = list(draws.log_weights.unbind())
        return self._log_weights

    @property
    @in_turn
    def exec_traces(self) -> list[Trace]:  # type: ignore[override]
        """
        Traces of the model, ``num_samples`` of them, with the weights :attr:`log_weights`.

        The particles and their weights if the posterior has a single particle index, outside of
        plates; joint draws of even weight otherwise. At its first use draws random numbers and runs
        the model for each trace.
        """
        draws = self._known_draws()
        if draws is None:
            return []
        if self._exec_traces is None:
            rows = zip(*(value.unbind() for value in draws.values.values()), strict=True)
            values = [dict(zip(draws.values, row, strict=True)) for row in rows]
            self._exec_traces = self._traces_at(values or [{}] * len(draws.log_weights))
        return self._exec_traces

    @property
    def chain_ids(self) -> list[int]:  # type: ignore[override]
        """Zero for each of :attr:`exec_traces`: there is one chain."""
        return [0] * len(self.log_weights)

    @property
    def _idx_by_chain(self) -> list[list[int]]:  # type: ignore[override]
        return [list(range(len(self.log_weights)))]

    @property
    def _categorical(self) -> Categorical:  # type: ignore[override]
        return Categorical(logits=torch.stack(self.log_weights))

    def _traces(self, *args: object, **kwargs: object) -> Iterator[tuple[Trace, Tensor]]:
        """Run, and yield traces and their log weights."""
        self.run(*args, **kwargs)  # type: ignore[no-untyped-call]
        yield from zip(self.exec_traces, self.log_weights, strict=True)

    @in_turn
    def information_criterion(self, pointwise: bool = False) -> "OrderedDict[str, Tensor]":
        """
        Compute WAIC, as Pyro has it, for models with one observed site.

        An observation's log likelihood is summed over enumerated latents that are its own, as in
        the ``log_likelihood`` of ``to_arviz``.

        :param pointwise: whether to return that of each observation, not their sum.
        :return: ``waic`` and ``p_waic``, the effective number of parameters.
        """
        draws = self._known_draws()
        found = {} if draws is None else self._summed_log_likelihoods(draws)
        if draws is None or len(found) != 1:  # of several sites: refused by Pyro
            return super().information_criterion(pointwise)  # type: ignore[no-untyped-call, no-any-return]
        (log_likelihood,) = found.values()
        value, size = waic(log_likelihood, draws.log_weights, pointwise)
        return OrderedDict([("waic", value), ("p_waic", size)])

    @in_turn
    def get_ESS(self) -> Tensor:
        """
        Return the smallest effective sample size of any site, at any plate element: a scalar.

        It says how many particles carry the answer. With a single particle index it is that of the
        weights, as ``Importance`` has it. Weights of joint draws are even, and say nothing. If no
        site has particles, all being summed exactly, it is the number of draws.
        """
        if self._known_draws() is None:
            return super().get_ESS()  # type: ignore[no-untyped-call, no-any-return]
        return self._effective_samples()
