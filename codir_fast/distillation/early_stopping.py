"""--early_stopping_patience: a run ends when its evaluations stop getting better."""

import math
from dataclasses import dataclass, field

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from codir_fast.errors import UsageError


@dataclass
class StoppingArguments:
    """When a run ends before its last step."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End after so many evaluations in a row without a better "
            "metric_for_best_model; needs --load_best_model_at_end."
        },
    )
    early_stopping_threshold: float | None = field(
        default=None,
        metadata={"help": "A smaller change is no improvement, with early_stopping_patience; 0."},
    )

    def __post_init__(self) -> None:
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        if patience is not None and patience < 1:
            raise ValueError(f"`early_stopping_patience` must be at least 1, got {patience}")
        if threshold is None:
            return
        if patience is None:
            raise ValueError("`early_stopping_threshold` needs `early_stopping_patience`")
        if not (threshold >= 0 and math.isfinite(threshold)):
            raise ValueError(
                f"`early_stopping_threshold` must be 0 or more and finite, got {threshold}"
            )

    def check(self, training: TrainingArguments) -> None:
        """Refuses a patience without evaluations to compare."""
        if self.early_stopping_patience is None:
            return
        if not training.load_best_model_at_end:
            raise UsageError("`early_stopping_patience` needs --load_best_model_at_end True")
        if training.eval_strategy == IntervalStrategy.NO:
            raise UsageError(
                "`early_stopping_patience` needs evaluations, got `eval_strategy` no; give epoch "
                "or steps, and `validation_file` or `validation_split`"
            )

    def callbacks(self) -> list[TrainerCallback]:
        """For Trainer: none where no patience is given."""
        if self.early_stopping_patience is None:
            return []
        threshold = self.early_stopping_threshold or 0.0
        return [EarlyStoppingCallback(self.early_stopping_patience, threshold)]
