"""What the losses of pytorch_metric_learning.py are given: checked, and as they compute with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codir_fast.checks import check_float_dtype, check_index, check_integers, check_tensor


def check_rows(
    name: str, rows: Tensor, letter: str = "B", width: int | None = None, whose: str = ""
) -> None:
    check_tensor(name, rows)
    check_float_dtype(name, rows.dtype)
    if rows.ndim != 2 or rows.shape[1] == 0 or width not in (None, rows.shape[1]):
        wanted = "D at least 1" if width is None else f"D={width}, {whose}"
        raise ValueError(
            f"`{name}` must have shape ({letter}, D) with {wanted}, got {tuple(rows.shape)}"
        )


def check_mask(name: str, mask: Tensor, B: int) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:  # integers would pick rows by their number
        raise TypeError(f"`{name}` must be of dtype bool, got {mask.dtype}")
    if mask.shape != (B,):
        raise ValueError(f"`{name}` must have shape (B,) with B={B}, got {tuple(mask.shape)}")


def as_labels(name: str, labels: Tensor, rows: Tensor, letter: str = "B") -> Tensor:
    check_integers(name, labels, f"({letter},) with {letter}={rows.shape[0]}", rows.shape[0])
    return labels.to(rows.device, torch.int64)


def listed_pairs(indices_tuple: Sequence[Tensor], B: int, R: int) -> list[Tensor]:
    """Anchors and positives (P,), anchors and negatives (N,) of what a miner gave, as int64:
    anchors are rows of B embeddings, the others of R.
    """
    count = len(indices_tuple)
    if count not in (3, 4):
        raise ValueError(f"`indices_tuple` must have 3 or 4 tensors, got {count} of them")
    # Of each tensor: the one that it must be as long as, and what its values must be below.
    partners, limits = ((0, 0, 0), (B, R, R)) if count == 3 else ((0, 0, 2, 2), (B, R, B, R))
    for n, (partner, limit) in enumerate(zip(partners, limits, strict=True)):
        name, part = f"indices_tuple[{n}]", indices_tuple[n]
        check_tensor(name, part)
        length = indices_tuple[partner].numel()
        check_integers(name, part, f"({length},)", length)
        check_index(name, part, 0, limit)
    rows = [part.to(torch.int64) for part in indices_tuple]
    return rows if count == 4 else [rows[0], rows[1], rows[0], rows[2]]
