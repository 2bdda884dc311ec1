"""What the folder of a run says: log, settings, metrics, size. Its files are not trusted."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from codir_fast.distillation.checkpoint import checkpoints
from codir_fast.distillation.labels import LARGEST_NUMBER
from codir_fast.distillation.model_card import SPEED
from codir_fast.distillation.run_settings import RUN_FILE
from codir_fast.errors import UsageError

# What Trainer logs beside the loss and its terms.
NO_TERMS = ("step", "epoch", "grad_norm", "learning_rate", "num_input_tokens_seen")


@dataclass(frozen=True)
class Run:
    """A run under a name of its own.

    Args:
        history: one dictionary of numbers for each logged step; without the closing evaluation
            of a run that goes back to its best model, which is not the last step's.
        settings: group -> name -> value, as in run.json; None where there is no such file.
        metrics: of the last evaluation, without their eval_.
        parameters: of the saved model; None where none is saved yet.
    """

    name: str
    path: Path
    history: list[dict[str, float]]
    settings: dict[str, dict[str, Any]] | None
    metrics: dict[str, float]
    parameters: int | None

    @property
    def terms(self) -> list[str]:
        """The loss and its terms, in the order in which the log has them."""
        rows = [row for row in self.history if "loss" in row]
        names = dict.fromkeys(name for row in rows for name in row)
        return [name for name in names if name not in NO_TERMS and not name.endswith(SPEED)]

    @property
    def evaluated(self) -> list[str]:
        """Names of the log that an evaluation gave, each with its eval_."""
        names = dict.fromkeys(name for row in self.history for name in row)
        return [name for name in names if name.startswith("eval_") and not name.endswith(SPEED)]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, named by their folder, or where two have one name by their path.

    Raises:
        UsageError: a folder is named twice, has no log, or a file of another form.
    """
    paths = [Path(folder) for folder in folders]
    for n, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:n]]:
            raise UsageError(f"`runs` must be different folders, {path} is there twice")
    short = [path.resolve().name for path in paths]
    return [
        _read_run(name if short.count(name) == 1 else os.path.normpath(path), path)
        for name, path in zip(short, paths, strict=True)
    ]


def _read_run(name: str, path: Path) -> Run:
    history = _history(path)
    last: dict[str, float] = {}
    for row in history:
        last |= {key: value for key, value in row.items() if key.startswith("eval_")}
    settings = _settings(path)
    if (settings or {}).get("training", {}).get("load_best_model_at_end"):
        ends = [n for n, row in enumerate(history) if "train_runtime" in row]
        history = history[: ends[-1] + 1] if ends else history
    return Run(
        name=name,
        path=path,
        history=history,
        settings=settings,
        metrics={
            key.removeprefix("eval_"): value
            for key, value in last.items()
            if not key.endswith(SPEED)
        },
        parameters=parameters_in(path),
    )


def _history(path: Path) -> list[dict[str, float]]:
    """The log of trainer_state.json; of a run that has not ended, its last checkpoint's."""
    folders = [path, *(folder for _, folder in reversed(checkpoints(path)))]
    files = [folder / TRAINER_STATE_NAME for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            f"`runs` must be folders of finetune, distill or pretrain, {path} has no "
            f"{TRAINER_STATE_NAME}"
        )
    state = read_json(file)
    rows = state.get("log_history")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file} holds no log_history")
    for row in rows:
        if large := [name for name, value in row.items() if _is_number(value) and _is_large(value)]:
            raise UsageError(
                f"{file} must have numbers in log_history that are those of float32, at most "
                f"{LARGEST_NUMBER:.1e}; {large[0]} has a larger one"
            )
    numbers = [{key: value for key, value in row.items() if _is_number(value)} for row in rows]
    return [row for row in numbers if math.isfinite(row.get("step", math.nan))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_large(value: int | float) -> bool:
    """Whether it is beyond the numbers that a run computes with, but not for being infinite."""
    return LARGEST_NUMBER < abs(value) != math.inf


def _settings(path: Path) -> dict[str, dict[str, Any]] | None:
    file = path / RUN_FILE
    if not file.is_file():
        return None
    settings = read_json(file).get("settings")
    if not isinstance(settings, dict) or not all(isinstance(g, dict) for g in settings.values()):
        raise UsageError(f"{file} holds no settings")
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        UsageError: the file can't be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold an object of JSON, got {type(found).__name__}")
    return found


def parameters_in(path: Path) -> int | None:
    """How many a model's folder holds; their values are not read. None where it has no model."""
    total = 0
    files = sorted(path.glob("model*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                shapes = [tensors.get_slice(name).get_shape() for name in names]
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} can't be read as safetensors: {error}") from error
        total += sum(math.prod(shape) for shape in shapes)
    return total if files else None
