# SPDX-License-Identifier: Apache-2.0
r"""
Sums of exponentials, exact at any dynamic range, with true derivatives.

Everything here is in log space (nats); ``-inf`` is the log of zero. The derivative of a log-sum-exp
is a softmax, so each row of it sums to one, however far apart the terms are; where a whole sum is
zero its derivative is zero too, never nan. (A logarithm clamped away from zero, as in
``pyro.ops.einsum.torch_log``, gets evidence right and every derivative wrong.)

Large tensors are worked on in parts that stay in the processor's cache: temporaries of their own
size would cost more than the arithmetic. An exponential that underflows takes ten times as long as
one that does not, and with particles from a prior most do: arguments are clamped to where the
result is far below rounding.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Below this a sum of products of shifted exponentials may have lost terms to underflow.
_SAFE = {torch.float32: 1e-20, torch.float64: 1e-200}
# The share of such entries above which to do all in double precision, not these term by term.
_FEW = 0.01
# The lowest argument whose exponential is a normal number.
_LOWEST = {torch.float32: -87.0, torch.float64: -708.0}
# Elements that are worked on at a time. A GPU has no use for small parts: each is a launch.
_PART = 2**18
_PART_OF_GPU = 2**26
# Devices that add up one entry after the other.
_IN_ORDER = {"cpu"}


def logsumexp(x: Tensor, num_dims: int = 1) -> Tensor:
    """
    Sum exponentials over the last ``num_dims`` dims.

    :param x: ``(*rest, *summed)``, log scale.
    :return: ``(*rest)``, log scale; differentiable.
    """
    if num_dims == 0:
        return x
    result: Tensor = _LogSumExp.apply(x.flatten(x.dim() - num_dims))  # type: ignore[no-untyped-call]
    return result


def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """
    Multiply matrices in log space.

    Equals ``(a[..., None] + b[:, None]).logsumexp(-2)``, without a temporary of that size.

    A product of exponentials shifted by their rows' and columns' maxima. Where it loses entries to
    underflow, because the maxima do not meet, these are summed term by term; if they are not few,
    the product is done again in double precision first, which loses fewer.

    :param a: ``(*batch, m, s)``, log scale.
    :param b: ``(*batch, s, n)``, log scale.
    :return: ``(*batch, m, n)``, log scale; differentiable.
    """
    result: Tensor = _LogMatmul.apply(a, b)  # type: ignore[no-untyped-call]
    return result


def sum_in_double(x: Tensor, dims: Sequence[int]) -> Tensor:
    """
    Sum over some dims in float64, without a copy of the whole tensor in float64.

    :param dims: nonnegative; one or more.
    """
    result: Tensor = _SumInDouble.apply(x, tuple(dims))  # type: ignore[no-untyped-call]
    return result


class _LogSumExp(torch.autograd.Function):
    """``x.logsumexp(-1)`` whose derivative is zero, not nan, where the whole row is -inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.small = x.numel() <= _part(x)
        if ctx.small:  # one part: its exponentials are kept for the derivative
            rows = _summed_first(x)
            highest = rows.amax(0)
            terms = exp_(rows - finite(highest))
            sums = terms.sum(0)
            ctx.save_for_backward(terms, sums)
            return torch.add(sums.log(), highest)
        ctx.save_for_backward(x)
        result = x.new_empty(x.shape[:-1])
        for part in _parts(x, range(x.dim() - 1)):
            rows = _summed_first(x[part])
            highest = rows.amax(0)
            sums = exp_(rows - finite(highest)).sum(0)
            torch.add(sums.log_(), highest, out=result[part[:-1]])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if ctx.small:
            terms, sums = ctx.saved_tensors
            of_terms: Tensor = terms * (grad / sums.clamp(min=0.5))
            return of_terms.movedim(0, -1)
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        for part in _parts(x, range(x.dim() - 1)):
            torch.mul(_shares(x[part]), grad[part[:-1]].unsqueeze(-1), out=result[part])
        return result


