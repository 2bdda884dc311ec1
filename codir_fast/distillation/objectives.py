"""What classification and regression make of a model's outputs and of labels.

A model with one output is one of regression, transformers' convention; with more, of classes.
"""

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from codir_fast.checks import check_tensor
from codir_fast.distillation.config import DistillationConfig

REGRESSION, CLASSIFICATION = "regression", "single_label_classification"
# Whether it is regression -> the setting that has no meaning there, and what "there" is.
WITHOUT_MEANING = {True: ("kd_temperature", "regression"), False: ("label_bins", "classes")}


def is_regression(config: PretrainedConfig) -> bool:
    return config.num_labels == 1


def check_task(name: str, config: PretrainedConfig) -> None:
    """Raises ValueError unless each example has one class or one number; `name` is the model's."""
    expected = REGRESSION if is_regression(config) else CLASSIFICATION
    if config.problem_type not in (None, expected):
        raise ValueError(
            f"`{name}` must be a model of {expected}, having {config.num_labels} labels; its "
            f"`problem_type` is {config.problem_type}"
        )


def check_settings(config: DistillationConfig, regression: bool) -> None:
    """Raises ValueError for a setting that has no meaning for the task."""
    name, task = WITHOUT_MEANING[regression]
    given, default = getattr(config, name), _default(DistillationConfig, name)
    if given != default:
        raise ValueError(f"`{name}` has no meaning where the teacher is one of {task}, got {given}")


def _default(kind: type, name: str) -> Any:
    return next(field.default for field in fields(kind) if field.name == name)


def label_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) in nats; of outputs (B, 1) their mean squared error."""
    if outputs.shape[1] == 1:
        return F.mse_loss(outputs[:, 0].float(), labels.float())
    return F.cross_entropy(outputs.float(), labels)


def middle_ranks(values: Tensor) -> Tensor:
    """How many values are smaller, and half of how many are equal, of each of (N,); float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - counts.double() / 2)[inverse]


def quantile_bins(values: Tensor, bins: int) -> Tensor:
    """Classes (N,) int64 of numbers (N,): floor(bins * middle rank / N), counted without gaps.

    N different values fall into `bins` parts of equal size. Equal values share a bin, which may
    leave others empty; two different values, and `bins` of at least 2, leave at least two.
    """
    found = (middle_ranks(values) * bins / len(values)).long()
    return found.unique(return_inverse=True)[1]


def bank_classes(labels: Tensor, config: DistillationConfig, regression: bool) -> Tensor:
    """Labels of the training examples, (N,), as the contrastive term tells them apart: themselves,
    in regression the bins that they fall into.

    Raises:
        ValueError: a number that is not finite, or no negatives: all labels are one.
    """
    check_tensor("bank_labels", labels)
    if regression:
        if not bool(labels.isfinite().all()):
            row = int((~labels.isfinite()).nonzero()[0])
            raise ValueError(f"`bank_labels` must be finite, row {row} is {float(labels[row])}")
        labels = quantile_bins(labels, config.label_bins)
    if config.negatives == "other_labels" and labels.unique().numel() < 2:
        raise ValueError(
            "`negatives` other_labels needs training examples of at least 2 labels, all "
            f"{len(labels)} have the same"
        )
    return labels
