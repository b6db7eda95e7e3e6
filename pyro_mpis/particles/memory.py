# SPDX-License-Identifier: Apache-2.0
"""
Cut a run into blocks that fit into memory, from sizes alone, before anything is allocated.

What is counted: what the programs hold while they are evaluated (a
:class:`~pyro_mpis.particles.footprint.Footprint`, where it may matter), the factors of a block, and
what the contraction of these makes of them for any query
(:mod:`~pyro_mpis.factor_graph.sizes`).
"""

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pyro_mpis._typing import Ordinal
from pyro_mpis.particles.footprint import Footprint
from pyro_mpis.particles.limits import default_limit
from pyro_mpis.particles.sizing import (
    TENSORS_AT_ONCE,
    Need,
    Sizes,
    Sizing,
    bytes_of,
    largest_site,
    number_of_densities,
)
from pyro_mpis.programs.structure import Site, Structure

__all__ = ["Cut", "TooLargeError", "default_limit", "fit", "gc_paused"]

# Where a plain run says nothing of them, as many temporaries as a log_prob has elements.
HIDDEN = 512
# More blocks than anyone would wait for.
MAX_BLOCKS = 10_000
# On a CPU this many densities take a few seconds; contracting a long chain of them takes ten times
# as long. Beyond it a run says so before it starts.
MUCH_WORK = 3e8
NAMED = 6  # indices of a factor that an error names
# Bytes of the tensors of a piece. Allocators keep tensors of this size for the next piece. Larger
# ones go back to the system, and to get their pages again takes longer than to compute them.
PIECE_BYTES = 2**24
PIECE_BYTES_OF_GPU = 2**30
# Of what is left beside the factors, the share that a piece takes if it can be had by cutting.
# What is freed comes back in other sizes: between pieces that take all of it, the heap of glibc had
# holes of 1.7 times as much, and none where pieces take half.
SHARE_OF_PIECE = 0.5
# How many more elements may be evaluated for the sake of pieces.
MORE_WORK = 1.25


@dataclass(frozen=True)
class Cut:
    """
    How many particles of some indices are taken at once; of all others, all.

    The sum is contracted in **blocks**, each with the factors that it needs. The factors of a block
    are evaluated in **pieces**, and summed over the plates that hold no index before they are put
    together: the largest tensors of a model are mostly those of its observations.
    """

    blocks: Mapping[str, int]  # symbol of the index -> number of particles
    pieces: Mapping[str, int]

    @property
    def whole(self) -> bool:
        """Whether all is taken at once."""
        return not self.blocks and not self.pieces


class TooLargeError(MemoryError):
    """
    Something does not fit into memory, however its particles are cut.

    :param site: a site that reads the indices of what does not fit.
    :param symbols: these indices.
    :param plates: for whose elements there is one of it each.
    """

    def __init__(
        self,
        message: str,
        site: str,
        symbols: Ordinal = frozenset(),
        plates: Ordinal = frozenset(),
    ) -> None:
        super().__init__(message, site, symbols, plates)
        self.site = site
        self.symbols = symbols
        self.plates = plates

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


@contextmanager
def gc_paused(pause: bool = True) -> Iterator[None]:
    """
    Pause Python's search for cyclic garbage.

    A run of a long program makes some hundred thousand objects that live until its end, none of
    ours in a cycle. Python would search them over and over, which takes a third of the run's time.

    :param pause: whether to pause. Not in work of many parts: cycles of the user's would pile up.
    """
    pause = pause and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def is_worth_measuring(structure: Structure, sizes: Sizes, limit: int | None) -> bool:
    """Whether what the programs hold besides log_probs may exceed a limit."""
    if limit is None:
        return False
    largest = 0
    for site in (*structure.guide.values(), *structure.model.values()):
        combinations = math.prod(sizes[s] for s in structure.indices_read(site))
        largest = max(largest, max(site.held, structure.elements(site)) * combinations)
    missed = max(sizes.values(), default=1)  # a read that the plain run did not see
    return largest * max(HIDDEN, missed * TENSORS_AT_ONCE) * torch.double.itemsize > limit