class _SumInDouble(torch.autograd.Function):
    """``x.sum(dims, dtype=torch.float64)`` that converts a part of ``x`` at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims, ctx.shape, ctx.dtype = dims, x.shape, x.dtype
        order = sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])
        x = x.permute(order)  # as in memory: sums over dims in another order are slow
        summed = [place for place, dim in enumerate(order) if dim in dims]
        remaining = [place for place, dim in enumerate(order) if dim not in dims]
        if x.dtype == torch.float64:
            result = x.sum(summed)
        else:
            result = x.new_zeros([x.shape[place] for place in remaining], dtype=torch.float64)
            for part in cuts(x.shape, (*remaining, *summed), _part(x)):
                into = result[tuple(part[place] for place in remaining)]
                into += x[part].double().sum(summed)
        remaining_dims = [order[place] for place in remaining]
        return result.permute([remaining_dims.index(dim) for dim in sorted(remaining_dims)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.to(ctx.dtype).contiguous()  # while it is small
        for dim in sorted(ctx.dims):
            grad = grad.unsqueeze(dim)
        return grad.expand(ctx.shape), None


class _LogMatmul(torch.autograd.Function):
    """``log(exp(a) @ exp(b))`` for batches of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.dtype = torch.promote_types(a.dtype, b.dtype)
        result = a.new_empty(*a.shape[:-1], b.shape[-1], dtype=ctx.dtype)
        for batch, rows in _blocks(a, b):
            part = result[rows]
            into = part.view(-1, *part.shape[-2:])
            _product(_matrices(a[rows]), _matrices(b[batch]), ctx.dtype, into)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        grad_a = torch.empty_like(a) if needs_a else None
        grad_b = torch.zeros_like(b) if needs_b else None
        for batch, rows in _blocks(a, b):
            parts = _matrices(a[rows]), _matrices(b[batch])
            part_grad = _matrices(grad[rows])
            of_a, of_b = _product_grads(*parts, ctx.dtype, part_grad, ctx.needs_input_grad)
            if grad_a is not None and of_a is not None:
                grad_a[rows] = of_a.view(a[rows].shape)
            if grad_b is not None and of_b is not None:
                grad_b[batch] += of_b.view(b[batch].shape)
        return grad_a, grad_b


def _matrices(x: Tensor) -> Tensor:
    """Return matrices along a single batch dim, ``(number, rows, columns)``: a view, if it can."""
    return x.reshape(-1, *x.shape[-2:])


class _Multiplied(NamedTuple):
    """A product of exponentials, and what it is made from."""

    dtype: torch.dtype  # that it was made in
    a_max: Tensor  # (batch, m, 1)
    b_max: Tensor  # (batch, 1, n)
    ea: Tensor  # (batch, m, s), exponentials of what is below these maxima
    eb: Tensor  # (batch, s, n)
    product: Tensor  # (batch, m, n)
    small: Tensor | None  # where terms may have been lost, or all are zero; None for nowhere
    lost: Tensor | None  # where they may have been lost


def _multiplied(a: Tensor, b: Tensor, dtype: torch.dtype) -> _Multiplied:
    """Multiply shifted exponentials; in double precision if single loses more than a few."""
    a_max, b_max, ea, eb = _shifted(a, b, dtype)
    product = _matmul(ea, eb)
    if product.numel() == 0 or float(product.amin()) >= _SAFE[dtype]:
        return _Multiplied(dtype, a_max, b_max, ea, eb, product, None, None)
    lost = small = product < _SAFE[dtype]
    for highest in (a_max, b_max):
        is_zero = highest == torch.finfo(dtype).min  # see finite: of a row or column of zeros
        if int(is_zero.count_nonzero()):
            lost = lost & ~is_zero
    num_lost = int(lost.count_nonzero())
    if num_lost and (_has_zero(a) or _has_zero(b)):
        lost = lost & _is_possible(a, b)
        num_lost = int(lost.count_nonzero())
    if num_lost > _FEW * lost.numel() and dtype != torch.float64:
        return _multiplied(a, b, torch.float64)
    return _Multiplied(dtype, a_max, b_max, ea, eb, product, small, lost if num_lost else None)


def _has_zero(x: Tensor) -> bool:
    return float(x.amin()) == -math.inf


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices in their own precision, under ``torch.autocast`` too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _is_possible(a: Tensor, b: Tensor) -> Tensor:
    """Return where a row and a column have a term in common that is not zero: (batch, m, n)."""
    rows, columns = ((x > -math.inf).float() for x in (a, b))
    return rows @ columns > 0.0


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, result: Tensor) -> None:
    """Multiply ``(batch, m, s)`` by ``(batch, s, n)`` into ``(batch, m, n)``."""
    made = _multiplied(a, b, dtype)
    torch.add(made.product.log_().add_(made.a_max), made.b_max, out=result)
    if made.lost is not None:
        for batch, m, n, terms in _terms(a, b, made.dtype, made.lost):
            result[batch, m, n] = terms.logsumexp(-1).to(result.dtype)


