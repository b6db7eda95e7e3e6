# SPDX-License-Identifier: Apache-2.0
"""Cut a run into blocks that fit into memory, from sizes alone, before anything is allocated."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pyro import settings

from pyro_mpis.programs.structure import Site, Structure

# A log_prob, the value that it is computed from and one temporary live at once.
TENSORS_AT_ONCE = 3
# Of the memory that is free, how much a run takes by default.
FRACTION = 0.5
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
# How many more elements may be evaluated for the sake of pieces.
MORE_WORK = 1.25


@settings.register("mpis_memory_fraction", __name__, "FRACTION")
def _check_fraction(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"mpis_memory_fraction: expected a number in (0, 1], but found {value!r}.")


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
    """A factor does not fit into memory, however its particles are cut."""

    def __init__(self, message: str, site: str) -> None:
        super().__init__(message, site)
        self.site = site

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


def fit(structure: Structure, memory_limit: int | None, device: str) -> Cut:
    """
    Find how many particles of which indices to take at once.

    Halves the particles of indices outside of all plates, the largest first, until the largest
    factor fits.

    :param memory_limit: in bytes; ``None`` for no limit.
    :param device: its type; see :class:`torch.device`.
    :raises MemoryError: if no block is small enough, or too many would be needed; names the site
        and the latents that it reads.
    """
    whole = structure.num_particles
    limit = math.inf if memory_limit is None else memory_limit
    goal = min(limit, PIECE_BYTES if device == "cpu" else PIECE_BYTES_OF_GPU)
    blocks = dict(whole)
    while True:
        pieces = _pieces(structure, blocks, goal, limit)
        number = _number(whole, pieces)
        for sizes, needs in ((blocks, _reduced_bytes), (pieces, _bytes)):
            needed, site = _largest(structure, sizes, needs)
            if needed > limit:
                break
        else:
            return Cut(_smaller(blocks, whole), _smaller(pieces, blocks))
        assert site is not None
        symbol = _cuttable(structure, site, blocks)
        if symbol is None or number > MAX_BLOCKS:
            raise _too_large(structure, site, sizes, whole, limit, needs)
        blocks[symbol] = math.ceil(blocks[symbol] / 2)


def _pieces(
    structure: Structure, blocks: Mapping[str, int], goal: float, limit: float
) -> dict[str, int]:
    """Return numbers of particles with which log_probs reach ``goal`` bytes, or come near it."""
    sizes, work = dict(blocks), _work(structure, blocks)
    while True:
        needed, site = _largest(structure, sizes, _bytes)
        symbol = None if site is None else _cuttable(structure, site, sizes, smallest=2)
        if needed <= goal or symbol is None:
            return sizes
        smaller = {**sizes, symbol: math.ceil(sizes[symbol] / 2)}
        more_work = _work(structure, smaller) * _number(blocks, smaller) / work
        if needed <= limit and more_work > MORE_WORK:
            return sizes
        sizes = smaller


def _number(whole: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return into how many parts sizes cut a whole."""
    return math.prod(math.ceil(whole[symbol] / size) for symbol, size in sizes.items())


def _smaller(sizes: Mapping[str, int], whole: Mapping[str, int]) -> dict[str, int]:
    return {symbol: size for symbol, size in sizes.items() if size < whole[symbol]}


def largest_factor(structure: Structure) -> tuple[Site, int]:
    """
    Find the site whose factor is the largest.

    :return: the site, and the bytes that its factor takes, were it evaluated at once.
    """
    sizes = structure.num_particles
    site = max(structure.model.values(), key=lambda site: _elements(structure, site, sizes))
    return site, _bytes(structure, site, sizes)


def takes_long(structure: Structure) -> bool:
    """Whether a run evaluates very many densities."""
    return _work(structure, structure.num_particles) > MUCH_WORK


def long_wait(structure: Structure) -> str | None:
    """
    Say what makes a run long, and what would shorten it, before it starts.

    :return: None if it is not long.
    """
    sizes = structure.num_particles
    work = _work(structure, sizes)
    if work <= MUCH_WORK:
        return None
    site, _ = largest_factor(structure)
    number = len(structure.indices_read(site))
    return (
        f"{work:.1e} densities are to be evaluated, which may take long: site '{site.name}' reads "
        f"{number} particle indices, and has a density for each combination of their particles. "
        f"Half as many particles take one part in {2**number}; latents that many sites read can "
        "share an index: groups=[(...), ...]."
    )


