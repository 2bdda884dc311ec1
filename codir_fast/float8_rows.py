"""Rows of a bank in float8, with a factor for each."""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


def as_bytes(rows: Tensor) -> Tensor:
    """float8 rows for indexing, which few devices know for their dtype; others as they are."""
    return rows.view(torch.int8) if rows.dtype == FLOAT8 else rows


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, D) in float8 and their factors (N,), which restore the length that they had, up to
    1e-12: it is what logits depend on most.
    """
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    rounded = (rows * (torch.finfo(FLOAT8).max / largest)).to(FLOAT8)
    norms = (torch.linalg.vector_norm(x, dim=1) for x in (rows, rounded.float()))
    norm, rounded_norm = (x.clamp_min(1e-12) for x in norms)
    return rounded, norm / rounded_norm
