"""Texts without labels, from files or the hub, as a data set or as a stream."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from datasets import Dataset, IterableDataset
from pandas.errors import ParserError
from pyarrow import ArrowInvalid

from codir_fast.distillation.arguments import CorpusArguments, say
from codir_fast.distillation.data import (
    FORMATS,
    load_from_hub,
    load_splits,
    read_file,
    reading,
)
from codir_fast.errors import UsageError

TEXT_FORMATS = FORMATS | {".txt": "text"}
# Of datasets' readers of csv, json and parquet, text.
STREAM_ERRORS = (ParserError, ArrowInvalid, UnicodeDecodeError)


def load_texts(data: CorpusArguments, seed: int) -> tuple[Any, Dataset | None]:
    """Training and validation texts under the name text, without the blank ones; the training texts
    are a Dataset or, with `streaming`, an IterableDataset.
    """
    if not data.streaming:
        train, validation = load_splits(data, seed, TEXT_FORMATS)
        train = _texts(train, "train_file", data.text_column)
    else:
        train, validation = _streamed(data, seed), None
        if data.validation_file is not None:
            validation = read_file("validation_file", data.validation_file, TEXT_FORMATS)
    if validation is not None:
        validation = _texts(validation, "validation_file", data.text_column)
    return train, validation


def _texts(rows: Dataset, name: str, column: str) -> Dataset:
    texts = _text_column(rows, rows.column_names, name, column)
    blank = len(rows) - len(texts)
    if len(texts) == 0:
        raise UsageError(f"`{name}` holds no text")
    if blank:
        say(f"{name}: {blank} of {len(rows)} texts are blank and left out")
    return texts


def _text_column(rows: Any, columns: list[str], name: str, column: str) -> Any:
    """The texts that are not blank, of a Dataset or an IterableDataset."""
    if column not in columns:
        raise UsageError(
            f"`{name}` has no column {column!r} (`text_column`), its columns are {columns}"
        )

    def has_text(batch: dict[str, list], index: list[int]) -> list[bool]:
        for row, text in zip(index, batch["text"], strict=True):
            if not isinstance(text, str):
                raise UsageError(f"`{name}` must hold texts, row {row} has {text!r}")
        return [bool(text.strip()) for text in batch["text"]]

    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    return rows.filter(has_text, with_indices=True, batched=True)


def _streamed(data: CorpusArguments, seed: int) -> IterableDataset:
    """The texts over and over, so that the epoch is always the first one: a resumed run finds its
    place by the number of batches.
    """
    flag, source = data.source()
    if flag == "dataset_name":
        rows = load_from_hub(source, data.dataset_config, streaming=True)["train"]
    else:
        rows = read_file(flag, source, TEXT_FORMATS, streaming=True)
    with reading(flag, source):
        first = next(iter(rows), None)
        if first is None:
            raise UsageError(f"`{flag}` holds no text")
        texts = _text_column(rows, list(first), flag, data.text_column)
        if next(iter(texts), None) is None:
            raise UsageError(f"`{flag}` holds no text")
    if data.max_train_samples is not None:
        texts = texts.take(data.max_train_samples)
    return texts.repeat(None).shuffle(seed=seed, buffer_size=data.shuffle_buffer)


@contextmanager
def reading_on(data: CorpusArguments) -> Iterator[None]:
    """While a run reads a stream: what is wrong far on in it ends the run in one line."""
    with reading(*data.source(), STREAM_ERRORS) if data.streaming else nullcontext():
        yield
