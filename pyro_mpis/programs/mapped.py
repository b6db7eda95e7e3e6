# SPDX-License-Identifier: Apache-2.0
r"""
Run a function written for single values at many values at once: nested :func:`torch.func.vmap`.

Each **level** maps the values of some sites together: level 0 is the outermost. The function sees
one value of each site, in the shapes of an ordinary run. What it computes is mapped at the levels
of the values that it was computed from, and at no others, so a result shows by itself what was
read, and no code can mix particles.

Results are taken out from within the innermost function (:func:`unwrapped`), since vmap expands
what a function returns over all levels, read or not.
"""

import contextlib
import copy
import linecache
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch._C import _functorch
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode

Values = Mapping[str, Tensor]

# Where code lies that is not the user's.
LIBRARIES = tuple(
    os.path.dirname(str(file)) + os.sep
    for file in (torch.__file__, pyro.__file__, os.path.dirname(__file__), contextlib.__file__)
)
MAX_LOOP = 1_000  # combinations that are worth a call of a distribution's log_prob each


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


Said: TypeAlias = dict[str, dict[str, Mapped]]  # site -> what was kept of it


def run_mapped(
    function: Callable[[dict[str, Tensor]], None], levels: Sequence[Values], *, patched: bool
) -> None:
    """
    Call a function of single values once, mapped over each level.

    :param levels: site -> ``(size, *shape)``, of one size in each level.
    :param patched: whether to rewrite some operations that torch cannot map.
    """
    with _quiet(), _by_formula(), _rewritten() if patched else nullcontext():
        _enter(function, levels, {})


def _enter(
    function: Callable[[dict[str, Tensor]], None],
    levels: Sequence[Values],
    values: dict[str, Tensor],
) -> tuple[()]:
    """
    Map over the first of some levels, and within it over the others.

    No closure refers to itself here: the cycle would keep all results until garbage is collected.
    """
    if not levels:
        function(values)
        return ()
    names = tuple(levels[0])

    def inner(*own: Tensor) -> tuple[()]:
        return _enter(function, levels[1:], values | dict(zip(names, own, strict=True)))

    torch.func.vmap(inner, randomness="same")(*levels[0].values())
    return ()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's notes on operations that it maps by a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*batching rule.*")
        yield


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
        elif _has_parts(part) and id(part) not in known:
            known.add(id(part))
            pending += reversed(vars(part).values())
    return tensors


