"""How many tokens of a text a model can read."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codir_fast.distillation.arguments import PlainTextArguments
from codir_fast.errors import UsageError

DEFAULT_LENGTH = 128


def longest_text(
    data: PlainTextArguments, tokenizer: PreTrainedTokenizerBase, *models: PreTrainedModel
) -> int:
    """Tokens of a text that tokenizer and models can read, no more than `max_seq_length`.

    Raises:
        UsageError: a `max_seq_length` beyond that, or one that leaves no room for a text.
    """
    limit = min(tokenizer.model_max_length, *(_positions(model) for model in models))
    wanted = min(DEFAULT_LENGTH, limit) if data.max_seq_length is None else data.max_seq_length
    if wanted > limit:
        raise UsageError(
            f"`max_seq_length` must be at most {limit}, what the model can read, got {wanted}"
        )
    has_pairs = getattr(data, "text_pair_column", None) is not None
    special = tokenizer.num_special_tokens_to_add(pair=has_pairs)
    if wanted <= special:
        raise UsageError(
            f"`max_seq_length` must be more than the {special} tokens that stand around each text, "
            f"got {wanted}"
        )
    return wanted


def _positions(model: PreTrainedModel) -> int:
    """RoBERTa and its kind number positions from padding_idx + 1 on: those before are lost."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    limit = limit if limit > 0 else 2**31 - 1  # XLNet has -1: positions are relative to each other
    for name, module in model.named_modules():
        if name.endswith(".position_embeddings") and isinstance(module, nn.Embedding):
            lost = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - lost)
    return limit
