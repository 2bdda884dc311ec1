"""How vectors become rows that serve as negatives: normalised, with a gradient, or as they are,
beside the factors that do it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from codir_fast.ops.registration import is_transformed
from codir_fast.ops.unit_rows import EPS, unit_rows

_WIDENED = 1 << 18  # elements, 1 MiB in float32


class RowForm(NamedTuple):
    """How vectors become rows that serve as negatives: of unit length if `normalize`, in `dtype`,
    for an operator by `backend`.
    """

    normalize: bool
    dtype: torch.dtype
    backend: str


def as_rows(vectors: Tensor, form: RowForm) -> Tensor:
    """Vectors (N, D) as negatives; the gradient goes on to them."""
    if form.normalize:
        return unit_rows(vectors, form.dtype, form.backend).contiguous()
    return vectors.to(form.dtype).contiguous()


def carries_gradient(vectors: Tensor) -> bool:
    """Whether they do, or may: what functorch's transforms wrap does not always say so. A tangent
    of forward mode is none, but must meet the operator that refuses it.
    """
    if is_transformed(vectors) or (vectors.requires_grad and torch.is_grad_enabled()):
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(vectors).tangent is not None


def scaled_rows(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors (N, D) as negatives without a gradient, and the factors (N,) that bring them to unit
    length: the kernel scales rows as it reads them, and no normalised copy is made.
    """
    rows = vectors.detach()
    return rows.contiguous(), _inverse_norm(rows, dtype)


def _inverse_norm(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.dtype == dtype or rows.is_cuda or torch.compiler.is_compiling():
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    else:  # in parts: on the CPU vector_norm widens all that it is given at once
        parts = rows.split(max(1, _WIDENED // max(rows.shape[1], 1)))
        norm = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts])
    return norm.clamp_min_(EPS).reciprocal_()
