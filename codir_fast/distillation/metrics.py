"""How good a model's outputs are: for Trainer while it trains, and for `codir-fast evaluate`."""

from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PretrainedConfig

from codir_fast.distillation.objectives import is_regression, middle_ranks
from codir_fast.distillation.scores import kl


class Accuracy:
    """Share of examples whose highest logit is at their label.

    Counts up over calls until one asks for the result, as --batch_eval_metrics does; takes lists of
    batches too, as --eval_do_concat_batches False gives.
    """

    def __init__(self) -> None:
        self.correct, self.total = 0, 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        for logits, labels in _batches(prediction):
            self.correct += int((logits.argmax(-1) == labels).sum())
            self.total += labels.numel()
        if not compute_result:
            return {}
        result = {"accuracy": self.correct / self.total}
        self.correct, self.total = 0, 0
        return result


class RegressionScores:
    """mse, pearson and spearman of outputs (N, 1) and labels; collects as Accuracy counts."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.seen += _batches(prediction)
        if not compute_result:
            return {}
        outputs, labels = (torch.cat(side) for side in zip(*self.seen, strict=True))
        self.seen.clear()
        return output_scores(outputs, labels)


def metric_names(config: PretrainedConfig) -> tuple[str, ...]:
    """What an evaluation of a model of this configuration gives."""
    return ("loss", *(("mse", "pearson", "spearman") if is_regression(config) else ("accuracy",)))


def metrics_for(config: PretrainedConfig) -> Accuracy | RegressionScores:
    """What Trainer calls as `compute_metrics` for a model of this configuration."""
    return RegressionScores() if is_regression(config) else Accuracy()


def _batches(prediction: EvalPrediction) -> list[tuple[Tensor, Tensor]]:
    outputs: Any = prediction.predictions
    labels: Any = prediction.label_ids
    if not isinstance(outputs, list):
        outputs, labels = [outputs], [labels]
    found = []
    for rows, wanted in zip(outputs, labels, strict=True):
        rows = torch.as_tensor(rows[0] if isinstance(rows, tuple) else rows)
        found.append((rows, torch.as_tensor(wanted, device=rows.device)))
    return found


def output_scores(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy of logits (N, C) with labels (N,); of outputs (N, 1) mse, pearson and spearman."""
    if outputs.shape[1] > 1:
        return {"accuracy": float((outputs.argmax(1) == labels).double().mean())}
    given = outputs[:, 0]
    return {
        "mse": mean_squared_error(given, labels),
        "pearson": pearson(given, labels),
        "spearman": pearson(middle_ranks(given), middle_ranks(labels)),
    }


def teacher_scores(outputs: Tensor, teacher: Tensor) -> dict[str, float]:
    """agreement, the share of rows (N, C) of both with the highest logit at one class, and kl, the
    mean of KL(teacher || model) in nats; of outputs (N, 1) mse_to_teacher and pearson_to_teacher.
    """
    if outputs.shape[1] > 1:
        agreement = (outputs.argmax(1) == teacher.argmax(1)).double().mean()
        return {"agreement": float(agreement), "kl": kl(outputs, teacher)}
    given, wanted = outputs[:, 0], teacher[:, 0]
    return {
        "mse_to_teacher": mean_squared_error(given, wanted),
        "pearson_to_teacher": pearson(given, wanted),
    }


def mean_squared_error(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted.double()).square().mean())


def pearson(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of (N,) and (N,). Where one side is constant it is not defined, and 0
    here: a constant tells nothing of the other side.
    """
    one, other = one.double(), other.double()
    if one.min() == one.max() or other.min() == other.max():
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / (one.norm() * other.norm()))
