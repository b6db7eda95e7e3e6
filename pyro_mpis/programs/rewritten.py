# SPDX-License-Identifier: Apache-2.0
"""Let programs run mapped whose operations or distributions torch cannot map as they stand."""

import contextlib
import linecache
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_mpis.programs.deferred import first_of, made_or_deferred
from pyro_mpis.programs.tensors import (
    device_of,
    exchange,
    is_mapped,
    sizes_of,
    tensors_of,
    unwrapped,
)
from pyro_mpis.programs.written import Written, levels_written, target_of

# Where code lies that is not the user's.
LIBRARIES = tuple(
    os.path.dirname(str(file)) + os.sep
    for file in (torch.__file__, pyro.__file__, os.path.dirname(__file__), contextlib.__file__)
)

# Of Pyro: each asks whether any value needs special care, and its way for these is right for all.
SHORT_CUTS = {"_standard_stable", "_safe_shift"}


@contextmanager
def rewritten(written: Written | None = None) -> Iterator[None]:
    """
    Let programs run whose operations or distributions torch cannot map as they stand.

    :param written: finds tensors that mapped values are written into.
    """
    COERCIONS.append(made_or_deferred)
    try:
        with _Rewritten(_REWRITTEN, written):
            yield
    finally:
        COERCIONS.remove(made_or_deferred)


