"""Flags of the commands that train and evaluate, and their reading."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from codir_fast.errors import UsageError

# Smallest and largest value of the TrainingArguments that do not check themselves.
LARGEST = 1e9
NUMBERS = {
    "per_device_train_batch_size": (1, LARGEST),
    "per_device_eval_batch_size": (1, LARGEST),
    "gradient_accumulation_steps": (1, LARGEST),
    "num_train_epochs": (0, LARGEST),
    "learning_rate": (0, LARGEST),
    "weight_decay": (0, LARGEST),
    "max_grad_norm": (0, LARGEST),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (0, LARGEST),
    "dataloader_num_workers": (0, LARGEST),
    "seed": (0, 2**32 - 1),
}


@dataclass
class PlainTextArguments:
    """How texts are read."""

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Tokens of a text that are read, the rest is cut off."}
    )

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise ValueError(f"`max_seq_length` must be at least 1, got {self.max_seq_length}")


@dataclass
class TextArguments(PlainTextArguments):
    """How texts and labels are read."""

    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of second texts, for pairs: question and passage."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Column of the labels, integers or strings."}
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
        default=None, metadata={"help": "Use only so many training examples, from the start."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"`validation_split` must be in [0, 1), got {self.validation_split}")
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

    def check_stream(self, training: TrainingArguments) -> None:
        """Refuses what a stream without an end can't do."""
        if not self.streaming:
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


@dataclass
class OutputArguments:
    """What may happen to the output folder."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output_dir that is not empty."}
    )


def check_file(name: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise UsageError(f"`{name}` must be an existing file, got {path}")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.split()[-1]}: {message}")


def parse(command: str, classes: tuple[Any, ...], arguments: list[str], **defaults: Any) -> tuple:
    """The dataclasses of a command, filled from its flags; `defaults` replace the fields' own.

    Raises:
        UsageError: an unknown flag, or a value that a dataclass refuses.
    """
    usage = f"codir-fast {command} [--flag value ...]"
    parser = _Parser(classes, prog=f"codir-fast {command}", usage=usage, allow_abbrev=False)
    parser.set_defaults(**defaults)
    try:
        *filled, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True
        )
    except UsageError:
        raise
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(f"{command}: {error}") from error
    if unknown:
        raise UsageError(f"{command} has no flag {unknown[0]}; {command} --help lists them")
    return tuple(filled)


def training_defaults(arguments: list[str]) -> dict[str, Any]:
    """What a user of a small classification set expects, where TrainingArguments differ."""
    validates = any(
        name.startswith(("--validation_file", "--validation_split")) for name in arguments
    )
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "epoch" if validates else "no",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 20,
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.accelerator.is_available(),  # else it warns on each epoch
        "output_dir": None,
    }


def check_numbers(training: TrainingArguments) -> None:
    """Refuses numbers that TrainingArguments takes and that fail, or do nothing, later."""
    for name, (lowest, highest) in NUMBERS.items():
        value = getattr(training, name)
        if not lowest <= value <= highest:  # NaN is refused too
            raise UsageError(f"`{name}` must be in [{lowest}, {highest:.10g}], got {value}")


def check_output(training: TrainingArguments, output: OutputArguments) -> None:
    """Refuses to mix a run with what is there, before anything is written."""
    if training.output_dir is None:
        raise UsageError("`output_dir` must be given")
    directory = Path(training.output_dir)
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"`output_dir` must be a folder, {directory} is a file")
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"`output_dir` {directory} can't be made or written: {there} is no folder to write in"
        )
    used = directory.is_dir() and any(directory.iterdir())
    if used and not (output.overwrite_output_dir or training.resume_from_checkpoint):
        raise UsageError(
            f"`output_dir` must be empty, {directory} is not; give --overwrite_output_dir to write "
            "into it or --resume_from_checkpoint to go on"
        )


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The folder that --resume_from_checkpoint means: itself, or for True the output's last one."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise UsageError(
                f"`resume_from_checkpoint` must be the folder of a checkpoint, {wanted} has no "
                "trainer_state.json"
            )
        return wanted
    directory = str(training.output_dir)
    last = get_last_checkpoint(directory) if Path(directory).is_dir() else None
    if last is None:
        raise UsageError(f"`resume_from_checkpoint` found no checkpoint in {directory}")
    return last


def say(message: str) -> None:
    """A line to the person at the terminal, out of the way of results on standard output."""
    print(message, file=sys.stderr, flush=True)
