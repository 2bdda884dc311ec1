"""How near a student's outputs are to the labels and to its teacher's, also once calibrated."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

# Bounds of 1/T, and how often the interval is cut by the golden ratio: to 1e-12 of its width.
LEAST, MOST, CUTS = 0.02, 50.0, 60


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokens: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 64,
) -> Tensor:
    """Logits (N, C) of each example, in float32; batches are of similar length."""
    lengths = [len(ids) for ids in tokens["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    loader = DataLoader(
        tokens.select(order).remove_columns(["index", "labels"]),
        batch_size=batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    rows = torch.cat([model.eval()(**batch).logits.float() for batch in loader])
    return rows[torch.tensor(order).argsort()]


def scores(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, nll (of the labels), agreement (share of examples for which both choose the same
    class) and kl, the mean of KL(teacher || student); nll and kl in nats.

    Args:
        logits, teacher_logits: (N, C).
        labels: (N,) int64.
    """
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "agreement": float((logits.argmax(1) == teacher_logits.argmax(1)).double().mean()),
        "nll": nll(logits, labels),
        "kl": kl(logits, teacher_logits),
    }


def nll(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits.double(), labels))


def kl(logits: Tensor, teacher_logits: Tensor) -> float:
    ours, theirs = (F.log_softmax(rows.double(), dim=1) for rows in (logits, teacher_logits))
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


def fit_inverse_temperature(loss: Callable[[float], float]) -> float:
    """The 1/T in [0.02, 50] with the least `loss`, which must be convex in it, as nll and kl of
    logits times 1/T are.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """
    ratio = (5**0.5 - 1) / 2
    low, high = LEAST, MOST
    for _ in range(CUTS):
        width = ratio * (high - low)
        if loss(high - width) <= loss(low + width):
            high = low + width
        else:
            low = high - width
    return (low + high) / 2


def calibrated_scores(
    logits: Mapping[str, tuple[Tensor, Tensor]], teacher: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """`scores` on the splits validation and test; for test also nll_calibrated and kl_calibrated,
    each at the temperature that makes it least on validation.

    Args:
        logits: split -> logits (N, C) and labels (N,).
        teacher: split -> the teacher's logits (N, C).
    """
    found = {name: scores(rows, teacher[name], labels) for name, (rows, labels) in logits.items()}
    rows, labels = logits["validation"]
    test_rows, test_labels = logits["test"]
    by_label = fit_inverse_temperature(lambda s: nll(rows * s, labels))
    by_teacher = fit_inverse_temperature(lambda s: kl(rows * s, teacher["validation"]))
    found["validation"]["nll_calibrated"] = nll(rows * by_label, labels)
    found["validation"]["kl_calibrated"] = kl(rows * by_teacher, teacher["validation"])
    found["test"]["nll_calibrated"] = nll(test_rows * by_label, test_labels)
    found["test"]["kl_calibrated"] = kl(test_rows * by_teacher, teacher["test"])
    return found
