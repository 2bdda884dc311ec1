"""`codir-fast distill`: a smaller student from a fine-tuned teacher, by CoDIR."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from codir_fast.distillation import arguments as args
from codir_fast.distillation.config import PRESETS, DistillationConfig
from codir_fast.distillation.data import (
    check_batches,
    check_evaluation,
    load_examples,
    tokenize,
)
from codir_fast.distillation.early_stopping import StoppingArguments
from codir_fast.distillation.ignored_flags import check_ignored_of_task, check_ignored_terms
from codir_fast.distillation.labels import class_names, read_labels
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import (
    check_same_words,
    load_config,
    load_new_classifier,
    load_tokenizer,
    load_trained_classifier,
)
from codir_fast.distillation.metrics import metrics_for
from codir_fast.distillation.model import DistillationModel
from codir_fast.distillation.objectives import is_regression
from codir_fast.distillation.output_folder import (
    OutputArguments,
    check_output,
    checkpoint_to_resume,
)
from codir_fast.distillation.processes import process_group, wait_for_all
from codir_fast.distillation.run_settings import run_settings
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.teacher_cache import (
    TeacherCollator,
    default_directory,
    with_teacher_outputs,
)
from codir_fast.distillation.trainer import DistillationTrainer, check_arguments, load_checkpoint
from codir_fast.distillation.training import train_and_save
from codir_fast.distillation.training_checks import check_task_arguments, check_training_arguments
from codir_fast.errors import SaveError, UsageError, is_full


@dataclass
class DistillArguments:
    """The two models, and a set of settings."""

    teacher: str = field(metadata={"help": "Fine-tuned classifier: a folder or a hub name."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Make the student from so many of the teacher's layers."}
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Start from this checkpoint instead; it must read the same tokens."},
    )

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Start from a set of settings: paper, official (the released code's), nce_all "
            "(that for each layer, against all rows) or fidelity; flags that are given come first."
        },
    )
    cache_teacher: bool = field(
        default=False,
        metadata={
            "help": "Run the teacher once on the training examples, keep what it gives on disk, "
            "and train without it."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where, instead of codir_fast/teacher in the user's cache folder."},
    )

    def __post_init__(self) -> None:
        if (self.student_layers is None) == (self.student is None):
            raise ValueError("exactly one of `student_layers` and `student` must be given")
        if self.teacher_cache_dir is not None and not self.cache_teacher:
            raise ValueError("`teacher_cache_dir` needs `cache_teacher`")


def read_flags(arguments: list[str]) -> tuple[Any, ...]:
    """The dataclasses that `arguments` fill, checked as far as nothing is loaded: DistillArguments,
    DistillationConfig, DataArguments, StoppingArguments, OutputArguments, TrainingArguments.
    """
    classes = (
        DistillArguments,
        DistillationConfig,
        args.DataArguments,
        StoppingArguments,
        OutputArguments,
        TrainingArguments,
    )
    defaults = args.training_defaults(arguments) | {"num_train_epochs": 2.0, "learning_rate": 1e-4}
    defaults |= _preset(arguments)
    models, config, data, stopping, output, training = args.parse(
        "distill", classes, arguments, **defaults
    )
    data.check_training()
    stopping.check(training)
    check_training_arguments(training, args.given_flags(arguments))
    check_ignored_terms(config, args.given_flags(arguments))
    with args.usage_errors("distill"):
        check_arguments(training)
    return models, config, data, stopping, output, training


def run(arguments: list[str]) -> int:
    """Reads flags, distils, saves the student in transformers' format."""
    models, config, data, stopping, output, training = read_flags(arguments)
    check_output(training, output, teacher=models.teacher, student=models.student)
    resume = checkpoint_to_resume(training)

    set_seed(training.seed)
    tokenizer = load_tokenizer("teacher", models.teacher)
    teacher = load_trained_classifier("teacher", models.teacher)
    check_task_arguments(training, teacher.config)
    check_ignored_of_task(is_regression(teacher.config), args.given_flags(arguments))
    train, validation = load_examples(data, training.seed)
    check_evaluation(training, validation)
    check_batches(training, train)
    labels = read_labels(train, "train_file", teacher.config)
    eval_labels = read_labels(validation, "validation_file", teacher.config) if validation else []
    with args.usage_errors("distill"):
        student = _student(models, teacher, tokenizer, config)
        group = process_group(training)
        model = DistillationModel(student, teacher, config, torch.tensor(labels), group)
        if resume is not None:  # Trainer loads it again, after it has made the output folder
            load_checkpoint(model, Path(resume))
    data.max_seq_length = longest_text(data, tokenizer, student, teacher)
    train_set = tokenize(train, tokenizer, labels, data.max_seq_length)
    eval_set = None
    if validation is not None:
        eval_set = tokenize(validation, tokenizer, eval_labels, data.max_seq_length)
    collator = TeacherCollator(tokenizer)
    if models.cache_teacher:
        train_set = _cached(models, model, train_set, collator, training)
    with args.usage_errors("distill"):
        trainer = DistillationTrainer(
            model,
            training,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=collator,
            processing_class=tokenizer,
            compute_metrics=metrics_for(teacher.config),
            callbacks=stopping.callbacks(),
        )
    shown = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    args.say(f"distilling with {shown}")
    settings = run_settings(
        "distill",
        model=models,
        distillation=config,
        data=data,
        stopping=stopping,
        training=training,
    )
    train_and_save(trainer, training, resume, settings)
    return 0


def _cached(
    models: DistillArguments,
    model: DistillationModel,
    tokens: Dataset,
    collator: TeacherCollator,
    training: TrainingArguments,
) -> Dataset:
    """The training examples with the teacher's outputs; the teacher leaves memory."""
    directory = Path(models.teacher_cache_dir) if models.teacher_cache_dir else default_directory()
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    try:
        cached = with_teacher_outputs(
            model,
            tokens,
            collator,
            directory=directory,
            batch_size=training.per_device_eval_batch_size,
            device=training.device,
            dtype=dtype,
            # Of all processes the first; then that of each machine, if it sees another disk.
            turns=(training.process_index == 0, training.local_process_index == 0),
            wait=lambda: wait_for_all(training),
        )
    except ValueError as error:
        raise UsageError(f"distill: {error}") from error
    except OSError as error:
        kind = SaveError if is_full(error) else UsageError
        raise kind(f"`teacher_cache_dir` {directory} can't be written: {error}") from error
    model.release_teacher()
    return cached


def _preset(arguments: list[str]) -> dict[str, Any]:
    """The settings that --preset names, as defaults of the flags."""
    name = args.given_flags(arguments).get("preset")
    if name is None:
        return {}
    if name not in PRESETS:
        raise UsageError(f"`preset` must be one of {tuple(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _student(
    models: DistillArguments,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DistillationConfig,
) -> PreTrainedModel:
    if models.student is None:
        assert models.student_layers is not None
        return student_from_teacher(teacher, models.student_layers, config.layer_mapping)
    check_same_words("student", models.student, tokenizer)
    classes = class_names(teacher.config)
    own = class_names(load_config("student", models.student))
    if own != classes and sorted(own) == sorted(classes):
        raise UsageError(
            f"`student` must have the teacher's classes in their order, {classes}, got {own}"
        )
    student = load_new_classifier(
        "student",
        models.student,
        num_labels=teacher.config.num_labels,
        problem_type=teacher.config.problem_type,
        label2id=teacher.config.label2id,
        id2label=teacher.config.id2label,
    )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(
            f"`student` must read the teacher's tokens, a vocabulary of "
            f"{teacher.config.vocab_size}, got {student.config.vocab_size}"
        )
    return student
