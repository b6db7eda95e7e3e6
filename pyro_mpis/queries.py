# SPDX-License-Identifier: Apache-2.0
"""Joint weights and draws of sums over blocks and replicates."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_mpis import _threads
from pyro_mpis.factor_graph.graph import FactorGraph
from pyro_mpis.factor_graph.sampling import sample_sites
from pyro_mpis.factor_graph.source_terms import joint_weights
from pyro_mpis.pieces import at_part
from pyro_mpis.programs.environment import seeded
from pyro_mpis.replicate import BlockSum
from pyro_mpis.workers import Workers


def joint_weights_of(
    sums: Sequence[BlockSum], tuples: Sequence[str], workers: Workers
) -> list[dict[str, Tensor]]:
    """
    Compute :func:`joint_weights` over the blocks of several sums.

    :return: for each of the sums; weights add up to one in each.
    """
    shares = [(total.log_evidences - total.log_evidence).exp() for total in sums]
    units = [
        (replicate, int(block))
        for replicate, share in enumerate(shares)
        for block in (share > 0).nonzero().squeeze(-1).tolist()
    ]
    function = partial(joint_weights, tuples=tuple(tuples))
    jobs = [sums[replicate].job(block, function) for replicate, block in units]
    results: list[dict[str, Tensor]] = [{} for _ in sums]
    with _threads.several(sums[0].replicate.plan.is_large):
        # added up one by one: the weights of all blocks may take many times the limit
        found = workers.each(jobs, "marginals")
        for (replicate, block), (log_p, weights) in zip(units, found, strict=True):
            total, result = sums[replicate], results[replicate]
            _check_unchanged(log_p, total.log_evidences[block])
            for symbols, weight in weights.items():
                if symbols not in result:
                    sizes = [total.whole.sizes[symbol] for symbol in symbols]
                    result[symbols] = weight.new_zeros((*sizes, *weight.shape[len(symbols) :]))
                at = at_part(symbols, total.blocks[block])
                result[symbols][at] += shares[replicate][block] * weight
    return results


def _check_unchanged(log_p: Tensor, known: Tensor) -> None:
    """Refuse a block that has another evidence than it had when it was first evaluated."""
    if not torch.allclose(log_p.double(), known, rtol=1e-6, atol=1e-3):
        raise RuntimeError(
            "the model or its parameters have changed since .run: particles that were weighed at "
            f"log evidence {float(known):.4f} are now at {float(log_p):.4f}. Run again."
        )


def sample_of(sums: Sequence[BlockSum], num_draws: int, workers: Workers) -> dict[str, Tensor]:
    """
    Draw joint samples over the blocks of several sums of equal prior weight.

    Draws random numbers: from the global generator alone, and from seeds drawn from it if there
    are several blocks or sums, wherever they run.
    """
    units = [
        (replicate, block)
        for replicate, total in enumerate(sums)
        for block in range(len(total.blocks))
    ]
    if len(units) == 1:
        job = sums[0].job(0, partial(sample_sites, num_draws=num_draws, forward=sums[0].forward))
        with _threads.several(sums[0].replicate.plan.is_large):
            ((log_p, sample),) = workers.run([job], "samples")
        _check_unchanged(log_p, sums[0].log_evidences[0])
        return sample
    log_evidences = torch.cat([total.log_evidences for total in sums])
    chosen = log_evidences.softmax(0).multinomial(num_draws, replacement=True)
    counts = chosen.bincount(minlength=len(units)).tolist()
    seeds = torch.randint(2**31 - 1, (len(units),)).tolist()
    drawn = [number for number, count in enumerate(counts) if count]
    jobs = []
    for number in drawn:
        replicate, block = units[number]
        function = partial(_seeded_sample, num_draws=counts[number], seed=seeds[number])
        jobs.append(sums[replicate].job(block, function))
    result: dict[str, Tensor] = {}
    with _threads.several(sums[0].replicate.plan.is_large):
        for number, (log_p, sample) in zip(drawn, workers.each(jobs, "samples"), strict=True):
            _check_unchanged(log_p, log_evidences[number])
            if len(drawn) == 1:
                return sample
            here = (chosen == number).nonzero().squeeze(-1)  # the draws' own order, no block's
            for name, value in sample.items():
                if name not in result:
                    result[name] = value.new_empty((num_draws, *value.shape[1:]))
                result[name][here] = value
    return result


def _seeded_sample(
    graph: FactorGraph, num_draws: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    with seeded(seed):
        return sample_sites(graph, num_draws)
