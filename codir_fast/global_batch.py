"""The batch of all ranks: whether they mean the same loss, and what each of them has of it."""

import math
from typing import Any

import torch
from torch import Tensor

from codir_fast.collectives import Ranks, Settings, agree, outside_graphs, ranks_of
from codir_fast.memory_bank import IndexedBank, MemoryQueue
from codir_fast.negatives import Negatives
from codir_fast.sharding import GlobalBatch, Shard, check_first_rows

Vectors = tuple[Tensor, Tensor, Negatives]  # query, positive_key, negative_keys


@outside_graphs
def agree_on_batch(
    what: str, process_group: Any, vectors: Vectors, settings: Settings
) -> GlobalBatch | None:
    """The queries and rows of all ranks, once it is known that all mean the same loss; None for a
    group of one.

    Raises:
        TypeError, ValueError: no process group; ranks differ in a setting; a bank that is not
            sharded over these ranks.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return None
    query, _, negative_keys = vectors
    settings = (*_shapes(vectors), *_gradients(vectors, settings), *settings)
    num_rows, shard, mark = query.shape[0], None, None
    if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        shard, mark = _shard(ranks, negative_keys), negative_keys.first_row
    elif isinstance(negative_keys, Tensor):
        num_rows = negative_keys.shape[0] if negative_keys.ndim == 2 else 0
    every = agree(ranks, what, settings, (query.shape[0], num_rows), query.device, mark)
    sizes, rows, firsts = zip(*every, strict=True)
    if shard is None:
        return GlobalBatch(ranks, sizes, sum(rows[: ranks.rank]), sum(rows))
    check_first_rows(shard, list(firsts))
    return GlobalBatch(ranks, sizes, shard.first, shard.size)


def alike(
    temperature: float | Tensor,
    normalize: bool,
    symmetric: bool,
    num_data: int | None,
    labels: Tensor | None,
    negative_labels: Tensor | None,
    negative_index: Tensor | None,
    exclude_index: Tensor | None,
) -> Settings:
    """What ranks must be given alike, by the arguments' names."""
    if isinstance(temperature, Tensor):  # reading one would wait for a GPU
        temperature = temperature.item() if temperature.device.type == "cpu" else math.nan
    masks = {"labels": labels, "negative_labels": negative_labels, "exclude_index": exclude_index}
    return (
        ("temperature", temperature),
        ("normalize", normalize),
        ("symmetric", symmetric),
        ("num_data", num_data),
        *((name, None if mask is None else "given") for name, mask in masks.items()),
        ("negative_index", None if negative_index is None else f"(B, {negative_index.shape[-1]})"),
    )


def _shapes(vectors: Vectors) -> Settings:
    query, positive, negative_keys = vectors
    if isinstance(negative_keys, (MemoryQueue, IndexedBank)):
        kind = f"a {type(negative_keys).__name__} of {negative_keys.size} rows"
    elif isinstance(negative_keys, Tensor):
        kind = f"a {negative_keys.ndim}-d Tensor"
    else:
        kind = "None" if negative_keys is None else type(negative_keys).__name__
    return (
        ("D", query.shape[1]),
        ("negative_keys", kind),
        ("query.dtype", str(query.dtype)),
        ("positive_key.dtype", str(positive.dtype)),
    )


def _gradients(vectors: Vectors, settings: Settings) -> Settings:
    """Which negatives need one: then the backward pass, too, is a step of all ranks."""
    query, positive, negative_keys = vectors
    rows = {"negative_keys": negative_keys}
    if negative_keys is None:
        rows = {"positive_key": positive}
        if ("symmetric", True) in settings:
            rows["query"] = query
    needed = torch.is_grad_enabled()
    return tuple(
        (f"{name}.requires_grad", needed and isinstance(x, Tensor) and x.requires_grad)
        for name, x in rows.items()
    )


def _shard(ranks: Ranks, bank: MemoryQueue | IndexedBank) -> Shard:
    """This rank's part of a bank, which must be sharded over just these ranks."""
    if bank.shard is None:
        raise ValueError(
            "`negative_keys` must be a bank with the `process_group` of the loss, got one without: "
            "each rank would have a bank of its own"
        )
    if not bank.shard.ranks.is_of(ranks.group):
        raise ValueError(
            "`negative_keys` must be a bank with the `process_group` of the loss, got one with "
            "another"
        )
    return bank.shard
