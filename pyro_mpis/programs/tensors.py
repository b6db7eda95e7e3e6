# SPDX-License-Identifier: Apache-2.0
"""
Tensors of a mapped run: at which levels they are mapped, and what holds them.

A **level** of :func:`~pyro_mpis.programs.mapped.run_mapped` is known by its number, the outermost
is 0.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch
from torch.distributions import Distribution, Transform

Values = Mapping[str, Tensor]
_VMAP_ALONE: list[bool] = []  # not empty within vmap_alone


@dataclass(frozen=True, eq=False)
class Mapped:
    """A result of a mapped run: a tensor, and the levels that it was computed from."""

    tensor: Tensor  # (*levels, *shape)
    levels: tuple[int, ...]  # in order

    @property
    def shape(self) -> torch.Size:
        """The shape for single values."""
        return self.tensor.shape[len(self.levels) :]

    def __eq__(self, other: object) -> bool:
        """Whether all entries are the same; nan is nan."""
        if not isinstance(other, Mapped) or self.levels != other.levels:
            return False
        one, another = self.tensor, other.tensor
        if one.shape != another.shape or one.dtype != another.dtype:
            return False
        return bool(((one == another) | ((one != one) & (another != another))).all())

    def at(self, level: int) -> int | None:
        """Return the dim of a level; None if the tensor does not read it."""
        return self.levels.index(level) if level in self.levels else None

    def along(self, *levels: int) -> Tensor:
        """
        Return ``(*levels, *shape)``, with size one for levels that the tensor does not read.

        :param levels: those that it reads, and maybe others, in the order that is wanted.
        """
        assert set(self.levels) <= set(levels)
        dims = [self.at(level) for level in levels]
        order = [dim for dim in dims if dim is not None]
        tensor = self.tensor.permute((*order, *range(len(order), self.tensor.dim())))
        sizes = [1 if dim is None else self.tensor.shape[dim] for dim in dims]
        return tensor.reshape((*sizes, *self.shape))

    def of_each(self, number: int) -> Tensor:
        """Return ``(number, *shape)``, one for each value of the first level, read or not."""
        return self.along(0).expand((number, *self.shape))


Said: TypeAlias = dict[str, dict[str, Mapped]]  # site -> what was kept of it


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor differs between the values of a mapped run."""
    return bool(_functorch.is_batchedtensor(tensor))


def mapped_as(other: Tensor, values: Tensor) -> Tensor:
    """Map values, by their first dim, at the innermost level of another tensor."""
    mapped: Tensor = _functorch._add_batch_dim(values, 0, _functorch.maybe_get_level(other))
    return mapped


def tensors_of(part: Any) -> list[Tensor]:
    """Return the tensors that a distribution holds, those of its parts included."""
    tensors: list[Tensor] = []
    pending, known = [part], set[int]()
    while pending:
        part = pending.pop()
        if isinstance(part, Tensor):
            tensors.append(part)
        elif type(part) in (tuple, list):
            pending += reversed(part)
        elif type(part) is dict:
            pending += reversed(part.values())
        elif has_parts(part) and id(part) not in known:
            known.add(id(part))
            pending += reversed(_parts_of(part).values())
    return tensors


def _parts_of(part: Any) -> dict[str, Any]:
    """Return what an object holds, but for what a transform keeps of values that it has met."""
    forgets = isinstance(part, Transform)
    return {
        name: item
        for name, item in vars(part).items()
        if not forgets or not name.startswith("_cache")
    }


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """Return where tensors are combined: on a GPU if one is there; numbers may be elsewhere."""
    devices = [tensor.device for tensor in tensors]
    others = (device for device in devices if device.type != "cpu")
    return next(others, devices[0] if devices else torch.empty(0).device)


def unwrapped(tensor: Tensor) -> Mapped:
    """Return a tensor of the innermost function with its levels as dims on the left."""
    levels: list[int] = []  # counted from 1, the innermost first
    dims: list[int] = []
    while _functorch.is_batchedtensor(tensor):
        levels.append(_functorch.maybe_get_level(tensor))
        dims.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    if any(dims):
        order = list(range(len(levels), tensor.dim()))
        for number in range(len(levels)):
            order.insert(dims[number], len(levels) - 1 - number)
        tensor = tensor.permute([order.index(dim) for dim in range(len(order))])
    return Mapped(tensor, tuple(level - 1 for level in reversed(levels)))


