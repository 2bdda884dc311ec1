"""The folder that all tests of training start from."""

from pathlib import Path

import pytest
import torch
from tiny import (
    MASKED_VOCABULARY,
    make_masking_tokenizer,
    make_tokenizer,
    tiny_config,
    write_examples,
    write_texts,
)
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """teacher/, train.csv and validation.csv; nothing may be written here."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_config()).save_pretrained(path / "teacher")
    make_tokenizer().save_pretrained(path / "teacher")
    write_examples(path / "train.csv", 48, seed=1)
    write_examples(path / "validation.csv", 20, seed=2)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """texts.txt, encoder/ without a head, and mlm/ with one; nothing may be written here."""
    path = tmp_path_factory.mktemp("corpus")
    torch.manual_seed(0)
    for name, kind in (("encoder", BertModel), ("mlm", BertForMaskedLM)):
        kind(tiny_config(vocab_size=MASKED_VOCABULARY)).save_pretrained(path / name)
        make_masking_tokenizer().save_pretrained(path / name)
    write_texts(path / "texts.txt", 40, seed=1)
    return path
