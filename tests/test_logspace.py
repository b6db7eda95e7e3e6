# SPDX-License-Identifier: Apache-2.0
"""The log-space kernels, exact at any dynamic range, with their derivatives."""

import math
from typing import Any

import hypothesis.strategies as st
import pyro.ops.einsum.torch_log
import pytest
import torch
from graphs import noise
from hypothesis import given, settings
from torch import Tensor

from pyro_mpis.factor_graph import logspace
from pyro_mpis.factor_graph.logspace import log_matmul, logsumexp, sum_in_double

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def exact_logsumexp(row: list[float]) -> float:
    """Longhand, with math.fsum."""
    top = max(row)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(x - top) for x in row))


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Longhand log-space matrix product of (batch, m, s) and (batch, s, n)."""
    result = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float64)
    for i in range(a.shape[0]):
        for m in range(a.shape[1]):
            for n in range(b.shape[2]):
                terms = [x + y for x, y in zip(a[i, m].tolist(), b[i, :, n].tolist(), strict=True)]
                result[i, m, n] = exact_logsumexp(terms)
    return result


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two batches of matrices, of any scale up to 1e6 nats, with entries and rows of -inf."""
    sizes = [draw(st.integers(1, 5)) for _ in range(4)]
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6]))
    impossible = draw(st.sampled_from([0.0, 0.2, 0.8]))
    batch, m, s, n = sizes
    result = []
    for shape in ((batch, m, s), (batch, s, n)):
        # numbers that float32 holds exactly, so that both precisions are given the same problem
        x = (torch.randn(shape, generator=generator) * scale).round(decimals=0).double()
        hidden = torch.rand(shape, generator=generator) < impossible
        result.append(x.masked_fill(hidden, -math.inf))
    if draw(st.booleans()):
        result[0][0, 0] = -math.inf
    return result[0], result[1]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert torch.equal(found.isinf(), expected.isinf())
    assert not bool(found.isnan().any())
    finite = expected.isfinite()
    error = (found.double() - expected)[finite].abs() / expected[finite].abs().clamp(min=1.0)
    assert bool((error <= tolerance).all()), f"relative error {float(error.max()):.1g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(matrices())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_matrix_product(dtype: torch.dtype, ab: tuple[Tensor, Tensor]) -> None:
    a, b = ab
    assert_close(log_matmul(a.to(dtype), b.to(dtype)), exact_product(a, b), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(matrices())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_derivatives_of_the_matrix_product_are_shares(
    dtype: torch.dtype, ab: tuple[Tensor, Tensor]
) -> None:
    """Those of add-and-sum; of each finite entry they sum to one, of each -inf entry to zero."""
    exact_a, exact_b = ab
    a, b = (x.to(dtype).requires_grad_() for x in ab)
    result = log_matmul(a, b)
    weight = torch.rand(
        result.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    ).double()
    finite = result.detach().isfinite()
    grads = torch.autograd.grad((result.where(finite, 0.0) * weight.to(dtype)).sum(), [a, b])
    terms = exact_a.unsqueeze(-1) + exact_b.unsqueeze(1)  # (batch, m, s, n)
    share = terms.softmax(2).nan_to_num(0.0) * (weight * finite).unsqueeze(2)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(grads[0].double(), share.sum(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[1].double(), share.sum(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        grads[0].double().sum(), (weight * finite).sum(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("few", [0.0, 0.01, 1.0])
def test_matrix_product_that_loses_few_entries(
    dtype: torch.dtype, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 400, summed term by term or with all others in double precision; and its share."""
    monkeypatch.setattr(logspace, "_FEW", few)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    a, b = (torch.randn(1, 20, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    apart = torch.arange(20.0, dtype=torch.float64) * 3000.0
    a[0, 3] = apart
    b[0, :, 5] = -apart
    a, b = a.float().double(), b.float().double()
    found_a, found_b = (x.to(dtype).requires_grad_() for x in (a, b))
    found = log_matmul(found_a, found_b)
    assert_close(found.detach(), exact_product(a, b), TOLERANCE[dtype])
    grads = torch.autograd.grad(found.sum(), [found_a, found_b])
    share = (a.unsqueeze(-1) + b.unsqueeze(1)).softmax(2)
    tolerance = 10 * TOLERANCE[dtype]  # sums of 20 shares
    torch.testing.assert_close(grads[0].double(), share.sum(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[1].double(), share.sum(1), rtol=tolerance, atol=tolerance)


def test_rows_and_columns_of_zeros_take_no_sum_term_by_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Particles that the model excludes are many, and what they give is known."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    a, b = (torch.randn(1, 20, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    a[0, :5] = -math.inf
    b[0, :, 8:] = -math.inf
    a[0, 6, :10] = b[0, 10:, 3] = -math.inf  # these two do not meet
    summed: list[tuple[int, int, int]] = []
    terms = logspace._terms

    def counted(*args: Any) -> Any:
        for batch, m, n, values in terms(*args):
            summed.extend(zip(batch.tolist(), m.tolist(), n.tolist(), strict=True))
            yield batch, m, n, values

    monkeypatch.setattr(logspace, "_terms", counted)
    a.requires_grad_()
    b.requires_grad_()
    found = log_matmul(a, b)
    assert_close(found.detach(), exact_product(a, b), 1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(found, [a, b], weight)
    share = (a.unsqueeze(-1) + b.unsqueeze(1)).detach().softmax(2).nan_to_num(0.0)
    share = share * weight.unsqueeze(2)
    torch.testing.assert_close(grads[0], share.sum(-1))
    torch.testing.assert_close(grads[1], share.sum(1))
    assert not summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_supports_that_do_not_meet_take_no_sum_term_by_term(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a walk with bounded steps: most products are zero, which is no underflow."""
    place = torch.linspace(0.0, 20.0, 60, dtype=torch.float64)
    near = (place.unsqueeze(1) - place).abs() < 1.5
    a, b = ((noise(1, 60, 60, seed=s).masked_fill(~near, -math.inf)) for s in (0, 1))
    a[0, 7] -= 3000.0 * place  # in this row most are underflow
    a, b = a.to(dtype), b.to(dtype)
    summed: list[int] = []
    precisions: list[torch.dtype] = []
    terms, multiplied = logspace._terms, logspace._multiplied

    def counted(*args: Any) -> Any:
        for part in terms(*args):
            summed.append(len(part[0]))
            yield part

    def noted(*args: Any) -> Any:
        precisions.append(args[2])
        return multiplied(*args)

    monkeypatch.setattr(logspace, "_terms", counted)
    monkeypatch.setattr(logspace, "_multiplied", noted)
    a.requires_grad_()
    b.requires_grad_()
    found = log_matmul(a, b)
    exact = exact_product(a.double(), b.double())
    assert int((exact == -math.inf).sum()) > 2000
    assert_close(found.detach(), exact, TOLERANCE[dtype])
    weight = noise(1, 60, 60, seed=2).to(dtype)
    grads = torch.autograd.grad(found, [a, b], weight)
    share = (a.unsqueeze(-1) + b.unsqueeze(1)).detach().double().softmax(2).nan_to_num(0.0)
    share = share * weight.double().unsqueeze(2)
    tolerance = 50 * TOLERANCE[dtype]
    torch.testing.assert_close(grads[0].double(), share.sum(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[1].double(), share.sum(1), rtol=tolerance, atol=tolerance)
    assert 0 < sum(summed) <= 2 * 60  # of that row, forward and backward
    assert precisions == [dtype, dtype]  # nor is all done again in double precision


def test_parts_of_a_long_sum_share_their_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a few rows would cost as many exponentials as the whole of the other matrix."""
    monkeypatch.setattr(logspace, "_PART", 2**10)
    taken = []
    exp_ = logspace.exp_

    def counted(x: Tensor) -> Tensor:
        taken.append(x.numel())
        return exp_(x)

    monkeypatch.setattr(logspace, "exp_", counted)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    a = torch.randn(2, 20, 400, generator=generator, dtype=torch.float64)
    b = torch.randn(2, 400, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(log_matmul(a, b), exact_product(a, b))
    assert len(taken) > 4  # parts indeed
    assert sum(taken) <= 2 * a.numel() + b.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(matrices())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_sum_of_exponentials(dtype: torch.dtype, ab: tuple[Tensor, Tensor]) -> None:
    x = ab[0]
    expected = torch.tensor(
        [[exact_logsumexp(row) for row in rows] for rows in x.tolist()], dtype=torch.float64
    )
    assert_close(logsumexp(x.to(dtype)), expected, TOLERANCE[dtype])
    total = torch.tensor(
        [exact_logsumexp(rows.flatten().tolist()) for rows in x], dtype=torch.float64
    )
    assert_close(logsumexp(x.to(dtype), 2), total, TOLERANCE[dtype])


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    a, b = (
        torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(log_matmul, (a, b))
    assert torch.autograd.gradcheck(logsumexp, (a,))


@pytest.mark.parametrize("dims", [(0,), (1, 3), (0, 1, 2, 3)])
def test_sum_in_double(dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of single-precision numbers, in parts: no more error than the inputs have."""
    x = torch.randn(
        3, 40, 5, 7, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    expected = x.double().sum(dims)
    for block in (10**9, 100, 1):
        monkeypatch.setattr(logspace, "_PART", block)
        torch.testing.assert_close(sum_in_double(x, dims), expected, rtol=1e-14, atol=1e-13)
    x = x.double().requires_grad_()
    weight = torch.randn(
        expected.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
    ).double()
    (found,) = torch.autograd.grad((sum_in_double(x, dims) * weight).sum(), x)
    (exact,) = torch.autograd.grad((x.sum(dims) * weight).sum(), x)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("dims", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_sum_in_double_converts_a_part_at_a_time(
    dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where nothing is left to cut but the dims that are summed."""
    monkeypatch.setattr(logspace, "_PART", 100)
    x = torch.randn(
        30, 20, 10, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    expected = x.double().sum(dims)
    converted = []
    double = Tensor.double

    def counted(part: Tensor) -> Tensor:
        converted.append(part.numel())
        return double(part)

    monkeypatch.setattr(Tensor, "double", counted)
    found = sum_in_double(x, dims)
    assert max(converted) <= 100
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-13)


def test_derivative_of_an_empty_sum_is_zero() -> None:
    x = torch.full((2, 3), -math.inf, requires_grad=True)
    (grad,) = torch.autograd.grad(logsumexp(x).nan_to_num(neginf=0.0).sum() + logsumexp(x)[0], x)
    assert torch.equal(grad, torch.zeros(2, 3))


def test_pyro_s_kernel_underflows() -> None:
    """Two factors with slopes of +-100 nats a particle: 5.30 in truth."""
    k = torch.arange(200.0, dtype=torch.float64)
    a, b = (100.0 * k).unsqueeze(0), (-100.0 * k).unsqueeze(-1)
    theirs = pyro.ops.einsum.torch_log.einsum("ab,bc->ac", a, b)
    assert theirs.item() == -math.inf
    assert log_matmul(a[None], b[None]).item() == pytest.approx(math.log(200.0), abs=1e-12)


def test_autocast_changes_nothing() -> None:
    """Neither the product nor its derivatives are rounded to bfloat16."""
    results = []
    for enabled in (False, True):
        a, b = (
            torch.randn(
                1, 9, 9, generator=torch.Generator(torch.get_default_device()).manual_seed(s)
            )
            for s in (0, 1)
        )
        a, b = a.requires_grad_(), b.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            product = log_matmul(a, b)
            results.append((product.detach(), *torch.autograd.grad(product.sin().sum(), (a, b))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_a_running_total_of_parallel_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding neither makes a total fall nor gives a share to what has no weight."""
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    rounded = torch.tensor([0.0, 1.0, 1.1, 2.9, 3.1])
    monkeypatch.setattr(logspace, "_IN_ORDER", set[str]())
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: rounded)
    expected = torch.tensor([0.0, 1.0, 1.0, 2.9, 2.9])
    torch.testing.assert_close(logspace.running_total(weights, 0), expected)
