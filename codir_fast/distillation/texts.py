"""Texts without labels, from files or the hub, as a data set or as a stream."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.table import CastError
from pandas.errors import ParserError
from pyarrow import ArrowInvalid

from codir_fast.distillation.arguments import CorpusArguments, say
from codir_fast.distillation.data import (
    FORMATS,
    first_examples,
    load_from_hub,
    load_splits,
    read_file,
    reading,
)
from codir_fast.distillation.fingerprint import hash_file
from codir_fast.distillation.fixed_settings import STREAM_FILE
from codir_fast.errors import UsageError

TEXT_FORMATS = FORMATS | {".txt": "text"}
# Of datasets' readers of csv, json and parquet, text.
STREAM_ERRORS = (ParserError, ArrowInvalid, UnicodeDecodeError, CastError)


def load_texts(data: CorpusArguments, seed: int) -> tuple[Any, Any]:
    """Training and validation texts under the name text, without the blank ones; with `streaming`
    those of training, and of validation where they come from the hub, are an IterableDataset.
    """
    if not data.streaming:
        train, validation = load_splits(data, seed, TEXT_FORMATS)
        train = first_examples(_texts(train, "train_file", data.text_column), data)
        if validation is not None:
            validation = _texts(validation, "validation_file", data.text_column)
        return train, validation
    train, validation = _streams(data, seed)
    if data.validation_file is not None:
        rows = read_file("validation_file", data.validation_file, TEXT_FORMATS)
        validation = _texts(rows, "validation_file", data.text_column)
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


def _streams(data: CorpusArguments, seed: int) -> tuple[IterableDataset, IterableDataset | None]:
    """The training texts over and over, so that the epoch is always the first one: a resumed run
    finds its place by the number of batches. And those of the hub's validation split.
    """
    flag, source = data.source()
    if flag == "dataset_name":
        splits = load_from_hub(source, data.dataset_config, streaming=True)
    else:
        splits = {"train": read_file(flag, source, TEXT_FORMATS, streaming=True)}
    train, *others = (
        _stream(splits[name], flag, source, data)
        for name in ("train", "validation")
        if name in splits
    )
    if data.max_train_samples is not None:
        train = train.take(data.max_train_samples)
    train = train.repeat(None).shuffle(seed=seed, buffer_size=data.shuffle_buffer)
    return train, others[0] if others else None


def _stream(rows: Any, flag: str, source: str, data: CorpusArguments) -> IterableDataset:
    with reading(flag, source):
        first = next(iter(rows), None)
        if first is None:
            raise UsageError(f"`{flag}` holds no text")
        texts = _text_column(rows, list(first), flag, data.text_column)
        if next(iter(texts), None) is None:
            raise UsageError(f"`{flag}` holds no text")
    return texts


def stream_settings(data: CorpusArguments) -> dict[str, Any]:
    """What the texts of a stream and their order depend on, beside the seed. A file is read through
    for it, once; a data set of the hub is known by its name alone.
    """
    names = ("shuffle_buffer", "max_train_samples", "max_seq_length", "text_column")
    settings = {name: getattr(data, name) for name in (*names, "dataset_name", "dataset_config")}
    if data.train_file is not None:
        settings[STREAM_FILE] = hash_file(data.train_file)
    return settings


@contextmanager
def reading_on(data: CorpusArguments) -> Iterator[None]:
    """While a run reads a stream: what is wrong far on in it ends the run in one line."""
    with reading(*data.source(), STREAM_ERRORS) if data.streaming else nullcontext():
        try:
            yield
        except Exception as error:
            if (met := _met_by_worker(error)) is not None:
                raise met from None
            raise


def _met_by_worker(error: Exception) -> Exception | None:
    """What a process that loads batches met in a stream, without its traceback."""
    kinds = {kind.__name__ for kind in (*STREAM_ERRORS, UsageError)}
    found = re.match(r"Caught (\w+) in DataLoader worker", str(error))
    if found is None or found[1] not in kinds:
        return None
    text = str(error).rpartition(f"{found[1]}: ")[2].strip()
    return UsageError(text) if found[1] == UsageError.__name__ else ArrowInvalid(text)
