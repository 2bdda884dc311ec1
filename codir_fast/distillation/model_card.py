"""README.md of a trained model: what it is, how to load it, what it was made from and how."""

import hashlib
import html
import re
from collections.abc import Sized
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, Trainer

from codir_fast.distillation.arguments import say
from codir_fast.distillation.checkpoint import replaced_files

CARD_FILE = "README.md"
# The last line of a card: the hash of all before it tells whether anyone has changed it since.
STAMP = "<!-- codir-fast {}: the next run into this folder replaces a card that is unchanged -->\n"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
ORIGINS = {
    "teacher": "distilled from",
    "student": "started from",
    "model_name_or_path": "fine-tuned from",
}
TRAINING = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "seed",
    "bf16",
    "fp16",
)
# Ends of the names of metrics that say how fast a run is, not what it has learnt.
SPEED = ("runtime", "per_second", "preparation_time")
CODE = """```python
from transformers import {auto_class}, AutoTokenizer

folder = "."  # of this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
tokens = tokenizer({text}, return_tensors="pt")
{answer}
```"""


class _Kind(NamedTuple):
    """Of a model: its name, its pipeline and class in transformers, and code that shows what it
    says of `tokens`.
    """

    noun: str
    pipeline_tag: str
    auto_class: str
    answer: str


CLASSIFIER = _Kind(
    "text classifier",
    "text-classification",
    "AutoModelForSequenceClassification",
    "print(model.config.id2label[int(model(**tokens).logits.argmax())])",
)
REGRESSOR = CLASSIFIER._replace(
    noun="text regressor", answer="print(model(**tokens).logits.item())"
)
LANGUAGE_MODEL = _Kind(
    "masked language model",
    "fill-mask",
    "AutoModelForMaskedLM",
    "masked = tokens.input_ids == tokenizer.mask_token_id\n"
    "print(tokenizer.decode(model(**tokens).logits[masked].argmax(-1)))",
)


def write_model_card(trainer: Trainer, run: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes README.md into the output folder, on the main process; leaves one that is not its own,
    or that was changed since.

    Args:
        run: what run.json holds.
        metrics: of the end of the run; those of the evaluation begin with eval_.
    """
    if not trainer.is_world_process_zero():
        return
    directory = Path(str(trainer.args.output_dir))
    path = directory / CARD_FILE
    if path.exists() and not _is_ours(path):
        say(f"{path} is left as it is: codir-fast did not write it, or it was changed since")
        return
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    sets = trainer.train_dataset, trainer.eval_dataset
    sizes = (len(part) if isinstance(part, Sized) else None for part in sets)
    text = model_card(getattr(model, "student", model), run, metrics, *sizes)
    with replaced_files(directory) as files:
        (files / CARD_FILE).write_text(text + STAMP.format(_hash(text)), encoding="utf-8")


def _is_ours(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return False
    return lines[-1:] == [STAMP.format(_hash("".join(lines[:-1])))]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(
    model: PreTrainedModel,
    run: dict[str, Any],
    metrics: dict[str, Any],
    train_size: int | None,
    eval_size: int | None,
) -> str:
    """The text of the card, a YAML header that the hub reads and Markdown.

    Args:
        run, metrics: as `write_model_card` takes them.
        train_size, eval_size: numbers of examples; None where that is not known.
    """
    settings, command, kind = run["settings"], run["command"], _kind_of(model)
    data, measured = settings["data"], _measured(metrics)
    origins = {flag: name for flag in ORIGINS if (name := settings["model"].get(flag))}
    layers, size = model.config.num_hidden_layers, sum(p.numel() for p in model.parameters())
    made = " and ".join(f"{ORIGINS[flag]} {_origin(name)}" for flag, name in origins.items())
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    sections = [
        _header(kind, command, origins, data, measured),
        f"# {escaped(model.config.model_type)} {kind.noun}, {layers} layers",
        f"A {kind.noun} of {size / 1e6:.1f} million parameters in {layers} layers, {made} by "
        "codir-fast (contrastive distillation, [CoDIR](https://arxiv.org/abs/2009.14167)).",
        f"## Use\n{_code(kind, data)}",
        *_labels(kind, model),
        f"## Training\nOn {_source(data, 'train_file', 'training examples', train_size)}.",
        _table("setting", _shown(settings)),
        f"`run.json` holds every setting of the command `codir-fast {command}`.",
        *_evaluation(measured, data, eval_size),
        f"## Versions\n{escaped(versions)}",
    ]
    return "\n\n".join(sections) + "\n\n"


def _kind_of(model: PreTrainedModel) -> _Kind:
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return LANGUAGE_MODEL
    return REGRESSOR if model.config.num_labels == 1 else CLASSIFIER


def _measured(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of the evaluation that say something about the model."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(SPEED)
    }


def _header(
    kind: _Kind,
    command: str,
    origins: dict[str, str],
    data: dict[str, Any],
    measured: dict[str, float],
) -> str:
    models = [name for name in origins.values() if _is_on_hub(name)]
    data_sets = [name for name in [data.get("dataset_name")] if name and _is_on_hub(name)]
    tags = ["knowledge-distillation", "codir"] if "teacher" in origins else []
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=[command, "codir-fast", *tags],
        base_model=models[0] if len(models) == 1 else models or None,
        datasets=data_sets or None,
        metrics=[name for name in measured if name != "loss"] or None,
    )
    return f"---\n{header.to_yaml()}\n---"


def _is_on_hub(name: str) -> bool:
    return not Path(name).exists() and HUB_NAME.fullmatch(name) is not None


def _origin(name: str) -> str:
    """A link to the hub; of a folder its name alone: the rest is the machine's."""
    if _is_on_hub(name):
        return f"[{escaped(name)}](https://huggingface.co/{name})"
    return f"a model in the folder {escaped(Path(name).resolve().name)}"


def _code(kind: _Kind, data: dict[str, Any]) -> str:
    text = '"A text."'
    if kind is LANGUAGE_MODEL:
        text = 'f"A {tokenizer.mask_token}."'
    elif data.get("text_pair_column"):
        text = '"A text.", "Another."'
    return CODE.format(auto_class=kind.auto_class, text=text, answer=kind.answer)


def _labels(kind: _Kind, model: PreTrainedModel) -> list[str]:
    names = (model.config.id2label or {}).values()
    listed = ", ".join(escaped(str(name)) for name in names)
    return [f"Labels: {listed}."] if kind is CLASSIFIER else []


def _source(data: dict[str, Any], flag: str, otherwise: str, size: int | None) -> str:
    """The name of a file without its folder, or of the data set; and how many examples."""
    if data.get(flag):
        name = Path(str(data[flag])).name
    else:
        name = str(data.get("dataset_name") or otherwise)
    return escaped(name) + ("" if size is None else f", {size} examples")


def _shown(settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    chosen = settings.get("distillation", {}) | {
        name: settings["training"][name] for name in TRAINING
    }
    chosen["max_seq_length"] = settings["data"].get("max_seq_length")
    return {name: escaped(str(value)) for name, value in chosen.items() if value is not None}


def _evaluation(measured: dict[str, float], data: dict[str, Any], size: int | None) -> list[str]:
    if not measured:
        return []
    source = _source(data, "validation_file", "validation examples", size)
    table = _table("metric", {name: f"{value:.4f}" for name, value in measured.items()})
    return [f"## Evaluation\nAt the end of the run, on {source}:", table]


def _table(head: str, rows: dict[str, str]) -> str:
    lines = [f"| {head} | value |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {value} |" for name, value in rows.items()])


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line. An underscore within a word means nothing to
    Markdown, and stays readable.
    """
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain)
