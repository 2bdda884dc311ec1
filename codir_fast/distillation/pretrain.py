"""`codir-fast pretrain`: a smaller masked language model from a larger one and plain texts."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from codir_fast.distillation import arguments as args
from codir_fast.distillation.config import PretrainingConfig
from codir_fast.distillation.data import check_batches, check_evaluation, tokenize_texts
from codir_fast.distillation.early_stopping import StoppingArguments
from codir_fast.distillation.ignored_flags import check_ignored_terms, is_off
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import (
    check_same_words,
    load_masked_lm,
    load_tokenizer,
    load_trained_masked_lm,
)
from codir_fast.distillation.masked_lm import PretrainingModel
from codir_fast.distillation.masked_lm_trainer import PretrainingTrainer
from codir_fast.distillation.output_folder import (
    OutputArguments,
    check_output,
    checkpoint_to_resume,
)
from codir_fast.distillation.processes import process_group
from codir_fast.distillation.run_settings import run_settings
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.texts import load_texts, reading_on, stream_settings
from codir_fast.distillation.trainer import check_arguments, load_checkpoint
from codir_fast.distillation.training import train_and_save
from codir_fast.distillation.training_checks import check_best_metric, check_training_arguments
from codir_fast.errors import UsageError

TEACHER_WEIGHTS = ("kd_weight", "codir_weight", "pkd_weight")


@dataclass
class PretrainArguments:
    """The two models, or one."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Masked language model: a folder or a hub name. Without one the student learns "
            "from the texts alone."
        },
    )
    student_layers: int | None = field(
        default=None, metadata={"help": "Make the student from so many of the teacher's layers."}
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": "Start from this checkpoint instead; an encoder without a head gets a new one."
        },
    )

    def __post_init__(self) -> None:
        if (self.student_layers is None) == (self.student is None):
            raise ValueError("exactly one of `student_layers` and `student` must be given")
        if self.student_layers is not None and self.teacher is None:
            raise ValueError("`student_layers` needs `teacher`, whose layers they are")


def run(arguments: list[str]) -> int:
    """Reads flags, trains, saves the student in transformers' format."""
    classes = (
        PretrainArguments,
        PretrainingConfig,
        args.CorpusArguments,
        StoppingArguments,
        OutputArguments,
        TrainingArguments,
    )
    models, config, data, stopping, output, training = args.parse(
        "pretrain", classes, arguments, **_defaults(arguments)
    )
    data.check_training()
    given = args.given_flags(arguments)
    data.check_stream(training, given)
    check_training_arguments(training, given, has_metrics=False)
    check_ignored_terms(config, given)
    check_best_metric(training, ("loss", "perplexity"))
    stopping.check(training)
    with args.usage_errors("pretrain"):
        check_arguments(training)
    check_output(training, output, teacher=models.teacher, student=models.student)
    resume = checkpoint_to_resume(training)

    set_seed(training.seed)
    flag = "student" if models.teacher is None else "teacher"
    tokenizer = load_tokenizer(flag, getattr(models, flag))
    if tokenizer.mask_token is None:
        raise UsageError(f"`{flag}` must have a tokenizer with a mask token")
    student, teacher = _student_and_teacher(models, tokenizer, config)
    with args.usage_errors("pretrain"):
        model = PretrainingModel(student, teacher, config, process_group(training))
        if resume is not None:  # Trainer loads it again, after it has made the output folder
            load_checkpoint(model, Path(resume))
    if len(tokenizer) > student.config.vocab_size:
        raise UsageError(
            f"`{flag}` has {len(tokenizer)} tokens, more than its model's vocabulary of "
            f"{student.config.vocab_size}"
        )
    train, validation = load_texts(data, training.seed)
    check_evaluation(training, validation)
    if not data.streaming:
        check_batches(training, train)
    if not data.streaming and config.codir_weight > 0 and config.queue_size >= len(train):
        args.say(
            f"`queue_size` {config.queue_size} is not below the {len(train)} training texts: from "
            "the second epoch on a text meets its own embedding of before among the negatives"
        )
    data.max_seq_length = longest_text(data, tokenizer, student, teacher or student)
    with args.usage_errors("pretrain"):
        trainer = PretrainingTrainer(
            model,
            training,
            train_dataset=tokenize_texts(train, tokenizer, data.max_seq_length),
            eval_dataset=None
            if validation is None
            else tokenize_texts(validation, tokenizer, data.max_seq_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=stopping.callbacks(),
            of_stream=partial(stream_settings, data) if data.streaming else None,
        )
    shown = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    args.say(f"pre-training with {shown}")
    settings = run_settings(
        "pretrain",
        model=models,
        distillation=config,
        data=data,
        stopping=stopping,
        training=training,
    )
    with reading_on(data):
        train_and_save(trainer, training, resume, settings)
    return 0


def _defaults(arguments: list[str]) -> dict[str, Any]:
    """What differs from the fields' own defaults."""
    given = args.given_flags(arguments)
    defaults = args.training_defaults(arguments)
    defaults |= {"num_train_epochs": 1.0, "learning_rate": 1e-4}
    if "teacher" not in given:
        defaults |= dict.fromkeys(TEACHER_WEIGHTS, 0.0)
    if "streaming" in given and not is_off("streaming", given):
        defaults |= {"save_strategy": "steps", "train_sampling_strategy": "random"}
        if defaults["eval_strategy"] != "no":
            defaults |= {"eval_strategy": "steps", "eval_steps": 500}
    return defaults


def _student_and_teacher(
    models: PretrainArguments, tokenizer: PreTrainedTokenizerBase, config: PretrainingConfig
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    teacher = None
    if models.teacher is not None:
        teacher = load_trained_masked_lm("teacher", models.teacher)
    if models.student is None:
        assert teacher and models.student_layers is not None
        try:
            student = student_from_teacher(teacher, models.student_layers, config.layer_mapping)
        except ValueError as error:
            raise UsageError(f"pretrain: {error}") from error
        return student, teacher
    if teacher is not None:
        check_same_words("student", models.student, tokenizer)
    student, missing = load_masked_lm("student", models.student)
    if missing:
        args.say(f"{models.student} has no head for masked tokens, {', '.join(missing)} are new")
    return student, teacher
