# SPDX-License-Identifier: Apache-2.0
"""What a run is asked for, and checks of it."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyro_mpis._typing import NumSamples, Program

DEFAULT_NUM_SAMPLES = 10  # of sites without a number, where others have one


@dataclass(frozen=True)
class Options:
    """What a run is asked for, checked when it is made."""

    num_samples: int | None  # of each index that has no number of its own; None if not given
    numbers: Mapping[str, int] = field(default_factory=dict)  # site -> number of its index
    groups: tuple[tuple[str, ...], ...] = ()
    shared_plates: tuple[str, ...] = ()
    max_plate_nesting: int | None = None
    memory_limit: int | None = None
    stratified: bool = True
    time_limit: float | None = None  # seconds, to choose a number by that is not given


def checked_numbers(num_samples: NumSamples) -> int | dict[str | None, int]:
    """Check a number of particles, or those of sites and, under ``None``, of all others."""
    if not isinstance(num_samples, Mapping):
        return positive("num_samples", num_samples)
    numbers: dict[str | None, int] = {}
    for name, number in num_samples.items():
        if name is not None and not isinstance(name, str):
            raise ValueError(
                f"num_samples: expected names of sites, or None for all others, but found {name!r}."
            )
        where = "all others (None)" if name is None else f"'{name}'"
        numbers[name] = positive(f"num_samples of {where}", number)
    return numbers


def positive(name: str, number: int) -> int:
    """Return a positive integer, of any integer type."""
    try:
        value = operator.index(number)
    except TypeError:
        value = 0
    if isinstance(number, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, but found {number!r}.")
    return value


def checked_program(name: str, program: Program) -> Program:
    """Return a model or guide: anything that can be called."""
    if not callable(program):
        raise ValueError(f"{name}: expected a callable, but found {type(program).__name__}.")
    return program


def number_of_bytes(memory_limit: int | None) -> int | None:
    """Return a limit of memory, or None for none of the user's."""
    if memory_limit is not None and (isinstance(memory_limit, bool) or memory_limit <= 0):
        raise ValueError(
            f"memory_limit: expected a positive number of bytes, but found {memory_limit!r}."
        )
    return memory_limit


def number_of_seconds(time_limit: float) -> float:
    """Return a limit of time."""
    if not time_limit > 0:
        raise ValueError(
            f"time_limit: expected a positive number of seconds, but found {time_limit!r}."
        )
    return float(time_limit)


def number_of_dims(max_plate_nesting: float | None) -> int | None:
    """Return a number of batch dims, or None for one to be found."""
    if max_plate_nesting is None or max_plate_nesting == math.inf:
        return None
    if isinstance(max_plate_nesting, bool) or max_plate_nesting not in range(64):
        raise ValueError(
            f"max_plate_nesting: expected a number of dims, but found {max_plate_nesting!r}."
        )
    return int(max_plate_nesting)


def checked_groups(groups: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Return groups of site names; a name alone, a sequence of letters, is none."""
    for group in groups:
        if isinstance(group, str):
            raise ValueError(f"groups: expected sequences of site names, but found '{group}'.")
    return tuple(map(tuple, groups))