def fit(
    structure: Structure,
    memory_limit: int | None,
    device: str,
    footprint: Footprint | None = None,
) -> Cut:
    """
    Find how many particles of which indices to take at once.

    Halves the particles of indices outside of all plates, the largest first of those that what
    takes most memory reads, until everything fits.

    :param memory_limit: in bytes; ``None`` for no limit.
    :param device: its type; see :class:`torch.device`.
    :param footprint: of the programs; None to count log_probs alone.
    :raises TooLargeError: if no block is small enough, or too many would be needed; names what
        does not fit and the latents that it reads.
    """
    sizing = Sizing(structure, footprint, device)
    whole = structure.num_particles
    limit = math.inf if memory_limit is None else memory_limit
    drawn = sizing.drawing(whole)
    limit_of_all, limit = limit, limit - sizing.particles(whole)
    goal = min(limit, PIECE_BYTES if device == "cpu" else PIECE_BYTES_OF_GPU)
    blocks = dict(whole)
    while True:
        needed = sizing.queries(blocks, limit)
        pieces = dict(blocks)
        if needed.bytes <= limit:
            room = limit - sizing.factors(sizing.shapes(blocks)).bytes
            pieces = _pieces(sizing, blocks, goal, room)
            needed = sizing.evaluation(pieces)
            if needed.bytes <= room and drawn.bytes > limit_of_all:
                raise _too_large(structure, drawn, drawn, whole, limit_of_all)
            if needed.bytes <= room:
                return Cut(_smaller(blocks, whole), _smaller(pieces, blocks))
        symbol = _cut_for_all(sizing, needed.symbols, blocks)
        if symbol is None or number_of_parts(whole, pieces) > MAX_BLOCKS:
            at_once = sizing.queries(whole, limit)
            evaluated = sizing.evaluation(whole)
            largest = max(at_once, evaluated, key=lambda need: need.bytes)
            raise _too_large(structure, largest, needed, whole, limit_of_all)
        blocks[symbol] = math.ceil(blocks[symbol] / 2)


