"""Hashes by which a run knows weights and texts again."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def hash_weights(model: PreTrainedModel) -> str:
    """Of class and weights; not of the configuration, which each version of transformers words in
    its own way.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:  # else it has no values
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_tokens(tokens: Dataset) -> str:
    """Of what a model reads: it stands for texts, tokenizer and length."""
    digest = hashlib.sha256()
    names = [name for name in INPUTS if name in tokens.column_names]
    for batch in tokens.select_columns(names).with_format(None).iter(1000):
        digest.update(canonical(batch).encode())
    return digest.hexdigest()


def hash_columns(examples: Dataset, names: Sequence[str]) -> str:
    """Of all rows of these columns, read as blocks of numbers: a million texts take seconds. The
    same for the same numbers, in whatever type and pieces they are stored.
    """
    digest = hashlib.sha256()
    for batch in examples.select_columns(list(names)).with_format("arrow").iter(10_000):
        for name in names:
            column = batch[name].combine_chunks()
            if isinstance(column, pa.ListArray | pa.LargeListArray):
                digest.update(_bytes_of(column.value_lengths()))
                column = column.flatten()
            digest.update(_bytes_of(column))
    return digest.hexdigest()


def hash_file(path: str) -> str:
    """Of its contents, read a block at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bytes_of(values: pa.Array) -> Any:
    if values.null_count == 0 and pa.types.is_integer(values.type):
        return values.to_numpy(zero_copy_only=False).astype("<i8")
    if values.null_count == 0 and pa.types.is_floating(values.type):
        return values.to_numpy(zero_copy_only=False).astype("<f8")
    return canonical(values.to_pylist()).encode()


def canonical(value: Any) -> str:
    """JSON, the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)
