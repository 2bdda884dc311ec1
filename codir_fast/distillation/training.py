"""What finetune and distill share: the run of a trainer from start to saved model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, Trainer, TrainingArguments

from codir_fast.distillation.arguments import say


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose highest logit is at their label."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


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
    say(f"saved in {directory}")
