# SPDX-License-Identifier: Apache-2.0
"""What is said of programs that cannot be run at many values at once, and how to write them."""

import os
import re
import traceback
from collections.abc import Set
from typing import Literal, TypeAlias

import torch

from pyro_mpis._text import first_line
from pyro_mpis.programs.rewritten import LIBRARIES, levels_at_error

Name: TypeAlias = Literal["model", "guide"]


class NotMappableError(Exception):
    """
    A program that runs on single values cannot be run at many at once.

    :ivar levels: of the mapped run, those of the values that it failed on, if these are known.
    """

    def __init__(
        self, message: str, remedy: str = "", levels: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.levels = levels


class OtherSitesError(NotMappableError):
    """The sites of a program differ from run to run."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "give a program the same sites in every run: replace branches by torch.where, by "
            "poutine.mask or by a fixed number of steps",
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is used up, not that a program cannot be run."""
    text = str(error)
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate" in text


REMEDIES = {
    "Boolean value of Tensor": "compute both branches and choose by torch.where",
    "data-dependent control flow": "compute both branches and choose by torch.where",
    ".item()": "compute with tensors, without .item(), and choose by torch.where",
    "match the broadcast shape": "write a = a + b in place of a += b",
    "instead of aten::": "use the operation that makes a new tensor, without the _ after its name",
    "inplace": "collect the values in a list, and torch.stack it, or choose by torch.where",
    "in-place": "collect the values in a list, and torch.stack it, or choose by torch.where",
    "same randomness": "draw all random numbers in sample statements that no handler hides",
    "running_mean": "put the network into evaluation mode, by .eval(), before the run",
    "numpy": "compute with torch operations in place of NumPy's",
    "data pointer": "compute with torch operations in place of NumPy's",
    "nonzero": "choose by torch.where or by a mask, in place of a boolean index",
    "dynamic shape": "choose by torch.where or by a mask, in place of a boolean index",
}
LOOK_UP = "look numbers up in a tensor, in place of a list, or choose by torch.where"
OTHER_REMEDY = "use torch operations on whole tensors that torch.func.vmap can map"


def not_mappable(name: Name, last_site: str | None, error: Exception) -> NotMappableError:
    """Say which line of a program torch cannot map, and what to write instead."""
    where = f"at or after site '{last_site}'" if last_site else "at its start"
    line = _line(error)
    found = (remedy for part, remedy in REMEDIES.items() if part in str(error))
    remedy = next(found, OTHER_REMEDY)
    if remedy == REMEDIES[".item()"] and ".item()" not in line and "[" in line:
        remedy = LOOK_UP  # a tensor as the index of a list becomes a number too
    return NotMappableError(
        f"the {name} {where}{line}: {type(error).__name__}: {_reason(error)}",
        remedy,
        levels_at_error(error),
    )


def _reason(error: BaseException) -> str:
    """Return what an error says, without torch's request to report it: the program is at fault."""
    return re.split(r"[,.] (?:If [^.,]*, )?[Pp]lease file ", first_line(error))[0]


def _line(error: BaseException) -> str:
    """Return the user's line that raised an error, for a message."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(LIBRARIES) and frame.line:
            return f", in {os.path.basename(frame.filename)}:{frame.lineno}, `{frame.line}`"
    return ""


def check_same_sites(name: Name, expected: Set[str], found: Set[str]) -> None:
    """Refuse a program whose sites depend on the values of its latents."""
    different = expected ^ found
    if different:
        site = min(different)
        raise OtherSitesError(f"site '{site}' of the {name} is met in some runs only")
