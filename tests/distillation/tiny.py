"""A model, a tokenizer and texts small enough to train in seconds; nothing is fetched."""

import csv
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

WORDS = [f"w{n}" for n in range(40)]
LABELS = ("negative", "positive")


def tiny_config(**changes):
    return BertConfig(
        **{
            "vocab_size": len(WORDS) + 4,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "label2id": {name: n for n, name in enumerate(LABELS)},
            "id2label": dict(enumerate(LABELS)),
        }
        | changes
    )


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_masking_tokenizer() -> PreTrainedTokenizerFast:
    """make_tokenizer with a mask token, the last of its MASKED_VOCABULARY tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


MASKED_VOCABULARY = len(WORDS) + 5


def write_texts(path: Path, count: int, seed: int) -> Path:
    """Lines of 4 to 12 words."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_examples(path: Path, count: int, seed: int) -> Path:
    """Texts of 3 to 9 words; the label is whether one of the first five words occurs."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randint(3, 9))
            writer.writerow([" ".join(words), LABELS[any(w in WORDS[:5] for w in words)]])
    return path
