"""`codir-fast evaluate`: accuracy, loss and latency of a classifier on labelled texts."""

import json
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from codir_fast.distillation import arguments as args
from codir_fast.distillation.data import (
    known_labels,
    label_ids,
    read_file,
    select_columns,
    tokenize,
)
from codir_fast.distillation.loading import load_tokenizer, load_trained_classifier
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
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` {self.device!r} can't be used: {error}") from None


def run(arguments: list[str]) -> int:
    """Prints one line of JSON: accuracy, n, loss, milliseconds_per_sentence; beside a teacher also
    agreement and kl.
    """
    classes = (EvaluateArguments, args.TextArguments)
    options, data = args.parse("evaluate", classes, arguments)
    args.check_file("test_file", options.test_file)
    name = options.model_name_or_path
    tokenizer = load_tokenizer("model_name_or_path", name)
    model = load_trained_classifier("model_name_or_path", name)
    examples = select_columns(read_file("test_file", options.test_file), "test_file", data)
    labels = label_ids(examples, "test_file", known_labels(model.config))
    teacher = None
    if options.teacher is not None:
        teacher = load_trained_classifier("teacher", options.teacher)
        _check_teacher(model, teacher, options.teacher)
    sides = [model] if teacher is None else [model, teacher]
    longest = min(
        getattr(side.config, "max_position_embeddings", data.max_seq_length) for side in sides
    )
    tokens = tokenize(examples, tokenizer, labels, data.max_seq_length, longest)
    result = evaluate(model, tokens, tokenizer, options.batch_size, options.device, teacher)
    print(json.dumps(result))
    return 0


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, name: str) -> None:
    """Both must read the same tokens and name the same classes."""
    for what, ours, theirs in (
        ("vocabulary", model.config.vocab_size, teacher.config.vocab_size),
        ("labels", known_labels(model.config), known_labels(teacher.config)),
    ):
        if ours != theirs:
            raise UsageError(
                f"`teacher` must have the model's {what}, {ours}, but {name} has {theirs}"
            )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    tokens: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: str,
    teacher: PreTrainedModel | None = None,
) -> dict[str, float]:
    """Accuracy, n, mean cross-entropy in nats, and milliseconds a sentence of the forward pass; of
    a teacher's outputs beside the model's: agreement, the share of sentences in which both choose
    the same class, and kl, the mean of KL(teacher || model) in nats.

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
    correct, loss, seconds, agreeing, kl = 0, 0.0, 0.0, 0, 0.0
    for batch in tqdm(loader, desc="Evaluate", unit="batch"):
        labels = batch.pop("labels").to(device)
        inputs = {name: value.to(device) for name, value in batch.items()}
        runs = []
        for _ in range(RUNS):
            _wait(device)
            start = time.perf_counter()
            logits = model(**inputs).logits.float()
            _wait(device)
            runs.append(time.perf_counter() - start)
        seconds += min(runs)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        if teacher is not None:
            expected = teacher(**inputs).logits.float()
            agreeing += int((logits.argmax(1) == expected.argmax(1)).sum())
            ours, theirs = (F.log_softmax(side, dim=1) for side in (logits, expected))
            kl += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
    n = len(lengths)
    result = {
        "accuracy": correct / n,
        "n": n,
        "loss": loss / n,
        "milliseconds_per_sentence": 1000 * seconds / n,
    }
    return result if teacher is None else result | {"agreement": agreeing / n, "kl": kl / n}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
