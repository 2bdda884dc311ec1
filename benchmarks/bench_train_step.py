"""What CoDIR's term costs in a training step: `pytest benchmarks/bench_train_step.py`.

Forward and backward of a 3-layer student of 384 units beside its 6-layer teacher, random weights,
32 texts of 48 tokens, a bank of 8,530 rows; CE + KD without and with the contrastive term.
"""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from codir_fast.distillation.config import DistillationConfig
from codir_fast.distillation.model import DistillationModel

B, T, NUM_EXAMPLES = 32, 48, 8530


def classifier(num_layers):
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=num_layers,
            num_attention_heads=12,
            intermediate_size=1536,
        )
    )


@pytest.mark.parametrize("codir_weight", [0.0, 0.1], ids=["ce-kd", "ce-kd-codir"])
def test_train_step(benchmark, codir_weight):
    torch.manual_seed(0)
    labels = torch.randint(2, (NUM_EXAMPLES,))
    config = DistillationConfig(codir_weight=codir_weight)
    model = DistillationModel(classifier(3), classifier(6), config, labels).train()
    index = torch.randperm(NUM_EXAMPLES)[:B]
    batch = {
        "input_ids": torch.randint(1000, 30000, (B, T)),
        "attention_mask": (torch.arange(T) < torch.randint(8, T + 1, (B, 1))).long(),
        "labels": labels[index],
        "index": index,
    }

    def step():
        model.zero_grad()
        model(**batch)["loss"].backward()

    step()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    benchmark.group = "training step"
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
