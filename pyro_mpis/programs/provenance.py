# SPDX-License-Identifier: Apache-2.0
"""
Values that carry the names of the random sites they were computed from.

Pyro's :class:`~pyro.ops.provenance.ProvenanceTensor`, and everything that reads it, with a shorter
way through the common operations: a plain run of a program consists of hundreds of them, each a
few microseconds, and to flatten their arguments as trees takes ten times as long.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, extract_provenance, track_provenance
from torch import Tensor


class TrackedTensor(ProvenanceTensor):
    """A tensor with the names of the random sites that it was computed from."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        """Apply an operation to the tensors themselves, and mark what comes out."""
        names: set[str] = set()
        plain_args = [arg if type(arg) in _WITHOUT_PARTS else _plain(arg, names) for arg in args]
        if not kwargs:
            return tracked(func(*plain_args), frozenset(names))
        plain_kwargs = {key: _plain(arg, names) for key, arg in kwargs.items()}
        return tracked(func(*plain_args, **plain_kwargs), frozenset(names))


_WITHOUT_PARTS = {Tensor, int, float, bool, type(None), torch.Size}  # the common ones


def tracked(result: Any, names: frozenset[str]) -> Any:
    """
    Mark the tensors of a result with the names of random sites.

    :param result: anything; what holds no tensors is returned as it is.
    """
    if type(result) is Tensor or type(result) is torch.nn.Parameter:
        if not names:
            return result
        marked = result.as_subclass(TrackedTensor)
        marked._t = result  # what detach_provenance returns: the same object, always
        marked._provenance = names
        return marked
    if type(result) in (tuple, list):
        return type(result)(tracked(part, names) for part in result)
    if isinstance(result, Tensor | tuple | list | dict | set) and type(result) is not torch.Size:
        return track_provenance(result, names)
    return result


def _plain(arg: object, names: set[str]) -> object:
    """Return an argument without marks, and add its names to those found."""
    if isinstance(arg, ProvenanceTensor):
        names |= arg._provenance
        return arg._t
    if type(arg) in (tuple, list):
        return type(arg)(_plain(part, names) for part in arg)  # type: ignore[attr-defined,call-arg]
    if isinstance(arg, tuple | list | dict | set) and type(arg) is not torch.Size:
        plain, own = extract_provenance(arg)
        names |= own
        return plain
    return arg
