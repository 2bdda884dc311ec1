"""L2-normalised rows: F.normalize, of whose time on small inputs most is overhead of autograd."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.ops.registration import under_functorch

EPS = 1e-12  # of F.normalize


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) for each row of x (N, D), for an operator that is differentiable once."""
    if torch.compiler.is_compiling() or under_functorch():
        return F.normalize(x, dim=1, eps=EPS)
    if x.requires_grad and torch.is_grad_enabled():
        return _UnitRows.apply(x)
    return unit_and_norm(x)[0]


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
