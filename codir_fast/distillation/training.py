"""What finetune and distill share: the run of a trainer from start to saved model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from codir_fast.distillation.arguments import say


class Accuracy:
    """Share of examples whose highest logit is at their label.

    Counts up over calls until one asks for the result, as --batch_eval_metrics does; takes lists of
    batches too, as --eval_do_concat_batches False gives.
    """

    def __init__(self) -> None:
        self.correct, self.total = 0, 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        logits: Any = prediction.predictions
        labels: Any = prediction.label_ids
        if not isinstance(logits, list):
            logits, labels = [logits], [labels]
        for rows, wanted in zip(logits, labels, strict=True):
            scores = torch.as_tensor(rows[0] if isinstance(rows, tuple) else rows)
            hits = scores.argmax(-1) == torch.as_tensor(wanted, device=scores.device)
            self.correct += int(hits.sum())
            self.total += hits.numel()
        if not compute_result:
            return {}
        result = {"accuracy": self.correct / self.total}
        self.correct, self.total = 0, 0
        return result


def train_and_save(trainer: Trainer, training: TrainingArguments, resume: str | None) -> None:
    """Trains, evaluates where there is something to evaluate on, and saves model and metrics."""
    result = trainer.train(resume_from_checkpoint=resume)
    metrics: dict[str, Any] = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    directory = Path(str(training.output_dir))
    text = json.dumps(metrics, indent=2) + "\n"
    (directory / "metrics.json").write_text(text, encoding="utf-8")
    if "eval_accuracy" in metrics:
        say(f"validation accuracy {metrics['eval_accuracy']:.4f}")
    if "eval_perplexity" in metrics:
        say(f"validation perplexity {metrics['eval_perplexity']:.2f}")
    say(f"saved in {directory}")
