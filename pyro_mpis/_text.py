# SPDX-License-Identifier: Apache-2.0
"""What messages and tables are written with, and the one rule for shapes that broadcast."""

import html
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

import torch
from pyro.distributions import util

if TYPE_CHECKING:
    from pandas import DataFrame


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


def html_table(lines: Sequence[Sequence[str]], caption: str = "") -> str:
    """
    Write a table for a notebook, in the notebook's own style.

    :param lines: the cells of each line, the header's first; the first cell names the line.
    """
    header, *rows = ([html.escape(cell) for cell in line] for line in lines)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    below = f"<p>{html.escape(caption)}</p>" if caption else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def scalars(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of all scalars of a site, such as ``theta[0,1]``, the last dim fastest."""
    positions = itertools.product(*(range(size) for size in shape))
    return [f"{name}[{','.join(map(str, p))}]" if p else name for p in positions]


def data_frame(columns: Mapping[str, Sequence[object]]) -> "DataFrame":
    """
    Return a pandas ``DataFrame``.

    :raises ImportError: without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a DataFrame needs pandas: pip install pandas") from error
    return pandas.DataFrame(columns)


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that others broadcast to; torch's own function loads half a library."""
    return torch.Size(util.broadcast_shape(*shapes))


def range_of(numbers: Collection[int]) -> str:
    """Return "3", or "3 to 10"."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