def _product_grads(
    a: Tensor, b: Tensor, dtype: torch.dtype, grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """
    Return the derivatives of a product, given those in its entries.

    Shares are found from the shifted terms themselves: the result is rounded, and in single
    precision its error grows with its size.

    :param needed: which of the two derivatives are needed; None stands for the other.
    """
    made = _multiplied(a, b, dtype)
    scaled = torch.div(grad, made.product, out=made.product)
    if made.small is not None:
        scaled.masked_fill_(made.small, 0.0)
    grad_a = _matmul(scaled, made.eb.mT).mul_(made.ea) if needed[0] else None
    grad_b = _matmul(made.ea.mT, scaled).mul_(made.eb) if needed[1] else None
    if made.lost is not None:
        for batch, m, n, terms in _terms(a, b, made.dtype, made.lost):
            share = grad[batch, m, n].unsqueeze(1) * _shares(terms)
            if grad_a is not None:
                grad_a.index_put_((batch, m), share, accumulate=True)
            if grad_b is not None:
                grad_b.mT.index_put_((batch, n), share, accumulate=True)
    return grad_a, grad_b


def _terms(
    a: Tensor, b: Tensor, dtype: torch.dtype, lost: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield some entries of a product (batch, row, column) with the terms of each: (number, s)."""
    columns = b.mT.contiguous()
    for block in lost.nonzero().split(max(1, _part(a) // max(1, a.shape[-1]))):
        batch, m, n = block.unbind(1)
        yield batch, m, n, a[batch, m].to(dtype).add_(columns[batch, n])


def _shifted(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Return the maxima of ``a``'s rows and ``b``'s columns, and exponentials of what is left.

    These are the exponentials of ``a`` and ``b`` less their maxima: all are at most one.
    """
    rows, columns = _summed_first(a, dtype), _summed_first(b.mT, dtype)
    a_max, b_max = finite(rows.amax(0)).unsqueeze(-1), finite(columns.amax(0)).unsqueeze(-2)
    # contiguous: a batched product copies each matrix of other tensors by itself
    ea, eb = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (a, b))
    torch.sub(rows.movedim(0, -1), a_max, out=ea)
    torch.sub(columns.movedim(0, -2), b_max, out=eb)
    return a_max, b_max, exp_(ea), exp_(eb)


def exp_(x: Tensor) -> Tensor:
    """Exponentiate in place numbers that are at most zero; what would underflow is zero."""
    lowest = _LOWEST[x.dtype]
    x = x.clamp_(min=lowest).exp_()
    return torch.nn.functional.threshold(x, 2.0 * math.exp(lowest), 0.0, inplace=True)


def running_total(weights: Tensor, dim: int) -> Tensor:
    """
    Add up weights along a dim: a distribution function that never falls and is flat at weight zero.

    A GPU adds up in parallel, in another order for each entry, so that rounding may do both.
    """
    total = weights.cumsum(dim)
    if total.device.type in _IN_ORDER:
        return total
    return torch.where(weights > 0, total, 0).cummax(dim).values


def finite(highest: Tensor) -> Tensor:
    """Return maxima that may be subtracted from what they are the maxima of, -inf included."""
    return highest.clamp(min=torch.finfo(highest.dtype).min)


def _shares(x: Tensor) -> Tensor:
    """Return the softmax over the last dim; zero, not nan, where the whole row is -inf."""
    x = _summed_first(x)
    shares = exp_(x - finite(x.amax(0)))
    return shares.div_(shares.sum(0).clamp_(min=0.5)).movedim(0, -1)


def _summed_first(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bring the last dim to the front, in memory too: maxima over short dims are slow elsewhere."""
    first = x.movedim(-1, 0)
    return first.to(dtype or x.dtype, memory_format=torch.contiguous_format)


def _part(x: Tensor) -> int:
    return _PART if x.device.type == "cpu" else _PART_OF_GPU


def _parts(x: Tensor, dims: Iterable[int]) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor along some of its dims, the outermost in memory first, into parts."""
    return cuts(x.shape, sorted(dims, key=lambda dim: -x.stride()[dim]), _part(x))


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """
    Cut a product into parts, several matrices or some rows of one: batch; batch and rows.

    Each part takes the exponentials of all of ``b``'s matrix, so that its rows are as many as make
    them no more than those of ``a``.
    """
    *batch, m, s = a.shape
    of_row = max(s, b.shape[-1], 1)
    of_b = s * b.shape[-1]
    of_matrix = max(of_row * m, of_b, 1)
    rows = m if of_matrix <= _part(a) else max(1, max(_part(a), of_b) // of_row)
    for part in cuts(batch, range(len(batch)), _part(a) // of_matrix):
        for row in range(0, m, rows):
            yield part, (*part, slice(row, row + rows))


def cuts(shape: Sequence[int], order: Iterable[int], room: int) -> Iterator[tuple[slice, ...]]:
    """Cut dims of a shape, one after the other in an order, until parts have ``room`` elements."""
    sizes = list(shape)
    for dim in order:
        rest = math.prod(sizes) // max(1, sizes[dim])
        sizes[dim] = max(1, min(sizes[dim], room // max(1, rest)))
    slices = [
        [slice(start, start + size) for start in range(0, length, size)] if length else [slice(0)]
        for length, size in zip(shape, sizes, strict=True)
    ]
    return itertools.product(*slices)
