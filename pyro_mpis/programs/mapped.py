# SPDX-License-Identifier: Apache-2.0
r"""
Run a function written for single values at many values at once: nested :func:`torch.func.vmap`.

Each **level** maps the values of some sites together: level 0 is the outermost. The function sees
one value of each site, in the shapes of an ordinary run. What it computes is mapped at the levels
of the values that it was computed from, and at no others, so a result shows by itself what was
read, and no code can mix particles.

Results are taken out from within the innermost function (:func:`unwrapped`): vmap would expand what
a function returns over all levels, read or not.
"""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch._C import _functorch
from torch._functorch.vmap import (  # type: ignore[attr-defined]
    lazy_load_decompositions,
    vmap_increment_nesting,
)
from torch.distributions import Distribution, Independent

from pyro_mpis.programs.deferred import Deferred
from pyro_mpis.programs.formulas import by_formula
from pyro_mpis.programs.not_mappable import NotMappableError
from pyro_mpis.programs.rewritten import by_forward, is_write, rewritten
from pyro_mpis.programs.tensors import (
    Mapped,
    Values,
    elementwise,
    exchange,
    is_mapped,
    sizes_of,
    tensors_of,
    unwrapped,
)
from pyro_mpis.programs.written import Written

MOST_RUNS = 8  # of a program that writes mapped values into tensors, to find all of these
MAX_LOOP = 1_000  # combinations that are worth a call of a distribution's log_prob each
LOOKED_AT = 4  # combinations at which batch dims are held against calls for one
_NOT_MAPPED = weakref.WeakSet[type]()  # classes whose log_prob torch could not map before


def run_mapped(
    function: Callable[[dict[str, Tensor]], None], levels: Sequence[Values], *, patched: bool
) -> None:
    """
    Call a function of single values once, mapped over each level.

    :param levels: site -> ``(size, *shape)``, of one size in each level.
    :param patched: whether to rewrite some operations that torch cannot map.
    """
    with _quiet(), _not_fused(), by_forward():
        lazy_load_decompositions()
        if not patched:
            _run(function, levels)
            return
        try:
            with rewritten():
                _run(function, levels)
        except Exception as error:
            written = Written(len(levels))
            if is_write(error) and _run_written(function, levels, written):
                return
            if isinstance(error, NotMappableError):
                error.levels |= written.too_many
            raise


def _run_written(
    function: Callable[[dict[str, Tensor]], None], levels: Sequence[Values], written: Written
) -> bool:
    """
    Call a function that writes mapped values into tensors.

    :return: whether these could be found, so that it has run.
    """
    for _ in range(MOST_RUNS):
        written.begin()
        try:
            with rewritten(written):
                _run(function, levels)
        except Exception:
            if not written.found:
                return False
        if not written.found:
            return True
        if written.too_many:
            return False
    return False


def _run(function: Callable[[dict[str, Tensor]], None], levels: Sequence[Values]) -> None:
    """Call a function of single values once, mapped over each level."""
    values: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for level in levels:
            values |= stack.enter_context(_mapped(level))
        function(values)


@contextmanager
def _mapped(level: Values) -> Iterator[dict[str, Tensor]]:
    """
    Map values over a level, as :func:`torch.func.vmap` does.

    Vmap itself would also look at its arguments as trees, which takes ten times as long, and make
    tensors of what the function returns, which is nothing.
    """
    size = len(next(iter(level.values())))
    with vmap_increment_nesting(size, "same") as number:
        yield {name: _functorch._add_batch_dim(value, 0, number) for name, value in level.items()}


