"""Hashes by which a run knows weights and texts again."""

import hashlib
import json
from typing import Any

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


def canonical(value: Any) -> str:
    """JSON, the same for the same value."""
    return json.dumps(value, sort_keys=True, default=str)
