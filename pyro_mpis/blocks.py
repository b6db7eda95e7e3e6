# SPDX-License-Identifier: Apache-2.0
r"""
The sum over all combinations, in blocks that fit into memory.

Cutting the particles of indices outside of all plates into blocks splits the sum (18) of [1] into
independent sums :math:`P = \sum_b P_b`, each evaluated by the same code from its own particles:
nothing of the model's needs to know. Weights are those of the blocks, each times
:math:`P_b / P`; joint draws come from block :math:`b` with that probability.

[1] Bowyer, Heap and Aitchison (2024), UAI, PMLR 244:394-417.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_mpis.contraction import log_evidence
from pyro_mpis.factors import FactorGraph, SiteValue
from pyro_mpis.sampling import sample_sites
from pyro_mpis.source_terms import joint_weights

Ranges = Mapping[str, slice]  # symbol of an index -> its particles in a block
Build = Callable[[Ranges], FactorGraph]
Item = TypeVar("Item")


@dataclass(frozen=True)
class BlockSum:
    """The evidence as a sum over blocks, and what it takes to evaluate a block again."""

    whole: FactorGraph  # sizes and values of all particles; the factors of a single block only
    blocks: tuple[Ranges, ...]
    log_evidences: Tensor  # (blocks,), float64
    build: Build
    show_progress: bool

    @property
    def log_evidence(self) -> Tensor:
        """The log evidence: a scalar, float64."""
        return self.log_evidences.logsumexp(0)

    def graphs(self, numbers: Iterable[int]) -> Iterator[tuple[int, FactorGraph]]:
        """Yield the graphs of some blocks, evaluated anew where there are several."""
        if len(self.blocks) == 1:
            yield 0, self.whole
            return
        for number in _progress(list(numbers), self.show_progress):
            yield number, self.build(self.blocks[number])


def split(particles: Mapping[str, int], block_sizes: Mapping[str, int]) -> tuple[Ranges, ...]:
    """
    Cut the particles of some indices into blocks.

    :param particles: number of particles of each index.
    :param block_sizes: number in a block, of the indices to cut.
    :return: the ranges of each block; one without any where nothing is to be cut.
    """
    cuts = [
        [
            (symbol, slice(start, min(start + size, particles[symbol])))
            for start in range(0, particles[symbol], size)
        ]
        for symbol, size in block_sizes.items()
    ]
    return tuple(dict(combination) for combination in itertools.product(*cuts))


def evaluate(
    build: Build, blocks: Sequence[Ranges], sizes: Mapping[str, int], *, show_progress: bool
) -> BlockSum:
    """
    Evaluate every block once: evidences, and the values of the sites at all particles.

    :param build: evaluates the factors of a block.
    :param sizes: number of particles of each index, all blocks together.
    """
    if len(blocks) == 1:
        graph = build(blocks[0])
        total = log_evidence(graph).double()
        return BlockSum(graph, tuple(blocks), total.unsqueeze(0), build, show_progress)
    whole: FactorGraph | None = None
    log_evidences = []
    for ranges in _progress(blocks, show_progress):
        graph = build(ranges)
        log_evidences.append(log_evidence(graph).double())
        if whole is None:
            whole = replace(graph, factors=(), sizes={**graph.sizes, **sizes}, values={})
        whole = replace(whole, values=_with_values(whole, graph, ranges))
        del graph
    assert whole is not None
    return BlockSum(whole, tuple(blocks), torch.stack(log_evidences), build, show_progress)


def joint_weights_of_blocks(blocks: BlockSum, tuples: Sequence[str]) -> dict[str, Tensor]:
    """Compute what :func:`~pyro_mpis.source_terms.joint_weights` does, over all blocks."""
    result: dict[str, Tensor] = {}
    shares = (blocks.log_evidences - blocks.log_evidence).exp()
    possible = (shares > 0).nonzero().squeeze(-1).tolist()
    for number, graph in blocks.graphs(possible):
        for symbols, weight in joint_weights(graph, tuples).items():
            plates = weight.shape[len(symbols) :]
            if symbols not in result:
                sizes = [blocks.whole.sizes[symbol] for symbol in symbols]
                result[symbols] = weight.new_zeros((*sizes, *plates))
            result[symbols][_part(symbols, blocks.blocks[number])] += shares[number] * weight
    return result


def sample_of_blocks(blocks: BlockSum, num_draws: int) -> dict[str, Tensor]:
    """Draw what :func:`~pyro_mpis.sampling.sample_sites` does, over all blocks."""
    if len(blocks.blocks) == 1:
        return sample_sites(blocks.whole, num_draws)
    shares = (blocks.log_evidences - blocks.log_evidence).exp()
    chosen = shares.multinomial(num_draws, replacement=True)
    counts = chosen.bincount(minlength=len(shares)).tolist()
    parts = [
        sample_sites(graph, counts[number])
        for number, graph in blocks.graphs(n for n, count in enumerate(counts) if count)
    ]
    order = chosen.argsort(stable=True).argsort()  # the draws' own order, not the blocks'
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _part(symbols: str, ranges: Ranges) -> tuple[slice, ...]:
    return tuple(ranges.get(symbol, slice(None)) for symbol in symbols)


def _with_values(whole: FactorGraph, graph: FactorGraph, ranges: Ranges) -> dict[str, SiteValue]:
    """Put a block's values of the sites into their places among all particles."""
    values = dict(whole.values)
    for name, site in graph.values.items():
        if not set(site.indices) & set(ranges):
            values.setdefault(name, site)
            continue
        if name not in values:
            sizes = [whole.sizes[symbol] for symbol in site.indices]
            rest = site.tensor.shape[len(sizes) :]
            values[name] = replace(site, tensor=site.tensor.new_empty((*sizes, *rest)))
        values[name].tensor[_part(site.indices, ranges)] = site.tensor
    return values


def _progress(items: Sequence[Item], show: bool) -> Iterable[Item]:
    """Show a bar over several items, in a terminal."""
    disable = None if show else True  # None: not outside of a terminal
    bar: Iterable[Item] = tqdm(items, desc="blocks", disable=disable, leave=False)
    return bar
