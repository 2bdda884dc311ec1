"""Flags of the commands that train and evaluate, and their reading."""

import difflib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from codir_fast.distillation.processes import is_first, silence_others
from codir_fast.errors import UsageError


@dataclass
class PlainTextArguments:
    """How texts are read."""

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a text that are read: 128, or as many as the model takes."},
    )

    def __post_init__(self) -> None:
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise ValueError(f"`max_seq_length` must be at least 1, got {self.max_seq_length}")


@dataclass
class TextArguments(PlainTextArguments):
    """How texts and labels are read."""

    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of second texts, for pairs: question and passage."}
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Column of the labels: integers, strings, or floats (regression)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_column", "text_pair_column"):
            if getattr(self, name) == self.label_column:
                raise ValueError(f"`label_column` must not be the `{name}`, {self.label_column!r}")
        if self.text_pair_column == self.text_column:
            raise ValueError(
                f"`text_pair_column` must not be the `text_column`, {self.text_column!r}"
            )


@dataclass
class SourceArguments:
    """Where the training examples come from."""

    train_file: str | None = field(
        default=None, metadata={"help": "Training examples: a csv, json, jsonl or parquet file."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Examples to evaluate on after each epoch."}
    )
    validation_split: float = field(
        default=0.0,
        metadata={"help": "Without validation_file: the share of training examples to hold out."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the hub, instead of files."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "The part of that data set, where it has several."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many training examples, the first ones."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"`validation_split` must be in [0, 1), got {self.validation_split}")
        if self.validation_file is not None and self.validation_split:
            raise ValueError("`validation_split` can't be given beside `validation_file`")
        if self.dataset_config is not None and self.dataset_name is None:
            raise ValueError("`dataset_config` needs `dataset_name`")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(
                f"`max_train_samples` must be at least 1, got {self.max_train_samples}"
            )

    def source(self) -> tuple[str, str]:
        """The flag that names the training examples, and what it names."""
        flag = "train_file" if self.dataset_name is None else "dataset_name"
        return flag, str(getattr(self, flag))

    def check_training(self) -> None:
        """Exactly one source of training examples, and files that exist."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise UsageError("exactly one of `train_file` and `dataset_name` must be given")
        for name in ("train_file", "validation_file"):
            check_file(name, getattr(self, name))


@dataclass
class DataArguments(SourceArguments, TextArguments):
    """Labelled texts to train on."""

    def __post_init__(self) -> None:
        TextArguments.__post_init__(self)
        SourceArguments.__post_init__(self)


@dataclass
class CorpusArguments(SourceArguments, PlainTextArguments):
    """Texts without labels to train on."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "Texts: a txt file, one a line, or csv, json, jsonl, parquet."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training texts while training, over and over, and shuffle them in a "
            "buffer: for more than fits on the disk. Needs max_steps."
        },
    )
    shuffle_buffer: int = field(
        default=10000, metadata={"help": "Texts that a stream is shuffled among."}
    )

    def __post_init__(self) -> None:
        PlainTextArguments.__post_init__(self)
        SourceArguments.__post_init__(self)
        if self.shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1, got {self.shuffle_buffer}")
        if self.streaming and self.validation_split > 0:
            raise ValueError(
                "`validation_split` needs all the texts at once, which `streaming` does not have; "
                "give a `validation_file`"
            )

    def check_stream(self, training: TrainingArguments, given: Mapping[str, str]) -> None:
        """Refuses what a stream without an end can't do, and what only a stream has.

        Args:
            given: the flags that are written, as `given_flags` has them.
        """
        if not self.streaming:
            if "shuffle_buffer" in given:
                raise UsageError("`shuffle_buffer` needs `streaming`")
            return
        if training.max_steps < 1:
            raise UsageError("`streaming` needs `max_steps`: a stream has no end")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(training, name) == "epoch":
                raise UsageError(f"`{name}` must not be epoch with `streaming`: it has no epochs")
        if training.train_sampling_strategy != "random":
            raise UsageError(
                "`train_sampling_strategy` must be random with `streaming`, whose texts are not "
                f"known before, got {training.train_sampling_strategy}"
            )


def check_file(name: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise UsageError(f"`{name}` must be an existing file, got {path}")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.split()[-1]}: {message}")


def parse(
    command: str,
    classes: tuple[Any, ...],
    arguments: list[str],
    positional: tuple[str, str] | None = None,
    **defaults: Any,
) -> tuple:
    """The dataclasses of a command, filled from its flags; `defaults` replace the fields' own.

    Args:
        positional: name and help of arguments without a flag, at least one, which are a list of
            that name in one more object at the end.

    Raises:
        UsageError: an unknown flag, or a value that a dataclass refuses.
    """
    words = f"{positional[0].upper()} ... " if positional else ""
    usage = f"codir-fast {command} {words}[--flag value ...]"
    parser = _Parser(classes, prog=f"codir-fast {command}", usage=usage, allow_abbrev=False)
    parser.set_defaults(**defaults)
    if positional:
        parser.add_argument(positional[0], nargs="+", help=positional[1])
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True
        )
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise UsageError(f"{command}: {error}") from error
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{command} --help lists them"
        raise UsageError(f"{command} has no flag {unknown[0]}; {hint}")
    silence_others()
    return tuple(filled)


def given_flags(arguments: list[str]) -> dict[str, str]:
    """Names of the flags that are written, as fields have them, and what follows each."""
    given = {}
    for n, text in enumerate(arguments):
        name, has_value, value = text.partition("=")
        if name.startswith("--"):
            following = "".join(arguments[n + 1 : n + 2])
            given[name[2:].replace("-", "_")] = value if has_value else following
    return given


def _is_more_than_0(given: dict[str, str], name: str) -> bool:
    try:
        return float(given.get(name, 0)) > 0
    except ValueError:  # told when flags are read
        return False


def training_defaults(arguments: list[str]) -> dict[str, Any]:
    """What a user of a small classification set expects, where TrainingArguments differ."""
    given = given_flags(arguments)
    validates = "validation_file" in given or _is_more_than_0(given, "validation_split")
    # Trainer takes every metric whose name does not end in loss for one that should be large.
    is_error = given.get("metric_for_best_model", "").endswith(("mse", "perplexity"))
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "epoch" if validates else "no",
        "save_strategy": "epoch",
        "save_total_limit": 2,  # the last one may be damaged
        "logging_steps": 20,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.accelerator.is_available(),  # else it warns on each epoch
        "greater_is_better": False if is_error else None,
        "output_dir": "",  # else it becomes trainer_output
    }


@contextmanager
def usage_errors(command: str) -> Iterator[None]:
    """Tells in one line, and not where, what libraries refuse of what the user gave."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise UsageError(f"{command}: {error}") from error


def say(message: str) -> None:
    """A line to the person at the terminal, out of the way of results on standard output; of
    several processes the first one says it.
    """
    if is_first():
        print(message, file=sys.stderr, flush=True)
