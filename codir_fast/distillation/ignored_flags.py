"""Flags of TrainingArguments that a run would take and not follow: refused, each by its name."""

from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames, ParallelMode

from codir_fast.distillation.objectives import WITHOUT_MEANING
from codir_fast.distillation.output_folder import resumes
from codir_fast.errors import UsageError

DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}
# What a run does in any case.
ALWAYS = {
    "do_train": "the command trains; codir-fast evaluate does not",
    "restore_callback_states_from_checkpoint": "a resumed run goes on where it was in any case",
}
VALIDATION = ("validation_file", "validation_split", "dataset_name")
WITHOUT_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
WITHOUT_SETTINGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
# Trackers that give a run a name.
NAMING = ("wandb", "trackio", "comet_ml", "mlflow", "dagshub", "swanlab")
OF_MODULES = ("galore", "apollo")

# Names of flags, whether they have an effect, what they need for it.
Condition = tuple[tuple[str, ...], Any, str]


def check_ignored_flags(
    training: TrainingArguments, given: Mapping[str, str], *, has_metrics: bool = True
) -> None:
    """Refuses what would be ignored.

    Args:
        given: names of the flags that are written, and what follows each, as `given_flags` has it.
        has_metrics: whether an evaluation looks at the outputs, and not at the loss alone.

    Raises:
        UsageError: one of them has no effect in this run.
    """
    for name, reason in ALWAYS.items():
        if is_off(name, given):
            raise UsageError(f"`{name}` False can't be used: {reason}")
    if is_off("do_eval", given) and any(name in given for name in VALIDATION):
        raise UsageError(
            "`do_eval` False can't be used: a run evaluates where it has something to evaluate on; "
            "leave out `validation_file` and `validation_split`"
        )
    if training.max_steps > 0 and "num_train_epochs" in given:
        raise UsageError("`num_train_epochs` can't be given beside `max_steps`, which ends the run")
    if "length_column_name" in given:
        raise UsageError("`length_column_name` can't be used: lengths are those of the tokens")
    written = {_own_name(name) for name in given}
    for names, is_met, needed in _conditions(training, given, has_metrics):
        for name in names:
            if name in written and _asks(training, name) and not is_met:
                raise UsageError(f"`{name}` needs {needed}")


# Flags of the contrastive term alone, in either stage.
OF_CONTRAST = (
    *("projection_dim", "temperature", "objective", "num_negatives", "both_sides"),
    *("contrast_layers", "standardize_features", "head_init", "train_heads", "bank_init"),
    *("positive", "negatives", "label_bins", "bank_momentum", "queue_size"),
)


def check_ignored_terms(config: Any, given: Mapping[str, str]) -> None:
    """Refuses flags of terms whose weight is 0.

    Args:
        config: DistillationConfig or PretrainingConfig.
        given: as for check_ignored_flags.

    Raises:
        UsageError: one of them has no effect in this run.
    """
    contrast, layers = config.codir_weight > 0, config.codir_weight > 0 or config.pkd_weight > 0
    teaches = layers or config.kd_weight > 0
    other_labels = getattr(config, "negatives", "other_labels") == "other_labels"
    of_layers = "`codir_weight` > 0 or `pkd_weight` > 0"
    for names, is_met, needed in (
        (OF_CONTRAST, contrast, "`codir_weight` > 0"),
        (("pooling",), layers, of_layers),
        (("layer_mapping",), layers or "student_layers" in given, f"`student_layers`, {of_layers}"),
        (("label_bins",), other_labels, "`negatives` other_labels"),
        (("cache_teacher",), teaches, f"`kd_weight` > 0, {of_layers}"),
        (("kd_temperature",), config.kd_weight > 0, "`kd_weight` > 0"),
    ):
        for name in names:
            if {name, f"no_{name}"} & given.keys() and not is_met:
                raise UsageError(f"`{name}` needs {needed}")


def check_ignored_of_task(regression: bool, given: Mapping[str, str]) -> None:
    """Refuses flags that have no meaning for the teacher's task; `given` as for
    check_ignored_flags.

    Raises:
        UsageError: one of them was given.
    """
    name, task = WITHOUT_MEANING[regression]
    if name in given:
        raise UsageError(f"`{name}` has no meaning where the teacher is one of {task}")


def _own_name(flag: str) -> str:
    """That of the field: --no_NAME turns a switch off, gradient_checkpointing is an older name."""
    name = flag.removeprefix("no_")
    return name.replace("gradient_checkpointing", "activation_checkpointing")


def is_off(name: str, given: Mapping[str, str]) -> bool:
    """Whether a switch was given, and off."""
    try:
        return name in given and not string_to_bool(given[name])
    except ArgumentTypeError:  # the next flag: a switch without a value is on
        return False


