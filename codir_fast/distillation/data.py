"""Labelled texts from files or the hub, and their tokens."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from codir_fast.distillation.arguments import DataArguments, TextArguments
from codir_fast.distillation.labels import check_label_column
from codir_fast.errors import UsageError

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_examples(data: DataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples with the columns text and label, checked."""
    if data.dataset_name is not None:
        train, validation = _from_hub(data.dataset_name)
    else:
        train, validation = read_file("train_file", str(data.train_file)), None
    if data.validation_file is not None:
        validation = read_file("validation_file", data.validation_file)
    elif data.validation_split > 0:
        held_out = round(data.validation_split * len(train))
        if not 0 < held_out < len(train):
            raise UsageError(
                f"`validation_split` {data.validation_split} of {len(train)} examples leaves "
                "nothing to train or to evaluate on"
            )
        parts = train.train_test_split(test_size=held_out, seed=seed)
        train, validation = parts["train"], parts["test"]
    if data.max_train_samples is not None:
        train = train.select(range(min(data.max_train_samples, len(train))))
    train = select_columns(train, "train_file", data)
    if validation is not None:
        validation = select_columns(validation, "validation_file", data)
    return train, validation


def check_evaluation(training: TrainingArguments, validation: Dataset | None) -> None:
    strategy = IntervalStrategy(training.eval_strategy)
    wanted = "`eval_on_start`" if training.eval_on_start else f"`eval_strategy` {strategy.value}"
    if validation is None and (strategy != IntervalStrategy.NO or training.eval_on_start):
        raise UsageError(f"{wanted} needs `validation_file` or `validation_split`")


def check_batches(training: TrainingArguments, train: Dataset) -> None:
    size = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(train) < size:
        raise UsageError(
            f"`dataloader_drop_last` leaves nothing of {len(train)} examples in batches of {size}"
        )


def read_file(name: str, path: str) -> Dataset:
    """The rows of a file, whose ending tells the format; `name` is the flag that named it."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"`{name}` must end in {', '.join(FORMATS)}, got {path}")
    if suffix == ".csv":
        _check_header(name, path)
    try:
        with _quiet():
            return load_dataset(FORMATS[suffix], data_files=path, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise UsageError(f"`{name}` can't be read as {suffix[1:]}, {path}: {cause}") from error


def _check_header(name: str, path: str) -> None:
    """Refuses columns of one name, of which the reader would rename all but the first."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return  # the reader tells it
    twice = [column for column in header if column and header.count(column) > 1]
    if twice:
        raise UsageError(f"`{name}` must have one column of a name, {path} has {twice[0]!r} twice")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps datasets from telling an error that our one line tells."""
    level, bars = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            enable_progress_bars()


def _from_hub(name: str) -> tuple[Dataset, Dataset | None]:
    try:
        loaded = load_dataset(name)
    except (ValueError, OSError) as error:
        raise UsageError(f"`dataset_name` can't be loaded, {name}: {error}") from error
    if not isinstance(loaded, DatasetDict) or "train" not in loaded:
        raise UsageError(f"`dataset_name` must have a train split, {name} has none")
    return loaded["train"], loaded.get("validation")


def select_columns(examples: Dataset, name: str, data: TextArguments) -> Dataset:
    """The columns under the names text, pair (where there is one) and label; refuses what is
    missing or empty.
    """
    flags = {"text_column": "text", "text_pair_column": "pair", "label_column": "label"}
    columns = {flag: getattr(data, flag) for flag in flags if getattr(data, flag) is not None}
    for flag, column in columns.items():
        if column not in examples.column_names:
            raise UsageError(
                f"`{name}` has no column {column!r} (`{flag}`), its columns are "
                f"{examples.column_names}"
            )
    examples = examples.select_columns(list(columns.values()))
    renamed = {column: flags[flag] for flag, column in columns.items() if column != flags[flag]}
    # In two steps: one column may have the name that another takes.
    examples = examples.rename_columns({column: f"given {column}" for column in renamed})
    examples = examples.rename_columns({f"given {old}": new for old, new in renamed.items()})
    if len(examples) == 0:
        raise UsageError(f"`{name}` holds no example")
    for column in sorted(set(examples.column_names) - {"label"}):
        for row, text in enumerate(examples[column]):
            if not isinstance(text, str):
                raise UsageError(f"`{name}` must hold texts, row {row} has {text!r}")
    check_label_column(examples, name)
    return examples


def tokenize(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[int | float],
    max_length: int,
    model_max_length: int,
) -> Dataset:
    """Columns of the tokenizer, labels, and index: the number of the example. Of pairs the longer
    text is cut first.
    """
    longest = min(max_length, model_max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=longest)

    given = examples.column_names
    tokens = examples.map(encode, batched=True, remove_columns=given, desc="Tokenize")
    return tokens.add_column("labels", labels).add_column("index", list(range(len(labels))))