def default_limit(device: str) -> int | None:
    """Return the memory that a run may take by default, in bytes; None where it is unknown."""
    free = free_bytes(torch.device(device))
    return None if free is None else int(free * FRACTION)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None where it cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        with open("/proc/meminfo") as file:  # counts what the system's caches would give back
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _elements(structure: Structure, site: Site, sizes: Mapping[str, int]) -> int:
    """Return the number of elements that a site's log_prob is computed from."""
    return structure.elements(site) * math.prod(sizes[s] for s in structure.indices_read(site))


def _bytes(structure: Structure, site: Site, sizes: Mapping[str, int]) -> int:
    itemsize = torch.get_default_dtype().itemsize
    return _elements(structure, site, sizes) * itemsize * TENSORS_AT_ONCE


def _reduced_bytes(structure: Structure, site: Site, sizes: Mapping[str, int]) -> int:
    """Return what a contraction needs for a factor, summed over the plates without an index."""
    reads = structure.indices_read(site)
    plates = (site.factor_plates & structure.plates_of_indices).union(
        *(structure.by_symbol[s].plates for s in reads)
    )
    elements = math.prod(structure.plates[symbol].size for symbol in plates)
    elements *= math.prod(sizes[symbol] for symbol in reads)
    return elements * torch.double.itemsize * TENSORS_AT_ONCE


def _work(structure: Structure, sizes: Mapping[str, int]) -> int:
    return sum(_elements(structure, site, sizes) for site in structure.model.values())


def _largest(
    structure: Structure,
    sizes: Mapping[str, int],
    needs: Callable[[Structure, Site, Mapping[str, int]], int],
) -> tuple[int, Site | None]:
    """Return how much memory the site needs that needs most, and that site."""
    needed = {site.name: needs(structure, site, sizes) for site in structure.model.values()}
    name = max(needed, key=lambda name: needed[name], default=None)
    return (0, None) if name is None else (needed[name], structure.model[name])


def _cuttable(
    structure: Structure, site: Site, sizes: Mapping[str, int], smallest: int = 1
) -> str | None:
    """Return the index outside of all plates with most particles, of those that a site reads."""
    cuttable = [
        symbol
        for symbol in sorted(structure.indices_read(site))
        if sizes[symbol] >= 2 * smallest
        and not structure.by_symbol[symbol].plates
        and not structure.by_symbol[symbol].enumerated
    ]
    return max(cuttable, key=lambda symbol: sizes[symbol], default=None)


def _too_large(
    structure: Structure,
    site: Site,
    sizes: Mapping[str, int],
    whole: Mapping[str, int],
    memory_limit: float,
    needs: Callable[[Structure, Site, Mapping[str, int]], int],
) -> TooLargeError:
    indices = [structure.by_symbol[symbol] for symbol in sorted(structure.indices_read(site))]
    parts = [f"{' and '.join(i.sites)}: {whole[i.symbol]}" for i in indices[:NAMED]]
    if len(indices) > NAMED:
        parts.append(f"and {len(indices) - NAMED} more")
    plates = [structure.plates[symbol] for symbol in sorted(site.plates)]
    parts += [f"plate {plate.name}: {plate.size}" for plate in plates]
    needed = needs(structure, site, whole) / 2**30
    smallest = needs(structure, site, sizes) / 2**30
    return TooLargeError(
        f"site '{site.name}': its log_prob has one element for each combination of "
        f"{', '.join(parts)}: {needed:.3g} GiB, {smallest:.3g} GiB in up to {MAX_BLOCKS} blocks "
        f"of particles, where the limit is {memory_limit / 2**30:.3g} GiB (memory_limit). Draw "
        "fewer particles, let some of these latents share one particle index "
        "(groups=[(...), ...]), enumerate a discrete one, or split the site into several, each of "
        "which reads few of them.",
        site.name,
    )
