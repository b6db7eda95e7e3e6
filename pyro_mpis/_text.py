# SPDX-License-Identifier: Apache-2.0
"""Small helpers for messages and shapes, for every module."""

from collections.abc import Iterable, Sequence, Set

import pyro
import torch


def first_line(error: BaseException) -> str:
    """Return an error's message without the table of shapes that Pyro appends."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def quoted(names: Iterable[str]) -> str:
    """Return names, quoted, for a message: in their order, sorted if they have none."""
    ordered = sorted(names) if isinstance(names, Set) else names
    return ", ".join(f"'{name}'" for name in ordered)


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that others broadcast to; torch's own function loads half a library."""
    return torch.Size(pyro.distributions.util.broadcast_shape(*shapes))
