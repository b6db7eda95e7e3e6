# SPDX-License-Identifier: Apache-2.0
"""Whether values are of the types that dataclasses declare."""

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_fields(record: object) -> None:
    """
    Check that each field of a dataclass holds what it declares.

    A number of any type passes for any other. Of dataclasses inside only the type is looked at.

    :raises ValueError: if not; names the field.
    """
    for name, declared in get_type_hints(type(record)).items():
        if not is_of(getattr(record, name), declared):
            raise ValueError(f"{type(record).__name__}.{name} is not of the type {declared}")


def is_of(value: object, declared: Any) -> bool:
    """Return whether a value is of a type, its elements included."""
    origin, arguments = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return any(is_of(value, choice) for choice in arguments)
    if origin is Literal:
        return any(value == choice for choice in arguments)
    if origin is tuple and isinstance(value, tuple):
        if arguments[-1] is Ellipsis:
            return all(is_of(item, arguments[0]) for item in value)
        pairs = zip(value, arguments, strict=False)
        return len(value) == len(arguments) and all(is_of(*pair) for pair in pairs)
    if origin is frozenset and isinstance(value, frozenset):
        return all(is_of(item, arguments[0]) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        keys, values = arguments
        return all(is_of(key, keys) and is_of(item, values) for key, item in value.items())
    if origin is not None:  # another container, or a type that no record has so far
        return isinstance(value, origin)
    if declared in (bool, int, float):
        return isinstance(value, int | float)
    return isinstance(value, declared)