def stripped(tensor: Tensor) -> Mapped:
    """Return what :func:`unwrapped` does, also of a tensor that a program's own transform wraps."""
    mapped = unwrapped(tensor)
    while _functorch.is_functorch_wrapped_tensor(mapped.tensor):  # of a gradient
        inner = unwrapped(_functorch.get_unwrapped(mapped.tensor))
        mapped = Mapped(inner.tensor, inner.levels + mapped.levels)
    return mapped


def sizes_of(*tensors: Tensor) -> dict[int, int]:
    """Return the levels that tensors are mapped at, and their sizes."""
    sizes: dict[int, int] = {}
    for mapped in map(unwrapped, tensors):
        sizes |= dict(zip(mapped.levels, mapped.tensor.shape, strict=False))
    return sizes


def mapped_at(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """
    Return a copy that is mapped at some levels, whether it was or not.

    :param sizes: of the levels, those that the tensor has included.
    """
    mapped = unwrapped(tensor)
    levels = sorted(sizes)
    shape = (*(sizes[level] for level in levels), *mapped.shape)
    result = mapped.along(*levels).expand(shape).clone(memory_format=torch.contiguous_format)
    for level in levels:
        result = _functorch._add_batch_dim(result, 0, level + 1)
    return result


def elementwise(
    function: Callable[..., Tensor], *tensors: Tensor, event_dims: Sequence[int] = ()
) -> Tensor | None:
    """
    Apply a function that broadcasts to mapped tensors, without vmap: it sees all levels as dims.

    It may write into what it has made itself, and takes one step where vmap takes one a level.

    :param event_dims: how many of the rightmost dims of each tensor are not broadcast.
    :return: mapped at all levels of the tensors; None if they are of another transform of
        :mod:`torch.func` too, or within :func:`vmap_alone`.
    """
    if _VMAP_ALONE:
        return None
    device = device_of(tensors)
    if device.type != "cpu":  # torch takes numbers from any device
        tensors = tuple(tensor if tensor.dim() else tensor.to(device) for tensor in tensors)
    parts = [unwrapped(tensor) for tensor in tensors]
    if any(map(_functorch.is_functorch_wrapped_tensor, (part.tensor for part in parts))):
        return None
    levels = sorted({level for part in parts for level in part.levels})
    events = event_dims or [0] * len(tensors)
    dims = max(tensor.dim() - event for tensor, event in zip(tensors, events, strict=True))
    result = function(
        *(
            _left_of(part, levels, dims + event) if part.levels or event_dims else part.tensor
            for part, event in zip(parts, events, strict=True)
        )
    )
    for level in levels:
        result = _functorch._add_batch_dim(result, 0, level + 1)
    return result


@contextmanager
def vmap_alone() -> Iterator[None]:
    """Let all operations be vmap's, so that each tensor shows the levels that it is mapped at."""
    _VMAP_ALONE.append(True)
    try:
        yield
    finally:
        _VMAP_ALONE.pop()


def _left_of(mapped: Mapped, levels: Sequence[int], dims: int) -> Tensor:
    """Return ``(*levels, *dims)``, with size one for what the tensor does not have."""
    tensor, own = mapped.tensor, len(mapped.levels)
    if own == len(levels) and tensor.dim() == own + dims:
        return tensor
    sizes = [1] * len(levels)
    for size, level in zip(tensor.shape, mapped.levels, strict=False):
        sizes[levels.index(level)] = size
    return tensor.reshape((*sizes, *(1,) * (dims + own - tensor.dim()), *tensor.shape[own:]))


def exchange(
    part: Any, change: Callable[[Tensor], Tensor], known: dict[int, Any] | None = None
) -> Any:
    """
    Copy a distribution with other tensors in the place of those that it holds.

    :param known: copies of parts met before: a transform and its inverse hold each other.
    """
    known = {} if known is None else known
    if isinstance(part, Tensor):
        return change(part)
    if type(part) in (tuple, list):
        return type(part)(exchange(item, change, known) for item in part)
    if type(part) is dict:
        return {key: exchange(item, change, known) for key, item in part.items()}
    if has_parts(part):
        if id(part) not in known:
            known[id(part)] = result = copy.copy(part)
            vars(result).update(
                {key: exchange(item, change, known) for key, item in _parts_of(part).items()}
            )
        return known[id(part)]
    return part


def has_parts(part: object) -> bool:
    """Whether something is a distribution, a user's own included, or a transform."""
    if isinstance(part, Distribution | Transform):
        return True
    return hasattr(part, "log_prob") and not isinstance(part, type)
