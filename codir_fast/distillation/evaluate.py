"""`codir-fast evaluate`: accuracy, loss and latency of a classifier on labelled texts."""

import json
import math
import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from codir_fast.distillation import arguments as args
from codir_fast.distillation.data import read_file, select_columns, tokenize
from codir_fast.distillation.labels import known_labels, read_labels
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import (
    check_same_words,
    load_tokenizer,
    load_trained_classifier,
)
from codir_fast.distillation.metrics import output_scores, teacher_scores
from codir_fast.distillation.objectives import is_regression, label_loss
from codir_fast.errors import UsageError

RUNS = 3


@dataclass
class EvaluateArguments:
    """Model, examples, and how they are run."""

    model_name_or_path: str = field(metadata={"help": "Classifier: a folder or a hub name."})
    test_file: str = field(metadata={"help": "Labelled texts: csv, json, jsonl or parquet."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "Compare with this classifier too: a folder or a hub name."},
    )
    batch_size: int = field(default=32, metadata={"help": "Texts that are run together."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size < 2**31:
            raise ValueError(f"`batch_size` must be in [1, 2^31), got {self.batch_size}")
        try:
            torch.ones(1, device=self.device).item()  # meta has no values
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0].split(". ")[0]  # the rest is for torch's developers
            raise ValueError(f"`device` {self.device!r} can't be used: {reason}") from None


def run(arguments: list[str]) -> int:
    """Prints one line of JSON: accuracy, n, loss, milliseconds_per_sentence; beside a teacher also
    agreement and kl. In regression: mse, pearson, spearman for accuracy; beside a teacher
    mse_to_teacher and pearson_to_teacher.
    """
    classes = (EvaluateArguments, args.TextArguments)
    print(json.dumps(measure(*args.parse("evaluate", classes, arguments))))
    return 0


def measure(options: EvaluateArguments, data: args.TextArguments) -> dict[str, float]:
    """What `evaluate` gives for these flags."""
    args.check_file("test_file", options.test_file)
    name = options.model_name_or_path
    tokenizer = load_tokenizer("model_name_or_path", name)
    model = load_trained_classifier("model_name_or_path", name)
    examples = select_columns(read_file("test_file", options.test_file), "test_file", data)
    labels = read_labels(examples, "test_file", model.config)
    teacher = None
    if options.teacher is not None:
        teacher = load_trained_classifier("teacher", options.teacher)
        _check_teacher(model, teacher, options.teacher)
        check_same_words("teacher", options.teacher, tokenizer)
    sides = [model] if teacher is None else [model, teacher]
    longest = longest_text(data, tokenizer, *sides)
    tokens = tokenize(examples, tokenizer, labels, longest)
    result = evaluate(model, tokens, tokenizer, options.batch_size, options.device, teacher)
    for key, value in result.items():
        if not math.isfinite(value):  # the loss comes before what compares with the teacher
            flag = "model_name_or_path" if "loss" in key else "teacher"
            raise UsageError(f"`{flag}` must give finite outputs, {key} is {value}")
    return result


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, name: str) -> None:
    """Both must read the same tokens and name the same classes."""
    for what, ours, theirs in (
        ("vocabulary", model.config.vocab_size, teacher.config.vocab_size),
        ("labels", _labels(model), _labels(teacher)),
    ):
        if ours != theirs:
            raise UsageError(
                f"`teacher` must have the model's {what}, {ours}, but {name} has {theirs}"
            )


def _labels(model: PreTrainedModel) -> dict[str, int] | str:
    return "one number" if is_regression(model.config) else known_labels(model.config)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokens: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: str,
    teacher: PreTrainedModel | None = None,
) -> dict[str, float]:
    """What `output_scores` gives, n, the mean loss (cross-entropy in nats, in regression squared
    error), and milliseconds a sentence of the forward pass; beside a teacher what `teacher_scores`
    gives too.

    Batches are of similar length, so that padding costs little. Each is run RUNS times and its
    fastest run counts: what else the machine did meanwhile is not the model's.
    """
    model = model.eval().to(device)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    loader = DataLoader(
        tokens.select(by_length).remove_columns("index"),
        batch_size=batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    if teacher is not None:
        teacher = teacher.eval().to(device)
    seconds, outputs, labels, expected = 0.0, [], [], []
    for batch in tqdm(loader, desc="Evaluate", unit="batch"):
        labels.append(batch.pop("labels"))
        inputs = {name: value.to(device) for name, value in batch.items()}
        runs = []
        for _ in range(RUNS):
            _wait(device)
            start = time.perf_counter()
            logits = model(**inputs).logits.float()
            _wait(device)
            runs.append(time.perf_counter() - start)
        seconds += min(runs)
        outputs.append(logits.cpu())
        if teacher is not None:
            expected.append(teacher(**inputs).logits.float().cpu())
    given, wanted = torch.cat(outputs), torch.cat(labels)
    result = {
        "loss": float(label_loss(given, wanted)),
        **output_scores(given, wanted),
        "n": len(lengths),
        "milliseconds_per_sentence": 1000 * seconds / len(lengths),
    }
    return result if teacher is None else result | teacher_scores(given, torch.cat(expected))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
