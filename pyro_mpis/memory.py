# SPDX-License-Identifier: Apache-2.0
"""Refuse a run whose tensors cannot fit, before anything large is allocated."""

import math
import os

import torch

from pyro_mpis.dependencies import Site, Structure

# A log_prob, the value that it is computed from and one temporary live at once.
TENSORS_AT_ONCE = 3


def check_memory(structure: Structure, num_samples: int, device: torch.device) -> None:
    """
    Check that the largest factor fits into free memory.

    :raises MemoryError: if not, with the site and the latents that it reads.
    """
    free = free_bytes(device)
    if free is None or not structure.model:
        return
    largest = max(
        structure.model.values(), key=lambda site: _elements(structure, site, num_samples)
    )
    elements = _elements(structure, largest, num_samples)
    needed = elements * torch.get_default_dtype().itemsize * TENSORS_AT_ONCE
    if needed <= free:
        return
    reads = structure.reads(largest)
    indices = [structure.by_symbol[symbol] for symbol in sorted(reads)]
    sizes = [f"{' and '.join(i.sites)}: {i.support or num_samples}" for i in indices]
    plates = [structure.plates[symbol] for symbol in sorted(largest.plates)]
    sizes += [f"plate {plate.name}: {plate.size}" for plate in plates]
    raise MemoryError(
        f"site '{largest.name}': its log_prob has {elements:.3g} elements ({', '.join(sizes)}), "
        f"which takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. Draw "
        "fewer particles, or let some of these latents share one particle index: "
        "groups=[(...), ...]."
    )


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None where it cannot be known."""
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


def _elements(structure: Structure, site: Site, num_samples: int) -> int:
    reads = structure.reads(site)
    sizes = [structure.by_symbol[symbol].support or num_samples for symbol in reads]
    return math.prod(sizes) * math.prod(structure.plates[s].size for s in site.plates)
