"""Labelled texts from files or the hub, and their tokens."""

import csv
import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from codir_fast.distillation.arguments import DataArguments, SourceArguments, TextArguments
from codir_fast.distillation.labels import check_label_column
from codir_fast.errors import SaveError, UsageError, is_full

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

NO_ROWS = "corresponds to no data"  # of what datasets says of a csv with a header alone


def load_examples(data: DataArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples with the columns text and label, checked."""
    train, validation = load_splits(data, seed)
    train = select_columns(first_examples(train, data), "train_file", data)
    if validation is not None:
        validation = select_columns(validation, "validation_file", data)
    return train, validation


def load_splits(
    data: SourceArguments, seed: int, formats: dict[str, str] = FORMATS
) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples as they are there."""
    if data.dataset_name is not None:
        train, validation = _from_hub(data.dataset_name, data.dataset_config)
    else:
        train, validation = read_file("train_file", str(data.train_file), formats), None
    if data.validation_file is not None:
        validation = read_file("validation_file", data.validation_file, formats)
    elif data.validation_split > 0:
        held_out = round(data.validation_split * len(train))
        if not 0 < held_out < len(train):
            raise UsageError(
                f"`validation_split` {data.validation_split} of {len(train)} examples leaves "
                "nothing to train or to evaluate on"
            )
        parts = train.train_test_split(test_size=held_out, seed=seed)
        train, validation = parts["train"], parts["test"]
    return train, validation


def first_examples(train: Dataset, data: SourceArguments) -> Dataset:
    """As many as `max_train_samples` says, or all."""
    if data.max_train_samples is None:
        return train
    return train.select(range(min(data.max_train_samples, len(train))))


def check_evaluation(training: TrainingArguments, validation: Dataset | None) -> None:
    if validation is not None:
        return
    strategy = IntervalStrategy(training.eval_strategy)
    wanted = f"`eval_strategy` {strategy.value}" if strategy != IntervalStrategy.NO else "`do_eval`"
    wanted = "`eval_on_start`" if training.eval_on_start else wanted
    if training.do_eval or training.eval_on_start:  # do_eval is on with any strategy
        raise UsageError(f"{wanted} needs `validation_file` or `validation_split`")


def check_batches(training: TrainingArguments, train: Dataset) -> None:
    size = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and len(train) < size:
        raise UsageError(
            f"`dataloader_drop_last` leaves nothing of {len(train)} examples in batches of {size}"
        )


def read_file(
    name: str, path: str, formats: dict[str, str] = FORMATS, streaming: bool = False
) -> Any:
    """The rows of a file, whose ending tells the format; `name` is the flag that named it. A
    Dataset, or with `streaming` an IterableDataset.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise UsageError(f"`{name}` must end in {', '.join(formats)}, got {path}")
    _check_size(name, path)
    options: dict[str, Any] = {"streaming": streaming}
    if suffix == ".csv":
        _check_header(name, path)
        # None, null and NA are words, and names of classes; an empty cell is missing.
        options |= {"keep_default_na": False, "na_values": [""]}
    with reading(name, path):  # which would take the path for a pattern of several
        return load_dataset(formats[suffix], data_files=glob.escape(path), split="train", **options)


@contextmanager
def reading(
    name: str,
    path: str,
    errors: tuple[type[Exception], ...] = (DatasetGenerationError, ValueError, OSError),
) -> Iterator[None]:
    """Turns `errors` of a file that is not what its ending says into one line."""
    try:
        with _quiet():
            yield
    except UsageError:
        raise
    except errors as error:
        kind, cause = Path(path).suffix.lower(), error.__cause__ or error
        if NO_ROWS in str(cause):
            raise UsageError(f"`{name}` has no rows, {path}") from error
        if is_full(error):
            raise SaveError(f"`{name}` {path} can't be kept in datasets' cache: {cause}") from error
        wanted = f" as {kind[1:]}" if kind else ""
        raise UsageError(f"`{name}` can't be read{wanted}, {path}: {cause}") from error


def _check_size(name: str, path: str) -> None:
    """Refuses an empty file: datasets' readers end with a StopIteration."""
    with suppress(OSError), open(path, "rb") as file:  # OSError: the reader tells it
        if not file.read(1):
            raise UsageError(f"`{name}` has no rows, the file {path} is empty")


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


def _from_hub(name: str, config: str | None) -> tuple[Dataset, Dataset | None]:
    splits = load_from_hub(name, config)
    return splits["train"], splits.get("validation")


def load_from_hub(name: str, config: str | None, streaming: bool = False) -> Any:
    """The splits of a data set of the hub, train among them."""
    try:
        loaded = load_dataset(name, config, streaming=streaming)
    except (ValueError, OSError) as error:
        raise UsageError(f"`dataset_name` can't be loaded, {name}: {error}") from error
    if "train" not in loaded:
        raise UsageError(f"`dataset_name` must have a train split, {name} has none")
    return loaded


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
) -> Dataset:
    """Columns of the tokenizer, labels, and index: the number of the example. Texts are cut to
    `max_length` tokens, of pairs the longer one first.
    """
    tokens = tokenize_texts(examples, tokenizer, max_length)
    return tokens.add_column("labels", labels).add_column("index", list(range(len(labels))))


def tokenize_texts(examples: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    """Columns of the tokenizer instead of those of `examples`, a Dataset or an IterableDataset."""

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)

    given = examples.column_names or ["text"]  # a stream does not know them
    bar = {"desc": "Tokenize"} if isinstance(examples, Dataset) else {}
    with telling_full_disk():
        return examples.map(encode, batched=True, remove_columns=given, **bar)


@contextmanager
def telling_full_disk() -> Iterator[None]:
    """Raises the OSError of a table that datasets could not write: it closes such a file twice, and
    raises that it was closed.
    """
    try:
        yield
    except ValueError as error:
        first = error.__context__
        if first is None or not is_full(first):
            raise
        raise first from None
