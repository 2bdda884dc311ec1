"""How many tokens models read, where a flag asks for more or for too few."""

import pytest
import torch
from tiny import make_tokenizer, tiny_config
from transformers import (
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from codir_fast.distillation.arguments import TextArguments
from codir_fast.distillation.lengths import longest_text
from codir_fast.errors import UsageError

SMALL = {
    "vocab_size": 44,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}
MODELS = {
    "bert": (lambda: BertForSequenceClassification(tiny_config(**SMALL)), 20),
    # Positions 0 and 1 are those of padding and of nothing.
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1)),
        18,
    ),
    "modernbert": (
        lambda: ModernBertForSequenceClassification(ModernBertConfig(**SMALL, pad_token_id=0)),
        20,
    ),
}


def tokenizer(model_max_length=10**30):
    made = make_tokenizer()
    made.model_max_length = model_max_length
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_model_reads_so_many_tokens(kind):
    make, limit = MODELS[kind]
    model = make().eval()
    assert longest_text(TextArguments(), tokenizer(), model) == limit
    model(torch.randint(4, 40, (2, limit)))
    if kind != "modernbert":  # has no table of positions, and its limit is a promise alone
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.randint(4, 40, (2, limit + 1)))


def test_the_least_of_tokenizer_and_models_counts():
    models = [MODELS[kind][0]() for kind in ("bert", "roberta")]
    assert longest_text(TextArguments(), tokenizer(), *models) == 18
    assert longest_text(TextArguments(), tokenizer(11), *models) == 11


def test_without_a_limit_it_is_the_default():
    config = XLNetConfig(vocab_size=44, d_model=16, n_layer=2, n_head=2, d_inner=32)
    model = XLNetForSequenceClassification(config)
    assert longest_text(TextArguments(), tokenizer(), model) == 128
    assert longest_text(TextArguments(max_seq_length=400), tokenizer(), model) == 400


def test_lengths_that_cannot_be_are_refused():
    model = MODELS["bert"][0]()
    assert longest_text(TextArguments(max_seq_length=20), tokenizer(), model) == 20
    with pytest.raises(UsageError, match="must be at most 20, what the model can read, got 21"):
        longest_text(TextArguments(max_seq_length=21), tokenizer(), model)
    with pytest.raises(UsageError, match="must be at most 20, what the model can read, got 128"):
        longest_text(TextArguments(max_seq_length=128), tokenizer(), model)
    assert longest_text(TextArguments(max_seq_length=3), tokenizer(), model) == 3
    with pytest.raises(UsageError, match="more than the 2 tokens that stand around each text"):
        longest_text(TextArguments(max_seq_length=2), tokenizer(), model)
    pairs = TextArguments(text_pair_column="b", max_seq_length=3)
    with pytest.raises(UsageError, match="more than the 3 tokens"):
        longest_text(pairs, tokenizer(), model)
