"""trainer_state.json of a checkpoint, and what a resumed run takes from it beside Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from codir_fast.distillation.arguments import say
from codir_fast.distillation.checkpoint import refusing
from codir_fast.distillation.manifest import DamagedFolder, verify

TYPES: dict[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "epoch": (int, float),
    "total_flos": (int, float),
    "num_input_tokens_seen": int,
    "best_global_step": (int, type(None)),
    "log_history": list,
    "stateful_callbacks": dict,
}


class SaveAfterEpoch(TrainerCallback):
    """Puts off the checkpoint of the last step of an epoch, or of the run, until the epoch's end
    has been told to callbacks: a run resumed from it would not come by there again, and miss the
    evaluation and the log.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_last = float(state.epoch).is_integer() or control.should_training_stop
        self._is_due = control.should_save and is_last
        control.should_save = control.should_save and not self._is_due

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = control.should_save or self._is_due
        self._is_due = False


def read_trainer_state(directory: Path) -> TrainerState:
    """The file, with the types that Trainer counts on.

    Raises:
        UsageError: it is missing or of another form.
    """
    with refusing(directory):
        state = TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
        for name, kind in TYPES.items():
            if not isinstance(getattr(state, name), kind):
                raise ValueError(f"{name} in {TRAINER_STATE_NAME} is {getattr(state, name)!r}")
    return state


def check_steps(saved: TrainerState, max_steps: int) -> None:
    """Raises ValueError where the run would have ended before the checkpoint was written."""
    if saved.global_step > max_steps:
        raise ValueError(
            f"it has {saved.global_step} steps, and this run ends after {max_steps}: "
            "`max_steps` or `num_train_epochs` must be larger"
        )


def best_beside(directory: Path, saved: TrainerState) -> str | None:
    """The best checkpoint so far, found by its step: the file may have moved since it was named."""
    if saved.best_global_step is None:
        return None
    best = directory.parent / f"checkpoint-{saved.best_global_step}"
    try:
        verify(best)
    except (DamagedFolder, OSError) as error:
        say(f"{best}, the best so far, is damaged and left out: {error}")
        return None
    return str(best)


def restore_callbacks(callbacks: Sequence[Any], saved: TrainerState) -> bool:
    """Sets the counters of callbacks, as that of early stopping; returns whether one of them had
    stopped the run, and would do so again.
    """
    states: Any = saved.stateful_callbacks
    control = states.get(TrainerControl.__name__, {"args": {}})["args"]
    stopped = bool(control.get("should_training_stop")) and saved.global_step < saved.max_steps
    would_again = False
    for callback in callbacks:
        kept = states.get(type(callback).__name__)
        if isinstance(kept, list):  # several of one class, in their order
            kept = kept.pop(0) if kept else None
        own = callback.state()
        if kept is None or kept["args"] != own["args"]:
            stopped = False  # it may decide otherwise now
            continue
        for name in own["attributes"]:
            setattr(callback, name, kept["attributes"][name])
        would_again |= not isinstance(callback, EarlyStoppingCallback) or (
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
        )
    return stopped and would_again
