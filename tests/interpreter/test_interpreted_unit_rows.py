"""unit_rows' Triton kernels on CPU tensors, against F.normalize in float64, and as the loss calls
them on a GPU.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from codir_fast.kernels.unit_rows import unit_rows, unit_rows_backward

from codir_fast.ops import unit_rows as ops

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CASES = [*itertools.product(EPSILON, repeat=2)]


def vectors(N, D, dtype):
    rows = torch.randn(N, D) * torch.logspace(-3, 3, N)[:, None]
    rows[N // 2] = 0
    return rows.to(dtype), torch.randn(N, D)


def exact(rows, grad):
    leaf = rows.double().requires_grad_()
    unit = F.normalize(leaf, dim=1)
    (drows,) = torch.autograd.grad(unit, leaf, grad.double())
    return unit.detach(), drows


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    largest = expected.abs().amax(1, keepdim=True).clamp_min(1e-30)
    error = ((got.double() - expected) / largest).abs().max()
    assert error <= 4 * EPSILON[dtype], float(error)


@pytest.mark.parametrize(("N", "D"), [(1, 1), (7, 19), (40, 128), (3, 300), (2, 4096)])
@pytest.mark.parametrize(("dtype", "out"), CASES, ids=str)
def test_against_float64(N, D, dtype, out):
    rows, grad = vectors(N, D, dtype)
    grad = grad.to(out)
    expected, expected_grad = exact(rows, grad)
    unit, norm = unit_rows(rows, out)
    assert_near(unit, expected, out)
    length = torch.linalg.vector_norm(rows.double(), dim=1).clamp_min(1e-12)
    torch.testing.assert_close(norm.double(), length, rtol=1e-6, atol=0)
    got = unit_rows_backward(grad, rows, norm)
    if dtype == torch.float16:  # 1e12 times the gradient is beyond it
        assert got[N // 2].isinf().any()
        got[N // 2] = expected_grad[N // 2] = 0
    assert_near(got, expected_grad, dtype)


def test_strides_none_and_nan():
    rows, grad = (x.T for x in torch.randn(2, 5, 6))
    unit, norm = unit_rows(rows, torch.float32)
    assert_near(unit, exact(rows, grad)[0], torch.float32)
    assert_near(unit_rows_backward(grad, rows, norm), exact(rows, grad)[1], torch.float32)
    rows = rows.contiguous()
    rows[2, 1] = torch.nan
    unit, norm = unit_rows(rows, torch.float32)
    assert unit[2].isnan().all() and norm[2].isnan() and not unit[[0, 1, 3]].isnan().any()
    unit, norm = unit_rows(rows[:0], torch.float32)
    assert unit.shape == (0, 5) and norm.shape == (0,)
    assert unit_rows_backward(unit, rows[:0], norm).shape == (0, 5)


@pytest.mark.parametrize(
    "rows", [torch.ones(3), torch.ones(2, 0), torch.ones(1, 4097), torch.ones(1, 2).double()]
)
def test_what_it_does_not_take(rows):
    with pytest.raises(ValueError, match="`rows` must be float32, bfloat16 or float16 of shape"):
        unit_rows(rows, torch.float32)


@pytest.mark.parametrize(("dtype", "out"), CASES, ids=str)
def test_autograd(dtype, out):
    """A launch each way; and by PyTorch's own means where the gradient has a graph."""
    rows, grad = vectors(9, 24, dtype)
    rows, grad = rows[[0, 1, 2, 3, 5, 6, 7, 8]], grad[:8].to(out)
    expected, expected_grad = exact(rows, grad)
    leaf = rows.clone().requires_grad_()
    unit = ops._FusedUnitRows.apply(leaf, out)
    assert_near(unit, expected, out)
    (got,) = torch.autograd.grad(unit, leaf, grad, retain_graph=True)
    assert_near(got, expected_grad, dtype)
    grad.requires_grad_()
    (with_graph,) = torch.autograd.grad(unit, leaf, grad, create_graph=True)
    assert with_graph.requires_grad
    assert_near(with_graph.detach(), expected_grad, dtype)
