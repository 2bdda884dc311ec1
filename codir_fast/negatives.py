"""Where the negatives of the contrastive loss come from, and which count for which query."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from codir_fast.checks import (
    INTEGERS,
    check_device,
    check_float_dtype,
    check_index,
    check_integers,
    check_same_dtype,
    check_tensor,
)
from codir_fast.memory_bank import IndexedBank, MemoryQueue
from codir_fast.negative_rows import RowForm, as_rows, carries_gradient, scaled_rows
from codir_fast.ops.contrast import compute_dtype
from codir_fast.sharding import GlobalBatch

Negatives: TypeAlias = Tensor | MemoryQueue | IndexedBank | None


@dataclass
class ChosenNegatives:
    """The negatives as the operators take them; `source` is what the user gave.

    Where they are sharded, `rows` and what belongs to them are this rank's, and `index` and
    `exclude_index` speak of the rows of all ranks, of which this rank's begin at `first_row`.
    """

    rows: Tensor
    source: Negatives
    total: int  # rows of all ranks, K
    first_row: int = 0
    scale: Tensor | None = None
    valid: Tensor | None = None
    index: Tensor | None = None
    labels: Tensor | None = None
    row_labels: Tensor | None = None
    exclude_index: Tensor | None = None

    @property
    def in_batch(self) -> bool:
        return self.source is None

    @property
    def own(self) -> bool:
        """Each query has rows of its own: row b * M + m of `rows` belongs to query b alone."""
        return isinstance(self.source, Tensor) and self.source.ndim == 3

    @property
    def num_offered(self) -> int:
        """Negatives that each query has before masks, M in NCE."""
        if self.index is not None:
            return self.index.shape[1]
        return max(self.total - 1, 0) if self.in_batch else self.total

    @property
    def num_rows(self) -> int:
        """Rows that a query's negatives are taken from, n in NCE."""
        return self.num_offered if self.own else self.total


def choose_negatives(
    query: Tensor,
    positive: Tensor,
    negative_keys: Negatives,
    form: RowForm,
    labels: Tensor | None,
    negative_labels: Tensor | None,
    negative_index: Tensor | None,
    exclude_index: Tensor | None,
    batch: GlobalBatch | None = None,
) -> ChosenNegatives:
    """Checks all that picks the negatives; `positive` are the keys, as rows where they serve as
    negatives. `form`: of rows that carry a gradient, if normalised. `batch`: of all ranks, where
    negatives are sharded.
    """
    chosen = _choose_rows(query, positive, negative_keys, form)
    if batch is None and isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        _check_whole(negative_keys)
    if batch is not None and not chosen.own:
        chosen.total, chosen.first_row = batch.num_rows, batch.first_row
    if chosen.in_batch:
        others = in_batch_labels(query, labels, negative_labels, negative_index, exclude_index)
        chosen.labels = chosen.row_labels = others
        first, end = chosen.first_row, chosen.first_row + query.shape[0]
        chosen.exclude_index = torch.arange(first, end, device=query.device)
        return chosen
    if negative_index is not None:
        if chosen.own:
            raise ValueError("`negative_index` needs `negative_keys` shared by all queries")
        chosen.index = _check_index(query, negative_index, chosen.total)
    chosen.labels, chosen.row_labels = _choose_labels(query, chosen, labels, negative_labels)
    chosen.exclude_index = _choose_exclusion(query, chosen, exclude_index)
    return chosen


def in_batch_labels(
    query: Tensor,
    labels: Tensor | None,
    negative_labels: Tensor | None = None,
    negative_index: Tensor | None = None,
    exclude_index: Tensor | None = None,
) -> Tensor | None:
    """The labels as the operators take them, of the queries and of the keys; refuses all that picks
    among negatives that are given.
    """
    if negative_index is not None:
        raise ValueError("`negative_index` needs `negative_keys`, a (K, D) tensor or a bank")
    if negative_labels is not None:
        raise ValueError("`negative_labels` needs `negative_keys` given as a tensor")
    if exclude_index is not None:
        raise ValueError(
            "`exclude_index` needs `negative_keys`: in-batch each query's own key is left out"
        )
    return None if labels is None else _as_int64("labels", labels, query, "B", query.shape[0])


def _choose_rows(
    query: Tensor, positive: Tensor, negative_keys: Negatives, form: RowForm
) -> ChosenNegatives:
    if negative_keys is None:
        return ChosenNegatives(positive, source=None, total=positive.shape[0])
    if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        rows, scale = negative_keys.rows, negative_keys.row_scale
        _check_bank(query, rows)
        valid = None if negative_keys.is_full else negative_keys.valid
        if scale is not None:
            scale = scale.to(compute_dtype(query.dtype))
        return ChosenNegatives(
            rows, source=negative_keys, total=rows.shape[0], scale=scale, valid=valid
        )
    _check_explicit(query, negative_keys)
    rows, scale = _explicit(negative_keys.flatten(0, -2), form)
    chosen = ChosenNegatives(rows, source=negative_keys, total=rows.shape[0], scale=scale)
    if chosen.own:
        B, M, _ = negative_keys.shape
        chosen.index = torch.arange(B * M, device=query.device).view(B, M)
    return chosen


