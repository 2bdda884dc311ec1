"""`codir-fast finetune`: a teacher from an encoder and labelled texts."""

from dataclasses import dataclass, field

from transformers import (
    DataCollatorWithPadding,
    PretrainedConfig,
    TrainingArguments,
    set_seed,
)

from codir_fast.distillation import arguments as args
from codir_fast.distillation.data import (
    check_batches,
    check_evaluation,
    load_examples,
    tokenize,
)
from codir_fast.distillation.early_stopping import StoppingArguments
from codir_fast.distillation.labels import class_names, new_classifier, read_labels
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import load_config, load_new_classifier, load_tokenizer
from codir_fast.distillation.metrics import metrics_for
from codir_fast.distillation.objectives import CLASSIFICATION, REGRESSION
from codir_fast.distillation.output_folder import (
    OutputArguments,
    check_output,
    checkpoint_to_resume,
)
from codir_fast.distillation.run_settings import run_settings
from codir_fast.distillation.sampling import ResumableTrainer
from codir_fast.distillation.training import train_and_save
from codir_fast.distillation.training_checks import check_task_arguments, check_training_arguments


@dataclass
class FinetuneArguments:
    """The encoder to start from."""

    model_name_or_path: str = field(metadata={"help": "Encoder: a folder or a hub name."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "regression or single_label_classification; by default regression where the "
            "labels are floats."
        },
    )

    def __post_init__(self) -> None:
        if self.problem_type not in (None, REGRESSION, CLASSIFICATION):
            raise ValueError(
                f"`problem_type` must be {REGRESSION} or {CLASSIFICATION}, got "
                f"{self.problem_type!r}"
            )


def run(arguments: list[str]) -> int:
    """Reads flags, trains, saves a sequence classifier in transformers' format."""
    classes = (
        FinetuneArguments,
        args.DataArguments,
        StoppingArguments,
        OutputArguments,
        TrainingArguments,
    )
    defaults = args.training_defaults(arguments) | {"num_train_epochs": 2.0, "learning_rate": 5e-5}
    model_args, data, stopping, output, training = args.parse(
        "finetune", classes, arguments, **defaults
    )
    data.check_training()
    stopping.check(training)
    check_training_arguments(training, args.given_flags(arguments))
    check_output(training, output, model_name_or_path=model_args.model_name_or_path)
    resume = checkpoint_to_resume(training)

    set_seed(training.seed)
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer("model_name_or_path", name)
    train, validation = load_examples(data, training.seed)
    check_evaluation(training, validation)
    check_batches(training, train)
    known = class_names(load_config("model_name_or_path", name))
    outputs = new_classifier(train, model_args.problem_type, known)
    config = PretrainedConfig(**outputs)
    check_task_arguments(training, config)
    given = [(train, read_labels(train, "train_file", config))]
    if validation is not None:
        given.append((validation, read_labels(validation, "validation_file", config)))
    model = load_new_classifier("model_name_or_path", name, **outputs)
    data.max_seq_length = longest_text(data, tokenizer, model)
    sets = [
        tokenize(examples, tokenizer, labels, data.max_seq_length) for examples, labels in given
    ]
    with args.usage_errors("finetune"):
        trainer = ResumableTrainer(
            model,
            training,
            train_dataset=sets[0],
            eval_dataset=None if validation is None else sets[1],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=metrics_for(model.config),
            callbacks=stopping.callbacks(),
        )
    parts = {"model": model_args, "data": data, "stopping": stopping, "training": training}
    train_and_save(trainer, training, resume, run_settings("finetune", **parts))
    return 0
