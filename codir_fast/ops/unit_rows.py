"""L2-normalised rows: F.normalize, of whose time on small inputs most is overhead of autograd, and
on a GPU that of launches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.backend import runs_triton
from codir_fast.ops import registration
from codir_fast.ops.registration import under_functorch

EPS = 1e-12  # of F.normalize


def unit_rows(x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """x / max(|x|, 1e-12) for each row of x (N, D), computed in float32 (float64 for float64), then
    in `dtype`; for an operator by `backend` that is differentiable once.
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling() or under_functorch():
        return F.normalize(x.to(wide), dim=1, eps=EPS).to(dtype)
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if runs_triton(backend, x):
        if needs_grad:
            return _FusedUnitRows.apply(x, dtype)
        return torch.ops.codir_fast.unit_rows(x, dtype)[0]
    if needs_grad:
        return _UnitRows.apply(x.to(wide)).to(dtype)
    return unit_and_norm(x.to(wide))[0].to(dtype)


def unit_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (N, D), and max(|x|, 1e-12), (N, 1)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(EPS)
    return x / norm, norm


def unit_rows_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """dx = (g - u (u.g)) / |x|; below 1e-12 the divisor is a constant: dx = g / 1e-12."""
    along = (grad * unit).sum(1, keepdim=True) * (norm > EPS)
    return torch.addcmul(grad, unit, along, value=-1) / norm


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        unit, norm = unit_and_norm(x)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return unit_rows_backward(grad, *ctx.saved_tensors)


class _FusedUnitRows(torch.autograd.Function):
    """A launch each way; where PyTorch is to differentiate the gradient in turn, by its own means,
    so that what follows can refuse it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        unit, norm = torch.ops.codir_fast.unit_rows(x, dtype)
        ctx.save_for_backward(x, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, norm = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return torch.ops.codir_fast.unit_rows_backward(grad, x, norm), None
        norm = norm[:, None]
        dx = unit_rows_backward(grad.to(norm.dtype), x.to(norm.dtype) / norm, norm)
        return dx.to(x.dtype), None


def _triton(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from codir_fast.kernels import unit_rows as kernel  # Triton is loaded on first use

    return kernel.unit_rows(rows, dtype)


def _triton_backward(grad: Tensor, rows: Tensor, norm: Tensor) -> Tensor:
    from codir_fast.kernels import unit_rows as kernel

    return kernel.unit_rows_backward(grad, rows, norm)


def _fake(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    norm = rows.new_empty(rows.shape[:1], dtype=torch.float32)
    return rows.new_empty(rows.shape, dtype=dtype), norm


registration.add_operator(
    "unit_rows(Tensor rows, ScalarType dtype) -> (Tensor unit, Tensor norm)", _triton, _fake
)
registration.add_operator(
    "unit_rows_backward(Tensor grad, Tensor rows, Tensor norm) -> Tensor",
    _triton_backward,
    lambda grad, rows, norm: rows.new_empty(rows.shape),
)
