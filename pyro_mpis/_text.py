# SPDX-License-Identifier: Apache-2.0
"""What messages and tables are written with, and the one rule for shapes that broadcast."""

from collections.abc import Collection, Iterable, Sequence, Set

import torch
from pyro.distributions import util


def first_line(error: BaseException) -> str:
    """Return an error's message without the table of shapes that Pyro appends."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def quoted(names: Iterable[str]) -> str:
    """Return names, quoted, for a message: in their order, sorted if they have none."""
    ordered = sorted(names) if isinstance(names, Set) else names
    return ", ".join(f"'{name}'" for name in ordered)


def table(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """
    Align the columns of a table.

    :param lines: the cells of each line, the header's first.
    :param left: the columns to align on the left.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that others broadcast to; torch's own function loads half a library."""
    return torch.Size(util.broadcast_shape(*shapes))


def range_of(numbers: Collection[int]) -> str:
    """Return "3", or "3 to 10"."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
