"""How many tokens of a text a model can read."""

from dataclasses import fields

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codir_fast.distillation.arguments import PlainTextArguments
from codir_fast.errors import UsageError


def longest_text(
    data: PlainTextArguments, tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel
) -> int:
    """Tokens that tokenizer and models can read; of the default of `max_seq_length` fewer may be.

    Raises:
        UsageError: a `max_seq_length` beyond that, or one that leaves no room for a text.
    """
    limit = min(tokenizer.model_max_length, *(_positions(model) for model in models))
    default = next(f.default for f in fields(PlainTextArguments) if f.name == "max_seq_length")
    if data.max_seq_length > limit and data.max_seq_length != default:
        raise UsageError(
            f"`max_seq_length` must be at most {limit}, what the model can read, got "
            f"{data.max_seq_length}"
        )
    has_pairs = getattr(data, "text_pair_column", None) is not None
    special = tokenizer.num_special_tokens_to_add(pair=has_pairs)
    if min(data.max_seq_length, limit) <= special:
        raise UsageError(
            f"`max_seq_length` must be more than the {special} tokens that stand around each text, "
            f"got {min(data.max_seq_length, limit)}"
        )
    return limit


def _positions(model: PreTrainedModel) -> int:
    """RoBERTa and its kind number positions from padding_idx + 1 on: those before are lost."""
    limit = getattr(model.config, "max_position_embeddings", 2**31 - 1)
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            lost = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - lost)
    return limit
