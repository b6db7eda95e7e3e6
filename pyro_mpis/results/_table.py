# SPDX-License-Identifier: Apache-2.0
"""Tables for a terminal."""

from collections.abc import Sequence


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