def _asks(training: TrainingArguments, name: str) -> bool:
    """Whether the value is more than that of a flag which is left out."""
    value, default = getattr(training, name), DEFAULTS[name]
    is_switch_or_0 = isinstance(default, bool) or default == 0
    return value != default if is_switch_or_0 else value is not None


def _conditions(
    training: TrainingArguments, given: Mapping[str, str], has_metrics: bool
) -> Iterator[Condition]:
    yield from _of_evaluation(training, given, has_metrics)
    yield from _of_saving(training, given)
    yield from _of_learning(training, given)
    yield from _of_processes(training)


def _of_evaluation(
    training: TrainingArguments, given: Mapping[str, str], has_metrics: bool
) -> Iterator[Condition]:
    evaluates = training.eval_strategy != IntervalStrategy.NO
    strategy = "`eval_strategy` epoch or steps, and examples to evaluate on"
    yield ("eval_steps",), training.eval_strategy == IntervalStrategy.STEPS, "`eval_strategy` steps"
    yield (
        ("load_best_model_at_end", "metric_for_best_model", "eval_delay"),
        evaluates,
        strategy,
    )
    yield ("greater_is_better",), training.metric_for_best_model, "`metric_for_best_model`"
    can_evaluate = any(name in given for name in VALIDATION)
    examples = "`validation_file` or `validation_split`"
    yield ("prediction_loss_only",), can_evaluate, examples
    outputs = ("eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics")
    yield outputs, can_evaluate, examples
    yield outputs, has_metrics, "metrics of the outputs, and the loss alone is looked at here"


def _of_saving(training: TrainingArguments, given: Mapping[str, str]) -> Iterator[Condition]:
    saves, logs = training.save_strategy, training.logging_strategy
    yield ("save_steps",), saves == SaveStrategy.STEPS, "`save_strategy` steps"
    yield ("ignore_data_skip",), resumes(training), "`resume_from_checkpoint`"
    yield (
        ("save_total_limit", "save_only_model"),
        saves != SaveStrategy.NO,
        "a `save_strategy` other than no",
    )
    # Without eval_steps they are those of the log.
    for_evaluation = training.eval_strategy == IntervalStrategy.STEPS and "eval_steps" not in given
    is_used = logs == IntervalStrategy.STEPS or for_evaluation
    yield ("logging_steps",), is_used, "`logging_strategy` steps"
    hub = ("model_id", "token", "private_repo", "strategy", "always_push", "revision")
    yield tuple(f"hub_{name}" for name in hub), training.push_to_hub, "`push_to_hub`"
    trackers = set(training.report_to or ())
    yield ("run_name",), trackers & set(NAMING), f"`report_to` with one of {', '.join(NAMING)}"
    yield (
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "trackio" in trackers,
        "`report_to` trackio",
    )


def _of_learning(training: TrainingArguments, given: Mapping[str, str]) -> Iterator[Condition]:
    schedule, optimizer = training.lr_scheduler_type, OptimizerNames(training.optim).value
    other_schedule = f"another `lr_scheduler_type` than {SchedulerType(schedule).value}"
    yield ("warmup_steps",), schedule not in WITHOUT_WARMUP, other_schedule
    yield ("lr_scheduler_kwargs",), schedule not in WITHOUT_SETTINGS, other_schedule
    yield (
        ("optim_target_modules",),
        optimizer.startswith(OF_MODULES),
        f"an `optim` of {' or '.join(OF_MODULES)}",
    )
    yield (
        ("activation_checkpointing_kwargs",),
        training.activation_checkpointing,
        "`activation_checkpointing`",
    )
    streams = "streaming" in given and not is_off("streaming", given)
    draws = training.train_sampling_strategy != "sequential" and not streams
    yield ("data_seed",), draws, "an order that it draws, neither sequential nor of a stream"
    yield ("torch_empty_cache_steps",), training.device.type != "cpu", "an accelerator"


def _of_processes(training: TrainingArguments) -> Iterator[Condition]:
    can_shard = training.world_size > 1 and training.device.type != "cpu"
    yield ("fsdp",), can_shard, "several processes, torchrun, with a GPU each"
    yield ("fsdp_config",), training.fsdp, "`fsdp`"
    is_launched = training.parallel_mode == ParallelMode.DISTRIBUTED
    ddp = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph")
    yield (
        (
            *(f"ddp_{name}" for name in (*ddp, "backend", "timeout")),
            *("average_tokens_across_devices", "eval_use_gather_object", "log_level_replica"),
            *("log_on_each_node", "save_on_each_node"),
        ),
        is_launched,
        "several processes: torchrun",
    )
    yield (
        (
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        training.dataloader_num_workers,
        "workers: `dataloader_num_workers` above 0",
    )
