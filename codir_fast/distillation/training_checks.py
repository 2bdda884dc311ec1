"""Flags of TrainingArguments that transformers takes and that fail late, or do nothing: refused
before a model is loaded or anything is written.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames

from codir_fast.distillation.ignored_flags import check_ignored_flags
from codir_fast.distillation.metrics import metric_names
from codir_fast.distillation.objectives import is_regression
from codir_fast.errors import UsageError

LARGEST, SMALLEST = 1e9, 1e-9
# Smallest and largest value of the numbers that do not check themselves; None is not looked at.
NUMBERS = {
    "per_device_train_batch_size": (1, LARGEST),
    "per_device_eval_batch_size": (1, LARGEST),
    "gradient_accumulation_steps": (1, LARGEST),
    "num_train_epochs": (0, LARGEST),
    "learning_rate": (0, LARGEST),
    "warmup_steps": (0, LARGEST),
    "weight_decay": (0, LARGEST),
    "max_grad_norm": (0, LARGEST),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.999999),
    "adam_epsilon": (0, LARGEST),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, LARGEST),
    "logging_steps": (SMALLEST, LARGEST),
    "save_steps": (SMALLEST, LARGEST),
    "eval_steps": (SMALLEST, LARGEST),
    "save_total_limit": (1, LARGEST),
    "eval_delay": (0, LARGEST),
    "eval_accumulation_steps": (1, LARGEST),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, LARGEST),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
REFUSED = {
    "label_names": "the labels are those of `label_column`",
    "do_predict": "there is nothing to predict on; codir-fast evaluate does that",
    "deepspeed": "checkpoints in pieces are not built",
    "use_liger_kernel": "its kernels are for language models",
    "debug": "underflow_overflow fails on masks, tpu_metrics_debug is for TPUs",
    "use_cache": "nothing is generated here",
    "enable_jit_checkpoint": "it saves in the middle of a step; runs resume after a kill without",
    "include_for_metrics": "no metric here looks at more than outputs and labels",
    "bf16_full_eval": "the saved model would be of that precision too",
    "fp16_full_eval": "the saved model would be of that precision too",
}
# Optimizers that are made for one model: without it only the package can be looked for.
OF_A_MODEL = ("galore", "apollo", "lomo", "adalomo")
# Settings of some optimizers, and a value that none has.
OF_OPTIMIZERS = {"optim_args": None, "adam_beta1": -1.0, "adam_beta2": -1.0, "adam_epsilon": -1.0}


def check_training_arguments(
    training: TrainingArguments, given: Mapping[str, str], *, has_metrics: bool = True
) -> None:
    """Raises UsageError for what DistillationTrainer and Trainer can't follow, or would ignore; see
    check_ignored_flags.
    """
    _check_numbers(training)
    for name, reason in REFUSED.items():
        if getattr(training, name):
            raise UsageError(f"`{name}` can't be used: {reason}")
    _check_trackers(training)
    check_ignored_flags(training, given, has_metrics=has_metrics)
    for name, attempt in _attempts(training).items():
        _try(name, getattr(training, name), attempt)
    _check_optimizer_arguments(training, given)


def check_task_arguments(training: TrainingArguments, config: PretrainedConfig) -> None:
    """Raises UsageError for what has no meaning for a model of this configuration."""
    names = ("loss",) if training.prediction_loss_only else metric_names(config)
    check_best_metric(training, names)
    if is_regression(config) and training.label_smoothing_factor:
        raise UsageError("`label_smoothing_factor` has no meaning in regression")


def check_best_metric(training: TrainingArguments, names: Sequence[str]) -> None:
    best = training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in names:
        raise UsageError(f"`metric_for_best_model` must be one of {', '.join(names)}, got {best!r}")


def _check_numbers(training: TrainingArguments) -> None:
    for name, (lowest, highest) in NUMBERS.items():
        value = getattr(training, name)
        if value is not None and not lowest <= value <= highest:  # NaN is refused too
            raise UsageError(f"`{name}` must be in [{lowest}, {highest:.10g}], got {value}")
    if training.max_steps != -1 and not 1 <= training.max_steps <= LARGEST:
        raise UsageError(
            f"`max_steps` must be in [1, {LARGEST:.10g}], or -1 for none, got {training.max_steps}"
        )
    if training.warmup_steps > 1 and training.warmup_steps % 1:
        raise UsageError(
            "`warmup_steps` must be a share of the steps below 1 or a whole number, got "
            f"{training.warmup_steps}"
        )


def _check_trackers(training: TrainingArguments) -> None:
    for name in training.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UsageError(f"`report_to` must be none, all or of {known}, got {name!r}")
        if name not in (*get_available_reporting_integrations(), "flyte"):  # it is never listed
            raise UsageError(f"`report_to` {name} needs the package of that name; pip install it")


def _attempts(training: TrainingArguments) -> dict[str, Callable[[], Any]]:
    """What the trainer will do with flags that are given, on something small."""
    schedule = _settings(training, "lr_scheduler_kwargs")
    attempts: dict[str, Callable[[], Any]] = {
        "optim": lambda: _optimizer(training),
        "lr_scheduler_type": lambda: get_scheduler(
            training.lr_scheduler_type,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate),
            num_warmup_steps=0,
            num_training_steps=10**6,
            scheduler_specific_kwargs=schedule,
        ),
    }
    if training.torch_compile:
        attempts["torch_compile_backend"] = lambda: torch.compile(
            nn.Identity(), backend=str(training.torch_compile_backend)
        )
        attempts["torch_compile_mode"] = lambda: torch.compile(
            nn.Identity(), mode=training.torch_compile_mode
        )
    options = _settings(training, "activation_checkpointing_kwargs")
    if options:
        attempts["activation_checkpointing_kwargs"] = lambda: checkpoint(
            nn.Identity(), torch.zeros(1), **({"use_reentrant": True} | options)
        )
    if training.push_to_hub:
        attempts["push_to_hub"] = lambda: HfApi().whoami(token=training.hub_token)
    return attempts


def _settings(training: TrainingArguments, name: str) -> dict[str, Any] | None:
    """A flag of JSON, which TrainingArguments leaves a text where it does not begin as JSON."""
    value = getattr(training, name)
    if isinstance(value, str):
        raise UsageError(f"`{name}` must be JSON such as '{{\"name\": 2}}', got {value!r}")
    return value


def _try(name: str, value: Any, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except Exception as error:  # of whatever package does it
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(
            f"`{name}` {getattr(value, 'value', value)} can't be used: {reason}"
        ) from error


def _optimizer(training: TrainingArguments) -> None:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, None)
        kind([nn.Parameter(torch.zeros(1))], **options)
    except ImportError:
        raise
    except Exception:
        if not _is_of_a_model(training):
            raise


def _is_of_a_model(training: TrainingArguments) -> bool:
    return OptimizerNames(training.optim).value.startswith(OF_A_MODEL)


def _check_optimizer_arguments(training: TrainingArguments, given: Mapping[str, str]) -> None:
    """Settings that `optim` does not look at."""
    if _is_of_a_model(training):
        return
    for name, other in OF_OPTIMIZERS.items():
        if name not in given:
            continue
        changed = copy.copy(training)
        setattr(changed, name, other)
        both = [Trainer.get_optimizer_cls_and_kwargs(each, None) for each in (training, changed)]
        if both[0] == both[1]:
            raise UsageError(
                f"`{name}` {getattr(training, name)} is nothing that `optim` "
                f"{OptimizerNames(training.optim).value} looks at"
            )