def unwrapped(tensor: Tensor) -> Mapped:
    """Return a tensor of the innermost function with its levels as dims on the left."""
    dims = list(range(-tensor.dim(), 0))  # levels are counted from 1, and dims negative
    while _functorch.is_batchedtensor(tensor):
        dims.insert(_functorch.maybe_get_bdim(tensor), _functorch.maybe_get_level(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    levels = sorted(dim for dim in dims if dim > 0)
    order = [dims.index(dim) for dim in (*levels, *range(len(levels) - len(dims), 0))]
    if order != sorted(order):
        tensor = tensor.permute(order)
    return Mapped(tensor, tuple(level - 1 for level in levels))


def _combinations(tensors: Sequence[Tensor]) -> int:
    """Return the number of combinations that mapped tensors have together; 0 if none is mapped."""
    sizes: dict[int, int] = {}
    for tensor in filter(_functorch.is_batchedtensor, tensors):
        mapped = unwrapped(tensor)
        sizes |= dict(zip(mapped.levels, mapped.tensor.shape, strict=False))
    return math.prod(sizes.values()) if sizes else 0


class _Looped(torch.autograd.Function):
    """Apply a function of tensors that torch cannot map to one value after the other."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], function: Callable[..., Tensor], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        rows = [
            _looped(
                function,
                *(
                    tensor if dim is None else tensor.select(dim, number)
                    for tensor, dim in zip(tensors, in_dims[1:], strict=True)
                ),
            )
            for number in range(info.batch_size)
        ]
        return torch.stack(rows), 0


def _looped(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    if not any(map(_functorch.is_batchedtensor, tensors)):
        return function(*tensors)  # not by _Looped, so that it can be differentiated
    result: Tensor = _Looped.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return result


def log_prob_of(fn: Distribution, value: Tensor) -> Tensor:
    """
    Return a site's ``log_prob``, also of a distribution that torch cannot map.

    Such a distribution is evaluated in a loop over the combinations that it reads.
    """
    try:
        return fn.log_prob(value)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        tensors = tensors_of(fn)
        if not 0 < _combinations((value, *tensors)) <= MAX_LOOP:
            raise

        def alone(value: Tensor, *tensors: Tensor) -> Tensor:
            parts = iter(tensors)
            return exchange(fn, lambda _: next(parts)).log_prob(value)  # type: ignore[no-any-return]

        try:
            result = _looped(alone, value, *tensors)
        except Exception:
            raise error from None
        return result


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
    if _has_parts(part):
        if id(part) not in known:
            known[id(part)] = result = copy.copy(part)
            vars(result).update(
                {key: exchange(item, change, known) for key, item in vars(part).items()}
            )
        return known[id(part)]
    return part


def _has_parts(part: object) -> bool:
    """Whether something is a distribution, a user's own included, or a transform."""
    if isinstance(part, Distribution | Transform):
        return True
    return hasattr(part, "log_prob") and not isinstance(part, type)


class _Deferred(TorchDistribution):
    """A distribution that cannot be made of mapped arguments: it is made for each combination."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._made_by = cls, args, kwargs
        first = type.__call__(cls, *exchange(args, _first), **exchange(kwargs, _first))
        self._support = first.support
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support at the first combination."""
        return self._support

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw for one combination only: raises where arguments are mapped."""
        return self._made().sample(sample_shape)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Evaluate for one combination only: raises where arguments are mapped."""
        return self._made().log_prob(value)  # type: ignore[no-any-return]

    def _made(self) -> Any:
        cls, args, kwargs = self._made_by
        return type.__call__(cls, *args, **kwargs)


def _first(tensor: Tensor) -> Tensor:
    """Return the value of the first combination."""
    plain = unwrapped(tensor)
    return plain.tensor[(0,) * len(plain.levels)]


def _made_or_deferred(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a distribution, in one piece or combination by combination; Pyro calls this."""
    if issubclass(cls, _Deferred):
        return None
    try:
        return type.__call__(cls, *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return _Deferred(cls, args, kwargs)


@contextmanager
def _rewritten() -> Iterator[None]:
    """Let programs run whose operations or distributions torch cannot map as they stand."""
    COERCIONS.append(_made_or_deferred)
    try:
        with _Rewritten():
            yield
    finally:
        COERCIONS.remove(_made_or_deferred)


@contextmanager
def _by_formula() -> Iterator[None]:
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


READ = "pyro_mpis: levels that the operation read"  # kept with the error that it raised


def _levels_of(part: object) -> frozenset[int]:
    """Return the levels that the tensors within something are mapped at."""
    mapped = filter(is_mapped, tensors_of(part))
    return frozenset(level for tensor in mapped for level in unwrapped(tensor).levels)


def levels_at_error(error: BaseException | None) -> frozenset[int]:
    """Return the levels of the values that an operation failed on; none if that is not known."""
    while error is not None:
        if READ in vars(error):
            return frozenset(vars(error)[READ])
        error = error.__cause__ or error.__context__
    return frozenset()


class _Rewritten(TorchFunctionMode):
    """Operations that torch cannot map, in terms of others that it can."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rewritten = _REWRITTEN.get(func)
        if rewritten is not None:
            result = rewritten(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            vars(error).setdefault(READ, _levels_of((args, kwargs)))
            raise


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
    scalar = isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
    if not scalar or not _functorch.is_batchedtensor(index) or tensor.dim() == 0:
        return NotImplemented
    return tensor.index_select(0, index.reshape(1)).squeeze(0)


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
    return NotImplemented if bool(is_true.any()) else False


def _is_check() -> bool:
    """Whether the line of a program that looks at a value is within a library, or an assertion."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name in ("handle_torch_function", "wrapped"):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(LIBRARIES):
        return True
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith("assert ")


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
}