def _explicit(rows: Tensor, form: RowForm) -> tuple[Tensor, Tensor | None]:
    """Rows, and their factors if any."""
    if not form.normalize:
        return rows.contiguous(), None
    if carries_gradient(rows):
        return as_rows(rows, form), None
    return scaled_rows(rows, compute_dtype(form.dtype))


def _check_index(query: Tensor, index: Tensor, K: int) -> Tensor:
    B = query.shape[0]
    check_tensor("negative_index", index)
    if index.dtype not in INTEGERS:
        raise TypeError(f"`negative_index` must be of an integer dtype, got {index.dtype}")
    if index.ndim != 2 or index.shape[0] != B:
        raise ValueError(
            f"`negative_index` must have shape (B, M) with B={B}, got {tuple(index.shape)}"
        )
    check_device("negative_index", index, query.device, "`query`")
    check_index("negative_index", index, 0, K)
    return index.to(torch.int64).contiguous()


def _check_bank(query: Tensor, rows: Tensor) -> None:
    D, dim = query.shape[1], rows.shape[1]
    if dim != D:
        raise ValueError(f"`negative_keys` must be a bank of dim D={D} as `query`, got {dim}")
    check_device("negative_keys", rows, query.device, "`query`")
    if rows.dtype == torch.float64 and query.dtype != torch.float64:
        raise ValueError("`negative_keys` is a float64 bank, which needs a float64 `query`")


def _check_whole(bank: MemoryQueue | IndexedBank) -> None:
    if bank.shard is not None:
        raise ValueError(
            "`negative_keys` is sharded over a process group: give the loss the same "
            "`process_group`"
        )


def _check_explicit(query: Tensor, negative_keys: Tensor) -> None:
    if not isinstance(negative_keys, Tensor):
        raise TypeError(
            "`negative_keys` must be None, a Tensor, a MemoryQueue or an IndexedBank, "
            f"got {type(negative_keys).__name__}"
        )
    check_tensor("negative_keys", negative_keys)
    B, D = query.shape
    shared = negative_keys.ndim == 2
    own = negative_keys.ndim == 3 and negative_keys.shape[0] == B
    if not (shared or own) or negative_keys.shape[-1] != D:
        raise ValueError(
            f"`negative_keys` must have shape (K, D) or (B, M, D) with B={B}, D={D} as `query`, "
            f"got {tuple(negative_keys.shape)}"
        )
    check_float_dtype("negative_keys", negative_keys.dtype)
    check_device("negative_keys", negative_keys, query.device, "`query`")
    check_input_dtype("negative_keys", negative_keys, query)


def _choose_labels(
    query: Tensor, negatives: ChosenNegatives, labels: Tensor | None, negative_labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    source = negatives.source
    if negative_labels is not None and not isinstance(source, Tensor):
        raise ValueError("`negative_labels` needs `negative_keys` given as a tensor")
    if labels is None:
        if negative_labels is not None:
            raise ValueError("`negative_labels` needs `labels`, got None")
        return None, None
    labels = _as_int64("labels", labels, query, "B", query.shape[0])
    if isinstance(source, Tensor):
        if negative_labels is None:
            raise ValueError("`labels` with a tensor as `negative_keys` needs `negative_labels`")
        if negatives.own:
            _check_own_labels(negative_labels, source)
            negative_labels = negative_labels.flatten()
        K = negatives.rows.shape[0]
        return labels, _as_int64("negative_labels", negative_labels, query, "K", K)
    assert isinstance(source, (MemoryQueue, IndexedBank))
    if source.row_labels is None:
        raise ValueError("`labels` needs a bank that has labels; `negative_keys` has none")
    return labels, source.row_labels


def _check_own_labels(negative_labels: Tensor, negative_keys: Tensor) -> None:
    check_tensor("negative_labels", negative_labels)
    B, M, _ = negative_keys.shape
    if negative_labels.shape != (B, M):
        raise ValueError(
            f"`negative_labels` must have shape (B, M) with B={B}, M={M} as `negative_keys`, "
            f"got {tuple(negative_labels.shape)}"
        )


def _choose_exclusion(
    query: Tensor, negatives: ChosenNegatives, exclude_index: Tensor | None
) -> Tensor | None:
    B, K = query.shape[0], negatives.total
    if exclude_index is None:
        return None
    if negatives.own:
        raise ValueError("`exclude_index` needs `negative_keys` shared by all queries")
    exclude_index = _as_int64("exclude_index", exclude_index, query, "B", B)
    check_index("exclude_index", exclude_index, -1, K)
    return exclude_index


def _as_int64(name: str, value: Tensor, query: Tensor, letter: str, length: int) -> Tensor:
    check_integers(name, value, f"({letter},) with {letter}={length}", length)
    check_device(name, value, query.device, "`query`")
    return value.to(torch.int64).contiguous()


def check_input_dtype(name: str, value: Tensor, query: Tensor, other: str = "query") -> None:
    # Under autocast one input may come out of a matrix product in half precision and another out of
    # a float32 buffer; float64 is nothing that autocast mixes.
    mixed = value.dtype != query.dtype and torch.float64 not in (value.dtype, query.dtype)
    if not (mixed and torch.is_autocast_enabled(query.device.type)):
        check_same_dtype(name, value, query.dtype, f"`{other}`")