def _cut_for_all(sizing: Sizing, symbols: Ordinal, blocks: Sizes) -> str | None:
    """Return the index outside of all plates to cut, of some: all factors together shrink most."""
    cuttable = _all_cuttable(sizing.structure, symbols, blocks)
    shapes = sizing.shapes(blocks)
    taken = [(shape.dims, sizing.bytes_of(shape, shapes)) for shape in shapes.factors]

    def left(symbol: str) -> tuple[int, int]:
        size = blocks[symbol]
        half = math.ceil(size / 2)
        total = sum(n // size * half if symbol in dims else n for dims, n in taken)
        return total, -size

    return min(cuttable, key=left, default=None)


def _pieces(sizing: Sizing, blocks: Sizes, goal: float, room: float) -> dict[str, int]:
    """
    Return numbers of particles of pieces that fit.

    And that take a share of the room, and whose tensors reach ``goal`` bytes, or come near it,
    where that makes little work twice.
    """
    structure = sizing.structure
    sizes, work = dict(blocks), number_of_densities(structure, blocks)
    runs = sizing.runs_that_pay(blocks)

    def work_of(sizes: Sizes) -> int:
        return number_of_densities(structure, sizes) * number_of_parts(blocks, sizes)

    while True:
        needed, largest = sizing.evaluation(sizes), sizing.largest_tensor(sizes)
        shrinks = needed.bytes > room * SHARE_OF_PIECE
        if not shrinks and largest.bytes <= goal:
            return sizes
        takes, need = (sizing.evaluation, needed) if shrinks else (sizing.largest_tensor, largest)
        fits = needed.bytes <= room
        halved = _halved(sizes, need.symbols)
        if fits:  # or of two that take as much, the other one is left
            before = need.bytes, need.symbols
            halved = [s for s in halved if (takes(s).bytes, takes(s).symbols) != before]
        smaller = min(halved, key=lambda s: work_of(s) * takes(s).bytes, default=None)
        if smaller is None:
            return sizes
        if fits and (
            work_of(smaller) > MORE_WORK * work
            or (not shrinks and number_of_parts(blocks, smaller) > runs)
        ):
            return sizes
        sizes = smaller


def _halved(sizes: Sizes, symbols: Ordinal) -> list[dict[str, int]]:
    """
    Return sizes with half of the particles of one of some indices, those with most of them first.

    Indices inside of plates are among them: pieces are put together again before anything is summed
    over an index. A piece has two particles or more.
    """
    cuttable = sorted((-sizes[symbol], symbol) for symbol in symbols if sizes[symbol] >= 4)
    return [{**sizes, symbol: math.ceil(sizes[symbol] / 2)} for _, symbol in cuttable]


def number_of_parts(whole: Sizes, sizes: Sizes) -> int:
    """Return into how many parts sizes cut a whole."""
    return math.prod(math.ceil(whole[symbol] / size) for symbol, size in sizes.items())


def _smaller(sizes: Sizes, whole: Sizes) -> dict[str, int]:
    return {symbol: size for symbol, size in sizes.items() if size < whole[symbol]}


def largest_factor(structure: Structure) -> tuple[Site, int]:
    """
    Find the site whose factor is the largest.

    :return: the site, and the bytes that its factor takes, were it evaluated at once.
    """
    sizes = structure.num_particles
    site = largest_site(structure, sizes)
    assert site is not None
    return site, bytes_of(structure, site, sizes)


def takes_long(structure: Structure) -> bool:
    """Whether a run evaluates very many densities."""
    return number_of_densities(structure, structure.num_particles) > MUCH_WORK


def long_wait(structure: Structure) -> str | None:
    """
    Say what makes a run long, and what would shorten it, before it starts.

    :return: None if it is not long.
    """
    sizes = structure.num_particles
    work = number_of_densities(structure, sizes)
    if work <= MUCH_WORK:
        return None
    site, _ = largest_factor(structure)
    number = len(structure.indices_read(site))
    return (
        f"this run evaluates {work:.1e} densities, which may take minutes or longer: site "
        f"'{site.name}' reads {number} particle indices, and has a density for each combination of "
        f"their particles. To know how long, stop it and print plan(...), which also says which "
        f"groups= would help. Half as many particles take 1/{2**number} of the work. Without "
        "num_samples, as many are drawn as fit into three seconds."
    )


def _all_cuttable(structure: Structure, symbols: Ordinal, sizes: Sizes) -> list[str]:
    """Return those of some indices whose particles can be cut into blocks."""
    return [
        symbol
        for symbol in sorted(symbols)
        if sizes[symbol] >= 2
        and not structure.by_symbol[symbol].plates
        and not structure.by_symbol[symbol].enumerated
    ]


def _too_large(
    structure: Structure, at_once: Need, in_parts: Need, whole: Sizes, memory_limit: float
) -> TooLargeError:
    """
    Say what does not fit, and what would help.

    :param at_once: what takes most if nothing is cut.
    :param in_parts: what still does not fit in the smallest parts.
    """
    indices = [structure.by_symbol[symbol] for symbol in sorted(in_parts.symbols)]
    parts = [f"{' and '.join(i.sites)}: {whole[i.symbol]}" for i in indices[:NAMED]]
    if len(indices) > NAMED:
        parts.append(f"and {len(indices) - NAMED} more")
    plates = [structure.plates[symbol] for symbol in sorted(in_parts.plates)]
    parts += [f"plate {plate.name}: {plate.size}" for plate in plates]
    whole_bytes = max(at_once.bytes, in_parts.bytes) / 2**30
    site = in_parts.site or at_once.site
    what = (
        f"{in_parts.what}: its log_prob has one element for each combination of"
        if in_parts.site is not None
        else f"{in_parts.what}: one number or more for each combination of"
    )
    return TooLargeError(
        f"{what} {', '.join(parts)}: {whole_bytes:.3g} GiB, {in_parts.bytes / 2**30:.3g} GiB in up "
        f"to {MAX_BLOCKS} blocks of particles, where the limit is {memory_limit / 2**30:.3g} GiB "
        "(memory_limit). Draw fewer particles, let some of these latents share one particle index "
        "(groups=[(...), ...]), enumerate a discrete one, or split the site into several, each of "
        "which reads few of them.",
        site or next(iter(structure.model), ""),
        in_parts.symbols,
        in_parts.plates,
    )
