# SPDX-License-Identifier: Apache-2.0
"""What a run would take, and what would help, for the user to read."""

import html
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from pyro_mpis._text import data_frame, html_table, table

if TYPE_CHECKING:
    from pandas import DataFrame

HEADER = ("K", "entries", "memory", "in parts", "seconds")


@dataclass(frozen=True)
class Cost:
    """
    What a run takes with one number of particles.

    :param num_samples: K, the number of particles of each site.
    :param entries: number of log densities that are evaluated.
    :param memory: in bytes, if nothing is cut into parts.
    :param parts: blocks and pieces that fit into the limit; 0 if none do.
    :param seconds: about how long ``run`` takes.
    """

    num_samples: int
    entries: int  # of all log_probs
    memory: int  # bytes, if nothing is cut
    parts: int  # blocks and pieces that fit into the limit; 0 if none do
    seconds: float


@dataclass(frozen=True)
class Advice:
    """
    A change that would help: the options of ``MPImportance``, and why.

    :param text: the advice in words.
    :param groups: groups to give.
    :param enumerate: discrete sites to mark for an exact sum.
    :param num_samples: the number of particles that then fits, if it is the same for all sites.
    :param particles: the number for each random site that fits into the same memory and time.
    """

    text: str
    groups: tuple[tuple[str, ...], ...] = ()
    enumerate: tuple[str, ...] = ()
    num_samples: int | None = None
    particles: Mapping[str, int] | None = None


@dataclass(frozen=True, repr=False)
class RunPlan:
    """
    What :meth:`~pyro_mpis.MPImportance.plan` finds: what a run would take, and what would help.

    ``print`` it in a terminal; in a notebook it shows itself.

    :param costs: what a run takes, at several numbers of particles.
    :param largest: what takes most of the memory.
    :param advice: changes that would help, the best first.
    :param memory_limit: in bytes; None if it is not known.
    :param given: what the run takes, if sites have different numbers of particles; else None.
    :param num_replicates: how many such runs there are; those of ``costs`` are one.
    """

    costs: tuple[Cost, ...]
    largest: str  # what takes most memory at the K of the run
    advice: tuple[Advice, ...]
    memory_limit: int | None  # bytes
    given: Cost | None = None
    num_replicates: int = 1

    def __str__(self) -> str:
        """Return the table and the advice as text."""
        parts = [table(self._lines(), left=())] if self.costs else []
        texts = [*self._remarks(), *(f"- {item.text}" for item in self.advice)]
        return "\n".join([*parts, *map(_wrapped, texts)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table and the advice as a notebook shows them."""
        parts = [html_table(self._lines())] if self.costs else []
        parts += [f"<p>{html.escape(remark)}</p>" for remark in self._remarks()]
        items = "".join(f"<li>{html.escape(item.text)}</li>" for item in self.advice)
        return "".join([*parts, f"<ul>{items}</ul>" if items else ""])

    def to_dataframe(self) -> "DataFrame":
        """
        Return the costs as a pandas ``DataFrame``, indexed by the number of particles.

        :raises ImportError: without pandas.
        """
        columns = [field.name for field in fields(Cost)]
        values = {name: [getattr(cost, name) for cost in self.costs] for name in columns}
        return data_frame(values).set_index("num_samples")

    def _lines(self) -> list[tuple[str, ...]]:
        return [HEADER, *(_cells(cost) for cost in self.costs)]

    def _remarks(self) -> list[str]:
        limit = "unknown" if self.memory_limit is None else _bytes(self.memory_limit)
        remarks = [f"memory limit: {limit}", f"largest: {self.largest}"]
        if self.given is not None:
            _, entries, memory, parts, seconds = _cells(self.given)
            remarks.append(
                f"with the numbers of particles given: {entries} entries, {memory}, in parts: "
                f"{parts}, {seconds} seconds"
            )
        if self.num_replicates > 1:
            remarks.append(f"all of this is for one replicate; there are {self.num_replicates}")
        return remarks


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        str(cost.num_samples),
        f"{cost.entries:.1e}",
        _bytes(cost.memory),
        "does not fit" if cost.parts == 0 else str(cost.parts),
        f"{cost.seconds:.2g}" if cost.seconds < 1e6 else f"{cost.seconds:.0e}",
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 88, subsequent_indent="  ", break_on_hyphens=False)


def _bytes(number: int) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * 2**40 else f"{number:.0e} B"
    return f"{number / 2**10:.3g} KiB"
