"""Labels of examples: classes by name or number, or in regression numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig

from codir_fast.distillation.objectives import CLASSIFICATION, REGRESSION, is_regression
from codir_fast.errors import UsageError

LARGEST_NUMBER = torch.finfo(torch.float32).max
# What stands for a missing number in files; among texts they are words.
_NO_NUMBER = ("", "-", "?", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none")


def check_label_column(examples: Dataset, name: str) -> None:
    """Refuses a column that has holes or is neither of texts nor of numbers; `name` is the flag of
    the file.
    """
    labels = list(examples["label"])
    for row, label in enumerate(labels):
        if label is None:
            raise UsageError(f"`{name}` must have a label in each row, row {row} has none")
        if not isinstance(label, (str, int, float)):
            raise UsageError(f"`{name}` must hold texts or numbers as labels, row {row}: {label!r}")
        if isinstance(label, str) != isinstance(labels[0], str):
            raise UsageError(
                f"`{name}` must hold labels of one kind, row 0 has {labels[0]!r} and row {row} has "
                f"{label!r}"
            )
    if labels and isinstance(labels[0], str):
        _check_no_missing_number(labels, name)


def _check_no_missing_number(labels: list[str], name: str) -> None:
    """Refuses numbers of which some are missing: a reader of csv takes all of them for texts then,
    and each would become a class.
    """
    others = {
        label: row for row, label in reversed(list(enumerate(labels))) if not _is_number(label)
    }
    words = all(label.strip().lower() in _NO_NUMBER for label in others)
    if others and words and len(others) < len(set(labels)):
        label = min(others, key=others.__getitem__)
        raise UsageError(
            f"`{name}` must have a number in each row, row {others[label]} has {label!r}"
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def new_classifier(
    examples: Dataset, problem_type: str | None, known: Sequence[str] = ()
) -> dict[str, Any]:
    """What a new model's configuration says of its outputs: as many as the examples have classes,
    with their names, or one number. Without `problem_type`, float labels mean regression.

    Args:
        known: classes that the checkpoint's classifier has; where they are those of the examples,
            they keep their order.
    """
    if problem_type is None:
        floats = any(isinstance(label, float) for label in examples["label"])
        problem_type = REGRESSION if floats else CLASSIFICATION
    if problem_type == REGRESSION:
        return {"problem_type": REGRESSION, "num_labels": 1}
    _check_no_floats(examples, "train_file")
    names = label_names(examples)
    if sorted(names) == sorted(known):
        names = list(known)
    return {
        "problem_type": CLASSIFICATION,
        "num_labels": len(names),
        "label2id": {name: number for number, name in enumerate(names)},
        "id2label": dict(enumerate(names)),
    }


def label_names(examples: Dataset) -> list[str]:
    """The classes in order, integers by value and strings by alphabet."""
    feature = examples.features["label"]
    if hasattr(feature, "names"):  # a data set of the hub that names its classes
        names = list(feature.names)
    else:
        names = [str(label) for label in sorted(set(examples["label"]))]
    if len(names) < 2:
        raise UsageError(f"`train_file` must hold at least 2 different labels, got {names}")
    return names


def known_labels(config: PretrainedConfig) -> dict[str, int]:
    """The classes that a model knows, by name."""
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}


def class_names(config: PretrainedConfig) -> list[str]:
    """The same in the order of a model's outputs; without a classifier, transformers' defaults."""
    known = known_labels(config)
    return sorted(known, key=known.__getitem__)


def read_labels(examples: Dataset, name: str, config: PretrainedConfig) -> Sequence[int | float]:
    """Each example's label as a model of this configuration learns it: the number of its class, or
    in regression the label itself.
    """
    if is_regression(config):
        return label_numbers(examples, name)
    return label_ids(examples, name, known_labels(config))


def label_numbers(examples: Dataset, name: str) -> list[float]:
    """The labels as float; refuses what is no finite number, in float32 too."""
    for row, label in enumerate(examples["label"]):
        if isinstance(label, (str, bool)):
            raise UsageError(
                f"`{name}` must hold numbers as labels, for the model is one of regression; row "
                f"{row} has {label!r}"
            )
        if math.isnan(label) or abs(label) > LARGEST_NUMBER:
            raise UsageError(f"`{name}` must hold finite labels, row {row} has {label}")
    return [float(label) for label in examples["label"]]


def label_ids(examples: Dataset, name: str, label2id: dict[str, int]) -> list[int]:
    """The model's number of each example's label.

    A label is looked up by its text. Where no class has an integer for its name, an integer is the
    number itself.
    """
    _check_no_floats(examples, name)
    feature = examples.features["label"]
    takes_numbers = not any(known.lstrip("-").isdecimal() for known in label2id)
    ids = []
    for row, label in enumerate(examples["label"]):
        is_named = hasattr(feature, "names") and label in range(len(feature.names))
        text = feature.names[label] if is_named else str(label)
        is_number = isinstance(label, int) and not isinstance(label, bool) and takes_numbers
        found = label2id.get(text, label if is_number else None)
        if found is None or not 0 <= found < len(label2id):
            raise UsageError(
                f"`{name}` row {row} has the label {text!r}, which the model does not know; it "
                f"knows {list(label2id)}"
            )
        ids.append(found)
    return ids


def _check_no_floats(examples: Dataset, name: str) -> None:
    for row, label in enumerate(examples["label"]):
        if isinstance(label, float):
            raise UsageError(
                f"`{name}` must hold integers or texts as labels, for the model is one of classes; "
                f"row {row} has {label!r}"
            )
