"""--early_stopping_patience: a run ends when its evaluations stop getting better."""

import math
from dataclasses import dataclass, field
from typing import Any

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

    def callbacks(self, training: TrainingArguments) -> list[TrainerCallback]:
        """For Trainer: none where no patience is given."""
        if self.early_stopping_patience is None:
            return []
        if not training.load_best_model_at_end:
            raise UsageError("`early_stopping_patience` needs --load_best_model_at_end True")
        if training.eval_strategy == IntervalStrategy.NO:
            raise UsageError(
                "`early_stopping_patience` needs evaluations, got `eval_strategy` no; give epoch "
                "or steps, and `validation_file` or `validation_split`"
            )
        threshold = self.early_stopping_threshold or 0.0
        return [EarlyStopping(self.early_stopping_patience, threshold)]


class EarlyStopping(EarlyStoppingCallback):
    """Goes on counting from the checkpoint that is resumed. Trainer does so only with
    --restore_callback_states_from_checkpoint, which also puts the earlier run's patience and
    threshold in place of those given.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # A checkpoint of a run without early stopping has no entry, which Trainer would miss.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
