"""What finetune and distill share: the run of a trainer from start to saved model."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from codir_fast.distillation.arguments import say
from codir_fast.distillation.checkpoint import replaced_files
from codir_fast.distillation.model_card import write_model_card
from codir_fast.distillation.processes import telling_of_loss
from codir_fast.distillation.run_settings import save_settings


def train_and_save(
    trainer: Trainer, training: TrainingArguments, resume: str | None, run: dict[str, Any]
) -> None:
    """Trains, evaluates where there is something to evaluate on, and saves model, model card,
    metrics and settings (`run`, see run_settings).
    """
    directory = Path(str(training.output_dir))
    if trainer.is_world_process_zero():
        trainer.add_callback(_SavedSettings(directory, run))
    with telling_of_loss(training):
        result = trainer.train(resume_from_checkpoint=resume)
        metrics: dict[str, Any] = dict(result.metrics)
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        write_model_card(trainer, run, metrics)
        trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    text = json.dumps(metrics, indent=2) + "\n"
    with replaced_files(directory) as files:
        trainer.state.save_to_json(str(files / TRAINER_STATE_NAME))
        (files / "metrics.json").write_text(text, encoding="utf-8")
    for name in ("accuracy", "pearson", "perplexity"):
        if f"eval_{name}" in metrics:
            say(f"validation {name} {metrics[f'eval_{name}']:.4f}")
    say(f"saved in {directory}")


class _SavedSettings(TrainerCallback):
    """Writes the run's settings before its first step, and not where a checkpoint is refused."""

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        self.directory = directory
        self.run = run

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        save_settings(self.directory, self.run)
