"""`codir-fast finetune`: a teacher from an encoder and labelled texts."""

from dataclasses import dataclass, field

from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from codir_fast.distillation import arguments as args
from codir_fast.distillation.data import (
    check_evaluation,
    label_ids,
    label_names,
    load_examples,
    tokenize,
)
from codir_fast.distillation.early_stopping import StoppingArguments
from codir_fast.distillation.loading import load_classifier, load_tokenizer
from codir_fast.distillation.run_settings import run_settings
from codir_fast.distillation.sampling import ResumableTrainer
from codir_fast.distillation.training import METRICS, Accuracy, train_and_save


@dataclass
class FinetuneArguments:
    """The encoder to start from."""

    model_name_or_path: str = field(metadata={"help": "Encoder: a folder or a hub name."})


def run(arguments: list[str]) -> int:
    """Reads flags, trains, saves a sequence classifier in transformers' format."""
    classes = (
        FinetuneArguments,
        args.DataArguments,
        StoppingArguments,
        args.OutputArguments,
        TrainingArguments,
    )
    defaults = args.training_defaults(arguments) | {"num_train_epochs": 2.0, "learning_rate": 5e-5}
    model_args, data, stopping, output, training = args.parse(
        "finetune", classes, arguments, **defaults
    )
    data.check_training()
    args.check_numbers(training)
    args.check_choices(training, METRICS)
    stopping.check(training)
    args.check_output(training, output)
    resume = args.checkpoint_to_resume(training)

    set_seed(training.seed)
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer("model_name_or_path", name)
    train, validation = load_examples(data, training.seed)
    check_evaluation(training, validation)
    names = label_names(train)
    label2id = {label: number for number, label in enumerate(names)}
    model = load_classifier(
        "model_name_or_path",
        name,
        num_labels=len(names),
        label2id=label2id,
        id2label=dict(enumerate(names)),
        ignore_mismatched_sizes=True,
    )
    longest = getattr(model.config, "max_position_embeddings", data.max_seq_length)
    sets = [
        None
        if examples is None
        else tokenize(
            examples, tokenizer, label_ids(examples, flag, label2id), data.max_seq_length, longest
        )
        for examples, flag in ((train, "train_file"), (validation, "validation_file"))
    ]
    trainer = ResumableTrainer(
        model,
        training,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=Accuracy(),
        callbacks=stopping.callbacks(),
    )
    parts = {"model": model_args, "data": data, "stopping": stopping, "training": training}
    train_and_save(trainer, training, resume, run_settings("finetune", **parts))
    return 0
