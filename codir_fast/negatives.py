"""Where the negatives of the contrastive loss come from, and which count for which query."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.checks import (
    check_device,
    check_float_dtype,
    check_index,
    check_integers,
    check_same_dtype,
)
from codir_fast.memory_bank import IndexedBank, MemoryQueue

Negatives: TypeAlias = Tensor | MemoryQueue | IndexedBank | None
EPS = 1e-12  # of F.normalize
_WIDENED = 1 << 18  # elements, 1 MiB in float32


@dataclass
class ChosenNegatives:
    """The negatives as bank_contrast takes them; `source` says where they come from, for labels and
    exclusion.
    """

    rows: Tensor
    scale: Tensor | None = None
    valid: Tensor | None = None
    source: Negatives = None


def choose_negatives(
    query: Tensor, positive: Tensor, negative_keys: Negatives, normalize: bool
) -> ChosenNegatives:
    if negative_keys is None:
        return ChosenNegatives(positive.contiguous())
    if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        _check_bank(query, negative_keys)
        valid = None if negative_keys.is_full else negative_keys.valid
        return ChosenNegatives(negative_keys.rows, valid=valid, source=negative_keys)
    _check_explicit(query, negative_keys)
    if not normalize:
        return ChosenNegatives(negative_keys.contiguous(), source=negative_keys)
    wide = positive.dtype
    if negative_keys.requires_grad and torch.is_grad_enabled():
        rows = F.normalize(negative_keys.to(wide), dim=1, eps=EPS)
        return ChosenNegatives(rows.contiguous(), source=negative_keys)
    # Without gradient the kernel scales the rows as it reads them, and no normalised copy is made.
    scale = _inverse_norm(negative_keys.detach(), wide)
    return ChosenNegatives(negative_keys.contiguous(), scale=scale, source=negative_keys)


def _inverse_norm(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.dtype == dtype or torch.compiler.is_compiling():
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    else:  # in parts: vector_norm widens all that it is given at once
        parts = rows.split(max(1, _WIDENED // max(rows.shape[1], 1)))
        norm = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts])
    return norm.clamp_min_(EPS).reciprocal_()


def _check_bank(query: Tensor, bank: MemoryQueue | IndexedBank) -> None:
    if bank.dim != query.shape[1]:
        raise ValueError(
            f"`negative_keys` must be a bank of dim D={query.shape[1]} as `query`, got {bank.dim}"
        )
    check_device("negative_keys", bank.rows, query.device, "`query`")
    if bank.rows.dtype == torch.float64 and query.dtype != torch.float64:
        raise ValueError("`negative_keys` is a float64 bank, which needs a float64 `query`")


def _check_explicit(query: Tensor, negative_keys: Tensor) -> None:
    if not isinstance(negative_keys, Tensor):
        raise TypeError(
            "`negative_keys` must be None, a Tensor, a MemoryQueue or an IndexedBank, "
            f"got {type(negative_keys).__name__}"
        )
    if negative_keys.ndim == 3:
        raise NotImplementedError("`negative_keys` (B, M, D), one set per query, is not built yet")
    D = query.shape[1]
    if negative_keys.ndim != 2 or negative_keys.shape[1] != D:
        raise ValueError(
            f"`negative_keys` must have shape (K, D) with D={D} as `query`, "
            f"got {tuple(negative_keys.shape)}"
        )
    if negative_keys.shape[0] == 0:
        raise ValueError(
            f"`negative_keys` must have at least one row, got {tuple(negative_keys.shape)}"
        )
    check_float_dtype("negative_keys", negative_keys.dtype)
    check_device("negative_keys", negative_keys, query.device, "`query`")
    check_input_dtype("negative_keys", negative_keys, query)


def choose_labels(
    query: Tensor, negatives: ChosenNegatives, labels: Tensor | None, negative_labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    source, explicit = negatives.source, isinstance(negatives.source, Tensor)
    if negative_labels is not None and not explicit:
        raise ValueError("`negative_labels` needs `negative_keys` given as a (K, D) tensor")
    if labels is None:
        if negative_labels is not None:
            raise ValueError("`negative_labels` needs `labels`, got None")
        return None, None
    labels = _as_int64("labels", labels, query, "B", query.shape[0])
    if explicit:
        if negative_labels is None:
            raise ValueError("`labels` with a (K, D) `negative_keys` needs `negative_labels`")
        K = negatives.rows.shape[0]
        return labels, _as_int64("negative_labels", negative_labels, query, "K", K)
    if isinstance(source, (MemoryQueue, IndexedBank)):
        if source.row_labels is None:
            raise ValueError("`labels` needs a bank that has labels; `negative_keys` has none")
        return labels, source.row_labels
    return labels, labels


def choose_exclusion(
    query: Tensor, negatives: ChosenNegatives, exclude_index: Tensor | None
) -> Tensor | None:
    B, K = query.shape[0], negatives.rows.shape[0]
    if negatives.source is None:
        if exclude_index is not None:
            raise ValueError(
                "`exclude_index` needs `negative_keys`: in-batch each query's own key is left out"
            )
        return torch.arange(B, device=query.device)
    if exclude_index is None:
        return None
    exclude_index = _as_int64("exclude_index", exclude_index, query, "B", B)
    check_index("exclude_index", exclude_index, -1, K)
    return exclude_index


def _as_int64(name: str, value: Tensor, query: Tensor, letter: str, length: int) -> Tensor:
    check_integers(name, value, f"({letter},) with {letter}={length}", length)
    check_device(name, value, query.device, "`query`")
    return value.to(torch.int64).contiguous()


def check_input_dtype(name: str, value: Tensor, query: Tensor) -> None:
    # Under autocast one input may come out of a matrix product in half precision and another out of
    # a float32 buffer; float64 is nothing that autocast mixes.
    mixed = value.dtype != query.dtype and torch.float64 not in (value.dtype, query.dtype)
    if not (mixed and torch.is_autocast_enabled(query.device.type)):
        check_same_dtype(name, value, query.dtype, "`query`")
