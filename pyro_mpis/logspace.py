# SPDX-License-Identifier: Apache-2.0
r"""
Sums of exponentials, exact at any dynamic range, with true derivatives.

Everything here is in log space (nats); ``-inf`` is the log of zero. The derivative of a log-sum-exp
is a softmax, so each row of it sums to one, however far apart the terms are; where a whole sum is
zero its derivative is zero too, never nan. (A logarithm clamped away from zero, as in
``pyro.ops.einsum.torch_log``, gets evidence right and every derivative wrong.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Below this a sum of products of shifted exponentials may have lost terms to underflow.
_SAFE = {torch.float32: 1e-20, torch.float64: 1e-200}
# Elements of the temporaries that recompute such entries.
_BLOCK = 2**22
# Elements that are converted to double precision at a time: they stay in the processor's cache.
_PART = 2**18


class _LogSumExp(torch.autograd.Function):
    """``x.logsumexp(-1)`` whose derivative is zero, not nan, where the whole row is -inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * _shares(x)


class _SumInDouble(torch.autograd.Function):
    """``x.sum(dims, dtype=torch.float64)`` that converts a part of ``x`` at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims, ctx.shape, ctx.dtype = dims, x.shape, x.dtype
        kept = [dim for dim in range(x.dim()) if dim not in dims]
        longest = max(kept, key=lambda dim: x.shape[dim], default=None)
        if longest is None or x.numel() <= _PART or x.dtype == torch.float64:
            return x.sum(dims, dtype=torch.float64)
        size = max(1, _PART * x.shape[longest] // x.numel())
        parts = [part.double().sum(dims) for part in x.split(size, longest)]
        return torch.cat(parts, kept.index(longest))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.to(ctx.dtype)
        for dim in sorted(ctx.dims):
            grad = grad.unsqueeze(dim)
        return grad.expand(ctx.shape), None


def sum_in_double(x: Tensor, dims: Sequence[int]) -> Tensor:
    """
    Sum over some dims in float64, without a copy of the whole tensor in float64.

    :param dims: nonnegative.
    """
    result: Tensor = _SumInDouble.apply(x, tuple(dims))  # type: ignore[no-untyped-call]
    return result


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


class _LogMatmul(torch.autograd.Function):
    """``log(exp(a) @ exp(b))`` for batches of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a_max, b_max, ea, eb = _shifted(a, b)
        product = ea @ eb
        del ea, eb
        lost = (product < _SAFE[product.dtype]).nonzero()
        result = product.log().add_(a_max).add_(b_max)
        for block in lost.split(_rows(a)):
            batch, m, n = block.unbind(1)
            result[batch, m, n] = (a[batch, m] + b[batch, :, n]).logsumexp(-1)
        ctx.save_for_backward(a, b, product, lost)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # Shares are found from the shifted terms themselves: the result is rounded, and in single
        # precision its error grows with its size.
        a, b, product, lost = ctx.saved_tensors
        _, _, ea, eb = _shifted(a, b)
        scaled = grad / product
        batch, m, n = lost.unbind(1)
        scaled[batch, m, n] = 0.0
        grad_a = ea * (scaled @ eb.mT)
        grad_b = eb * (ea.mT @ scaled)
        del ea, eb, scaled
        for block in lost.split(_rows(a)):
            batch, m, n = block.unbind(1)
            share = grad[batch, m, n].unsqueeze(1) * _shares(a[batch, m] + b[batch, :, n])
            grad_a.index_put_((batch, m), share, accumulate=True)
            grad_b.mT.index_put_((batch, n), share, accumulate=True)
        return grad_a, grad_b


def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """
    Multiply matrices in log space.

    Equals ``(a[..., None] + b[:, None]).logsumexp(-2)``, without a temporary of that size.

    A product of exponentials shifted by their rows' and columns' maxima; the entries that it cannot
    represent, because the maxima do not meet, are recomputed exactly.

    :param a: ``(batch, m, s)``, log scale.
    :param b: ``(batch, s, n)``, log scale.
    :return: ``(batch, m, n)``, log scale; differentiable.
    """
    result: Tensor = _LogMatmul.apply(a, b)  # type: ignore[no-untyped-call]
    return result


def _shifted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a_max = a.amax(-1, keepdim=True)
    b_max = b.amax(-2, keepdim=True)
    a_max = a_max.masked_fill(a_max == -torch.inf, 0.0)
    b_max = b_max.masked_fill(b_max == -torch.inf, 0.0)
    return a_max, b_max, (a - a_max).exp_(), (b - b_max).exp_()


def _shares(x: Tensor) -> Tensor:
    """Return the softmax over the last dim; zero, not nan, where the whole row is -inf."""
    return x.softmax(-1).nan_to_num_(nan=0.0)


def _rows(a: Tensor) -> int:
    return max(1, _BLOCK // max(1, a.shape[-1]))
