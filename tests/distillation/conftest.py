"""The folder that all tests of training start from."""

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, tiny_config, write_examples
from transformers import BertForSequenceClassification


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
