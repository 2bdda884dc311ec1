"""unit_rows: rows (N, D) brought to unit length, and the gradient through that, in a launch each.

A program owns a few whole rows. Lengths and gradients are computed in float32, whatever comes in
and goes out.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import MAX_DIM, QUERY_DTYPES, check, padded
from torch import Tensor

MIN_NORM = tl.constexpr(1e-12)  # as in torch.nn.functional.normalize


@triton.jit
def _load(rows_ptr, at, inside):
    return tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def unit_rows_kernel(
    unit_ptr, norm_ptr, rows_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Grid (blocks of N,)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    at = n[:, None] * D + d[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    row = _load(rows_ptr, at, inside)
    norm = tl.sqrt(tl.sum(row * row, 1))
    norm = tl.maximum(norm, MIN_NORM, propagate_nan=tl.PropagateNan.ALL)
    tl.store(norm_ptr + n, norm, mask=n < N)
    unit = row / norm[:, None]
    tl.store(unit_ptr + at, unit.to(unit_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def unit_rows_backward_kernel(
    drows_ptr,
    grad_ptr,
    rows_ptr,
    norm_ptr,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of N,): (g - u (u.g)) / |x|; what is shorter than MIN_NORM was divided by a
    constant.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    at = n[:, None] * D + d[None, :]
    inside = (n < N)[:, None] & (d < D)[None, :]
    grad = _load(grad_ptr, at, inside)
    norm = tl.load(norm_ptr + n, mask=n < N, other=1.0)
    unit = _load(rows_ptr, at, inside) / norm[:, None]
    along = tl.where(norm > MIN_NORM, tl.sum(grad * unit, 1), 0.0)
    drows = (grad - along[:, None] * unit) / norm[:, None]
    tl.store(drows_ptr + at, drows.to(drows_ptr.dtype.element_ty), mask=inside)


def unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / max(|x|, 1e-12) for each row x of `rows` (N, D), in `dtype`; and max(|x|, 1e-12), (N,)
    float32.

    Seen right on an H200; for other GPUs compiled only, and run by the interpreter.

    Args:
        rows: float32, bfloat16 or float16, D up to 4096.
        dtype: one of these, of the unit rows.
    """
    N, D = _check(rows)
    unit = torch.empty(N, D, dtype=dtype, device=rows.device)
    norm = torch.empty(N, dtype=torch.float32, device=rows.device)
    tile = tiles.unit_rows(padded(D))
    if N > 0:
        with torch.cuda.device_of(rows):
            grid = (cdiv(N, tile["BLOCK_N"]),)
            launch(unit_rows_kernel, grid, unit, norm, rows.contiguous(), N, D, **tile)
    return unit, norm


def unit_rows_backward(grad: Tensor, rows: Tensor, norm: Tensor) -> Tensor:
    """Gradient of `rows`, in their dtype, from that of their unit rows, in any; `norm` as unit_rows
    gave it.
    """
    N, D = _check(rows)
    check("grad", grad, (N, D), QUERY_DTYPES, rows.device)
    check("norm", norm, (N,), (torch.float32,), rows.device)
    drows = torch.empty(N, D, dtype=rows.dtype, device=rows.device)
    tile = tiles.unit_rows(padded(D))
    if N > 0:
        with torch.cuda.device_of(rows):
            grid, vectors = (cdiv(N, tile["BLOCK_N"]),), (grad.contiguous(), rows.contiguous())
            launch(unit_rows_backward_kernel, grid, drows, *vectors, norm, N, D, **tile)
    return drows


def _check(rows: Tensor) -> tuple[int, int]:
    """N and D."""
    if rows.ndim != 2 or not 0 < rows.shape[1] <= MAX_DIM or rows.dtype not in QUERY_DTYPES:
        raise ValueError(
            "`rows` must be float32, bfloat16 or float16 of shape (N, D) with D at most "
            f"{MAX_DIM}, got {rows.dtype} {tuple(rows.shape)}"
        )
    return rows.shape[0], rows.shape[1]