@contextmanager
def _not_fused() -> Iterator[None]:
    """Let TorchScript call its operations one by one: a fused kernel knows nothing of vmap."""
    optimizes = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(optimizes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's notes on operations that it maps by a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*batching rule.*")
        yield


def _combinations(tensors: Sequence[Tensor]) -> int:
    """Return the number of combinations that mapped tensors have together; 0 if none is mapped."""
    sizes = sizes_of(*tensors)
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
    if not any(map(is_mapped, tensors)):
        return function(*tensors)  # not by _Looped, so that it can be differentiated
    result: Tensor = _Looped.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return result


def log_prob_of(fn: Distribution, value: Tensor) -> Tensor:
    """
    Return a site's ``log_prob``, also of a distribution that torch cannot map.

    Such a distribution is evaluated with the levels as batch dims, or, where that will not do, in a
    loop over the combinations that it reads.
    """
    log_prob = by_formula(fn, value)
    if log_prob is not None:
        return log_prob
    kind = type(innermost(fn))
    is_known = kind in _NOT_MAPPED
    in_batch = _in_batch_dims(fn, value) if is_known else None
    if in_batch is not None:
        return in_batch
    try:
        return fn.log_prob(value)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        in_batch = None if is_known else _in_batch_dims(fn, value)
        if in_batch is not None:
            _NOT_MAPPED.add(kind)
            return in_batch
        tensors = tensors_of(fn)
        if not 0 < _combinations((value, *tensors)) <= MAX_LOOP:
            raise
        try:
            return _looped(partial(_evaluated, fn), value, *tensors)
        except Exception:
            raise error from None


def _evaluated(fn: Distribution, value: Tensor, *tensors: Tensor) -> Tensor:
    """Return the ``log_prob`` of a distribution with other tensors in the place of its own."""
    parts = iter(tensors)
    result = exchange(fn, lambda _: next(parts))
    vars(result)["_validate_args"] = False  # by the shape that it was made with
    return result.log_prob(value)  # type: ignore[no-any-return]


def _in_batch_dims(fn: Distribution, value: Tensor) -> Tensor | None:
    """
    Evaluate a distribution with the levels as batch dims.

    :return: None if it does not keep batch dims apart, as is looked at for a few combinations.
    """
    if not isinstance(fn, Distribution):
        return None
    plain = _unexpanded(fn)
    tensors = (value, *tensors_of(plain))
    events = _event_dims(plain, tensors)
    try:
        result = elementwise(partial(_evaluated, plain), *tensors, event_dims=events)
        if result is None:
            return None
        result = result.expand(torch.broadcast_shapes(result.shape, fn.batch_shape))
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None
    parts, found = [unwrapped(tensor) for tensor in tensors], unwrapped(result)
    for number in range(LOOKED_AT):  # the first combination, the last, and others between
        place = {
            level: number * (size - 1) // (LOOKED_AT - 1)
            for level, size in zip(found.levels, found.tensor.shape, strict=False)
        }
        alone = _evaluated(fn, *(_at(part, place) for part in parts))
        of_batch = _at(found, place)
        if alone.shape != of_batch.shape or not torch.allclose(
            alone, of_batch, 1e-4, 1e-4, equal_nan=True
        ):
            return None
    return result


def _event_dims(fn: Distribution, tensors: Sequence[Tensor]) -> list[int]:
    """Return how many event dims a value has, and each of a distribution's tensors."""
    fn = innermost(fn)
    known = fn.event_dims() if isinstance(fn, Deferred) else {}
    batch = len(fn.batch_shape)
    of_value, *others = tensors
    dims = [min(of_value.dim(), len(fn.event_shape))]
    return dims + [known.get(id(tensor), max(0, tensor.dim() - batch)) for tensor in others]


def _unexpanded(fn: Any) -> Any:
    """Return a distribution with the batch dims that its tensors have, not those of its plates."""
    while isinstance(fn, ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, Independent | MaskedDistribution):
        fn = copy.copy(fn)
        fn.base_dist = _unexpanded(fn.base_dist)
    return fn


def innermost(fn: Any) -> Any:
    """Take a distribution out of masks and shapes. That of a transform is another distribution."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _at(mapped: Mapped, place: Mapping[int, int]) -> Tensor:
    """Return the tensor of one combination."""
    return mapped.tensor[tuple(place[level] for level in mapped.levels)]
