"""What CoDIR's term adds to a training step whose teacher is cached: CE + KD, and the same with the
contrastive term (pooling, heads, loss, bank update) against banks of two sizes, in one interleaved
run on the CPU.

The student is BERT of three of all-MiniLM-L6's layers with random weights; a step is forward,
backward, clipping and fused AdamW, as transformers.Trainer makes it, and the update of the bank.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from codir_fast.benchmarks import measure
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from codir_fast.distillation.config import DistillationConfig
from codir_fast.distillation.model import DistillationModel

B, T, H, NUM_LAYERS, NUM_LABELS = 32, 48, 384, 3, 2
SIZES = {"B": B, "T": T, "L": NUM_LAYERS, "H": H}
_NUM_BATCHES = 8


@dataclass(frozen=True)
class Arm:
    """A step to time: the weight of CoDIR's term, and the rows of its bank."""

    name: str
    what: str
    codir_weight: float = 0.0
    num_rows: int = 8530

    def make_step(self) -> Callable[[], None]:
        torch.manual_seed(0)
        return training_step(self.make_model(), [self.make_batch() for _ in range(_NUM_BATCHES)])

    def make_model(self) -> DistillationModel:
        labels = torch.arange(self.num_rows) % NUM_LABELS
        with torch.device("meta"):  # only its sizes are asked for
            teacher = _classifier(2 * NUM_LAYERS)
        # A bank that is full, as after the first epoch.
        config = DistillationConfig(codir_weight=self.codir_weight, bank_init="random")
        model = DistillationModel(_classifier(NUM_LAYERS), teacher, config, labels).train()
        model.release_teacher()
        return model

    def make_batch(self) -> dict[str, Tensor]:
        index = torch.randperm(self.num_rows)[:B]
        lengths = torch.randint(T // 6, T + 1, (B, 1))
        lengths[0] = T  # padded to the longest
        return {
            "input_ids": torch.randint(1000, 30000, (B, T)),
            "attention_mask": (torch.arange(T) < lengths).long(),
            "labels": index % NUM_LABELS,
            "index": index,
            "teacher_logits": torch.randn(B, NUM_LABELS),
            "teacher_features": torch.randn(B, NUM_LAYERS * H),
        }


def training_step(model: DistillationModel, batches: list[dict[str, Tensor]]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    turn = itertools.cycle(batches)

    def step() -> None:
        model(**next(turn))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        model.update_bank()

    return step


def _classifier(num_layers: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=H,
            num_hidden_layers=num_layers,
            num_attention_heads=12,
            intermediate_size=4 * H,
            num_labels=NUM_LABELS,
        )
    )


# The second is what the first is measured against as well: how far equal steps are apart.
ARMS = (
    Arm("ce-kd", "CE + KD"),
    Arm("ce-kd-again", "CE + KD, another model"),
    Arm("codir-8530", "CE + KD + CoDIR, 8,530 rows", 0.1, 8530),
    Arm("codir-65536", "CE + KD + CoDIR, 65,536 rows", 0.1, 65536),
)


def measure_train_step(budget: float) -> list[dict[str, Any]]:
    """A row for each arm, in about `budget` seconds: seconds a step, and what it adds to CE + KD of
    the same round, as a share: median, the median's 95% interval, quartiles.
    """
    rounds = measure.rounds([arm.make_step() for arm in ARMS], budget)
    return [
        {"arm": arm.name, "what": arm.what, "sizes": SIZES}
        | vars(measure.Times.of(seconds))
        | {"added": vars(measure.Added.over(rounds[0], seconds))}
        for arm, seconds in zip(ARMS, rounds, strict=True)
    ]
