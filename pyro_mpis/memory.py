# SPDX-License-Identifier: Apache-2.0
"""Cut a run into blocks that fit into memory, from sizes alone, before anything is allocated."""

import math
import os
from collections.abc import Mapping

import torch
from pyro import settings

from pyro_mpis.dependencies import Site, Structure

# A log_prob, the value that it is computed from and one temporary live at once.
TENSORS_AT_ONCE = 3
# Of the memory that is free, how much a run takes by default.
FRACTION = 0.5
# More blocks than anyone would wait for.
MAX_BLOCKS = 10_000


@settings.register("mpis_memory_fraction", __name__, "FRACTION")
def _check_fraction(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"mpis_memory_fraction: expected a number in (0, 1], but found {value!r}.")


def plan_blocks(structure: Structure, num_samples: int, memory_limit: int | None) -> dict[str, int]:
    """
    Find how many particles of which indices to take at once.

    Halves the particles of indices outside of all plates, the largest first, until the largest
    factor fits.

    :param memory_limit: in bytes; ``None`` for no limit.
    :return: symbol of the index -> number of particles in a block; empty if all fits.
    :raises MemoryError: if no block is small enough, or too many would be needed; names the site
        and the latents that it reads.
    """
    if memory_limit is None or not structure.model:
        return {}
    sizes = {index.symbol: index.support or num_samples for index in structure.indices}
    blocks: dict[str, int] = {}
    while True:
        site = max(structure.model.values(), key=lambda site: _elements(structure, site, sizes))
        if _bytes(structure, site, sizes) <= memory_limit:
            return blocks
        cuttable = [
            symbol
            for symbol in sorted(structure.reads(site))
            if sizes[symbol] > 1
            and not structure.by_symbol[symbol].plates
            and not structure.by_symbol[symbol].enumerated
        ]
        count = math.prod(math.ceil(num_samples / size) for size in blocks.values())
        if not cuttable or count > MAX_BLOCKS:
            raise _too_large(structure, site, num_samples, sizes, memory_limit)
        largest = max(cuttable, key=lambda symbol: sizes[symbol])
        sizes[largest] = math.ceil(sizes[largest] / 2)
        blocks[largest] = sizes[largest]


def default_limit(device: torch.device) -> int | None:
    """Return the memory that a run may take by default, in bytes; None where it is unknown."""
    free = free_bytes(device)
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
    plates = math.prod(structure.plates[symbol].size for symbol in site.plates)
    plates *= math.prod(site.batch_shape[dim] for dim in site.undeclared)
    return plates * math.prod(sizes[symbol] for symbol in structure.reads(site))


def _bytes(structure: Structure, site: Site, sizes: Mapping[str, int]) -> int:
    itemsize = torch.get_default_dtype().itemsize
    return _elements(structure, site, sizes) * itemsize * TENSORS_AT_ONCE


def _too_large(
    structure: Structure, site: Site, num_samples: int, sizes: Mapping[str, int], memory_limit: int
) -> MemoryError:
    indices = [structure.by_symbol[symbol] for symbol in sorted(structure.reads(site))]
    parts = [f"{' and '.join(i.sites)}: {i.support or num_samples}" for i in indices]
    plates = [structure.plates[symbol] for symbol in sorted(site.plates)]
    parts += [f"plate {plate.name}: {plate.size}" for plate in plates]
    whole = {index.symbol: index.support or num_samples for index in structure.indices}
    needed = _bytes(structure, site, whole) / 2**30
    smallest = _bytes(structure, site, sizes) / 2**30
    return MemoryError(
        f"site '{site.name}': its log_prob has one element for each combination of "
        f"{', '.join(parts)}: {needed:.3g} GiB, {smallest:.3g} GiB in up to {MAX_BLOCKS} blocks "
        f"of particles, where the limit is {memory_limit / 2**30:.3g} GiB (memory_limit). Draw "
        "fewer particles, let some of these latents share one particle index "
        "(groups=[(...), ...]), or enumerate a discrete one."
    )