@contextmanager
def by_forward() -> Iterator[None]:
    """Apply functions of autograd that torch cannot map by their formula, without a derivative."""
    apply = vars(torch.autograd.Function)["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.setup_context is torch.autograd.Function.setup_context:
            return cls.forward(_NoContext(), *args, **kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)  # in C since torch 2.14

    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


class _NoContext:
    """What a function of autograd may keep for its derivative: nothing is asked for."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Mark nothing."""


# Kept with the error that an operation raised: the levels that it read, and whether it could not
# write what is mapped into a tensor that is not.
READ, WRITES = "pyro_mpis: levels that the operation read", "pyro_mpis: writes"


def _levels_of(part: object) -> frozenset[int]:
    """Return the levels that the tensors within something are mapped at."""
    return frozenset(sizes_of(*tensors_of(part)))


def levels_at_error(error: BaseException | None) -> frozenset[int]:
    """Return the levels of the values that an operation failed on; none if that is not known."""
    return next((frozenset(kept[READ]) for kept in _kept_with(error) if READ in kept), frozenset())


def is_write(error: BaseException | None) -> bool:
    """Whether an operation failed to write what is mapped into a tensor that is not."""
    return any(WRITES in kept for kept in _kept_with(error))


def _kept_with(error: BaseException | None) -> Iterator[dict[str, Any]]:
    """Yield what is kept with an error, then with each that it came from."""
    while error is not None:
        yield vars(error)
        error = error.__cause__ or error.__context__


class _Replaced(TorchFunctionMode):
    """
    Other functions in the place of some operations.

    :param table: operation -> function, which may return ``NotImplemented``.
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.apply(func, tuple(args), dict(kwargs or {}))

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply an operation, or what is in its place."""
        replacement = self.table.get(func)
        if replacement is not None:
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            moved = _beside_others((args, kwargs)) if "same device" in str(error) else None
            if moved is None:
                raise
            return func(*moved[0], **moved[1])


class _Rewritten(_Replaced):
    """Operations that torch cannot map, in terms of others that it can."""

    def __init__(
        self, table: Mapping[Any, Callable[..., Any]], written: Written | None = None
    ) -> None:
        super().__init__(table)
        self.written = written

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply an operation; an error notes which levels it failed on."""
        try:
            result = super().apply(func, args, kwargs)
        except Exception as error:
            target, others = target_of(func, args), (args[1:], kwargs)
            if target is not None and levels_written(target, others):
                if self.written is not None and self.written.note(target, others):
                    # this run goes on for the sake of the writes that follow
                    with contextlib.suppress(Exception):
                        left, named = exchange(others, first_of)
                        super().apply(func, (target, *left), named)
                    return target
                setattr(error, WRITES, True)
            vars(error).setdefault(READ, _levels_of((args, kwargs)))
            raise
        if self.written is None:
            return result
        return self.written.result(_place(), func, result, args, kwargs)


def _beside_others(part: Any) -> Any:
    """
    Move numbers to the device that the tensors beside them are on; None if there are none to move.

    Torch combines a number with tensors of any device. In a mapped run it takes it for a vector.
    """
    tensors = tensors_of(part)
    devices = {tensor.device for tensor in tensors if tensor.dim()} or {device_of(tensors)}
    if len(devices) != 1 or not any(map(is_mapped, tensors)):
        return None
    (device,) = devices
    return exchange(part, lambda tensor: tensor if tensor.dim() else tensor.to(device))


def _set_item(tensor: Tensor, index: Any, value: Any) -> Any:
    """Write where a mask says, as a choice between old and new values."""
    if not (isinstance(index, Tensor) and index.dtype == torch.bool):
        return NotImplemented
    value = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
    if value.dim():
        return NotImplemented
    mask = index.reshape(index.shape + (1,) * (tensor.dim() - index.dim()))
    return tensor.copy_(torch.where(mask, value, tensor))


def _get_item(tensor: Tensor, index: Any) -> Any:
    """Select by one mapped number, which torch up to 2.9 takes for a Python one."""
    parts = index if type(index) is tuple else (index,)
    chosen = [n for n, part in enumerate(parts) if isinstance(part, Tensor)]
    if len(chosen) != 1 or tensor.dim() == 0:
        return NotImplemented
    (dim,) = chosen
    number = parts[dim]
    others = parts[:dim] + parts[dim + 1 :]
    scalar = number.dim() == 0 and number.dtype != torch.bool
    if not scalar or not is_mapped(number) or any(part != slice(None) for part in others):
        return NotImplemented
    return tensor.index_select(dim, number.reshape(1)).squeeze(dim)


def _squeeze(tensor: Tensor, *dims: Any, **kwargs: Any) -> Any:
    """Leave a scalar as it is."""
    return tensor if tensor.dim() == 0 else NotImplemented


def _truth(tensor: Tensor) -> Any:
    """
    Take a branch that all combinations take, where it is a check.

    Checks are branches within torch and Pyro, and assertions of the user's. Whether another branch
    is taken depends on the particles. If they were combined when all take the same branch, and not
    when they differ, the estimate would be biased. So a program with such a branch runs once for
    each particle, whatever they are.
    """
    if not is_mapped(tensor) or tensor.numel() != 1 or not _is_check():
        return NotImplemented
    is_true = unwrapped(tensor).tensor.bool()
    if bool(is_true.all()):
        return True
    if not bool(is_true.any()):
        return False
    frame = _looking()
    is_short_cut = frame is not None and frame.f_code.co_name in SHORT_CUTS
    return True if is_short_cut else NotImplemented


def _looking() -> FrameType | None:
    """Return the frame of the program that looks at a value."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name in ("handle_torch_function", "wrapped"):
        frame = frame.f_back
    return frame


def _place() -> tuple[object, ...]:
    """Return where an operation is called, and where that is for the user's code."""
    frame = own = _looking()
    while own is not None and own.f_code.co_filename.startswith(LIBRARIES):
        own = own.f_back
    return tuple(part for f in (frame, own) if f is not None for part in (f.f_code, f.f_lasti))


def _is_check() -> bool:
    """Whether the line of a program that looks at a value is within a library, or an assertion."""
    frame = _looking()
    if frame is None or frame.f_code.co_filename.startswith(LIBRARIES):
        return True
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith("assert ")


def _cholesky(matrix: Tensor, *, upper: bool = False) -> Tensor:
    """Return nan where a matrix is not positive definite: another density may rule it out."""
    factor, info = torch.linalg.cholesky_ex(matrix, upper=upper)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


class CholeskyOrNan(_Replaced):
    """Let programs go on where a matrix is not positive definite, with nan."""

    def __init__(self) -> None:
        super().__init__({torch.linalg.cholesky: _cholesky})


NAN_IS_FOUND = {"cpu"}  # devices where an index out of bounds is an error like others


def _converted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Refuse nan as an integer, where it may become an index."""
    dtypes = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]
    if any(dtype.is_floating_point for dtype in dtypes) or tensor.device.type in NAN_IS_FOUND:
        return NotImplemented
    if tensor.is_floating_point() and bool(unwrapped(tensor).tensor.isnan().any()):
        raise IndexError("nan is no index")
    return NotImplemented


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    is_dtype = any(isinstance(part, torch.dtype) for part in (*args, *kwargs.values()))
    return _converted(tensor, *args, **kwargs) if is_dtype else NotImplemented


class NoNanAsIndex(_Replaced):
    """
    Raise an error where nan becomes an integer, on a GPU.

    There an index out of bounds ends all work of the process on the device.
    """

    def __init__(self) -> None:
        super().__init__(
            {Tensor.long: _converted, Tensor.int: _converted, Tensor.to: _to, Tensor.type: _to}
        )


def _number(tensor: Tensor) -> Any:
    """Take a number out of a tensor if it is the same for all combinations."""
    if not is_mapped(tensor) or tensor.numel() != 1 or not _is_check():
        return NotImplemented
    values = unwrapped(tensor).tensor.flatten()
    return values[0].item() if bool((values == values[0]).all()) else NotImplemented


def _as(kind: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
    """Return a conversion to a Python number of the given kind."""

    def convert(tensor: Tensor) -> Any:
        number = _number(tensor)
        return number if number is NotImplemented else kind(number)

    return convert


_REWRITTEN: dict[Any, Callable[..., Any]] = {
    Tensor.data.__get__: lambda tensor: tensor.detach(),  # type: ignore[attr-defined]
    Tensor.__bool__: _truth,
    Tensor.__float__: _as(float),
    Tensor.__int__: _as(int),
    Tensor.__index__: _as(int),
    Tensor.item: _number,
    Tensor.__setitem__: _set_item,
    Tensor.__getitem__: _get_item,
    Tensor.squeeze: _squeeze,
    torch.squeeze: _squeeze,
    torch.linalg.cholesky: _cholesky,
}
