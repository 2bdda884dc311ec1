"""Models and tokenizers from a folder or the hub: safetensors only, no code of theirs is run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from codir_fast.distillation.encoders import encoder_fault
from codir_fast.distillation.manifest import is_inside
from codir_fast.distillation.objectives import check_task
from codir_fast.errors import UsageError

# In float32 whatever they are stored in: --bf16 and --fp16 say how a run computes.
OF_WEIGHTS: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}


def load_tokenizer(flag: str, name: str) -> PreTrainedTokenizerBase:
    _check_encoder(flag, name)  # before what its tokenizer lacks: that of GPT-2 has no pad token
    tokenizer = _load(flag, name, AutoTokenizer)
    # Without its files, transformers makes an empty one: every word would be unknown.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UsageError(f"`{flag}` must have a tokenizer, {name} has no vocabulary")
    if tokenizer.pad_token is None:
        raise UsageError(f"`{flag}` must have a tokenizer with a pad token, {name} names none")
    return tokenizer


def check_same_words(flag: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError where a checkpoint has a tokenizer that numbers tokens in another way than
    `tokenizer`: its embeddings would be those of other words.
    """
    try:
        own = load_tokenizer(flag, name).get_vocab()
    except UsageError:  # none, as beside many weights
        return
    words = tokenizer.get_vocab()
    if own != words:
        word = min(w for w in own.keys() | words.keys() if own.get(w) != words.get(w))
        raise UsageError(
            f"`{flag}` must number tokens as {tokenizer.name_or_path} does: {word!r} is "
            f"{own.get(word)} in {name}, and {words.get(word)} there"
        )


def load_config(flag: str, name: str) -> PretrainedConfig:
    return _load(flag, name, AutoConfig)


def _check_encoder(flag: str, name: str) -> None:
    """By the configuration alone: the weights of a decoder may be large."""
    if fault := encoder_fault(load_config(flag, name)):
        raise UsageError(f"`{flag}` must be an encoder, {name} {fault}")


def load_classifier(flag: str, name: str, **options: Any) -> Any:
    """A sequence classifier; its classifier may be new, where the checkpoint has none."""
    _check_encoder(flag, name)
    return _load(flag, name, AutoModelForSequenceClassification, **OF_WEIGHTS, **options)


def load_new_classifier(flag: str, name: str, **options: Any) -> PreTrainedModel:
    """A sequence classifier whose layers come from the checkpoint; what follows them may be new, or
    replace that of another number of classes.
    """
    model, report = load_classifier(
        flag, name, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    _check_layers(flag, name, model, report)
    return model


def _check_layers(flag: str, name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises UsageError where weights of the layers, or embeddings, are not the checkpoint's."""
    mismatched = [key[0] for key in report.get("mismatched_keys", ())]  # and two shapes
    absent = [
        key
        for key in sorted({*report["missing_keys"], *mismatched})
        if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key
    ]
    if absent:
        raise UsageError(
            f"`{flag}` must hold the weights of its layers, {name} has other sizes than its "
            f"config.json says, or none, of {_first_few(absent)}"
        )


def _first_few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def load_trained_classifier(flag: str, name: str) -> PreTrainedModel:
    """A sequence classifier all of whose weights come from the checkpoint."""
    model, report = load_classifier(flag, name, output_loading_info=True)
    if report["missing_keys"]:
        raise UsageError(
            f"`{flag}` must be a fine-tuned classifier, {name} lacks "
            f"{', '.join(sorted(report['missing_keys']))}; run codir-fast finetune first"
        )
    try:
        check_task(flag, model.config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return model


def load_encoder(flag: str, name: str) -> PreTrainedModel:
    """The layers of a model of any task, all of whose weights come from the checkpoint; a pooler
    may be new, which no hidden state depends on.
    """
    _check_encoder(flag, name)
    model, report = _load(flag, name, AutoModel, **OF_WEIGHTS, output_loading_info=True)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise UsageError(f"`{flag}` must be a trained encoder, {name} lacks {', '.join(missing)}")
    return model


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Puts the weights that `save_pretrained` wrote into a model of the same class.

    Raises:
        ValueError: they are of another model, or not all of them.
    """
    check_index(directory)
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(
        directory, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    for what, names in report.items():
        if names:
            raise ValueError(f"{what.replace('_', ' ')}: {_first_few(sorted(map(str, names)))}")
    _check_shapes(loaded.state_dict(), model.state_dict())
    model.load_state_dict(loaded.state_dict())


def _check_shapes(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises ValueError where the two are of models of other layers, widths or classes."""
    texts = (
        ("has weights that this run's model has not", sorted(saved.keys() - own.keys())),
        ("lacks weights of this run's model", sorted(own.keys() - saved.keys())),
        (
            "has weights of other sizes than this run's model",
            [
                f"{name} is {tuple(saved[name].shape)}, here {tuple(own[name].shape)}"
                for name in own
                if name in saved and saved[name].shape != own[name].shape
            ],
        ),
    )
    for text, names in texts:
        if names:
            raise ValueError(f"its model {text}: {_first_few(names)}")


def check_index(directory: Path) -> None:
    """Raises ValueError for an index of weights that names files outside of its folder."""
    path = directory / SAFE_WEIGHTS_INDEX_NAME
    if not path.exists():
        return
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} holds no weight_map") from error
    for name in names:
        if not isinstance(name, str) or not is_inside(name):
            raise ValueError(f"{path.name} names {name}, outside of the folder")


def load_masked_lm(flag: str, name: str) -> tuple[PreTrainedModel, list[str]]:
    """A masked language model, and which of its weights are new: not in the checkpoint."""
    _check_encoder(flag, name)
    model, report = _load(flag, name, AutoModelForMaskedLM, **OF_WEIGHTS, output_loading_info=True)
    _check_layers(flag, name, model, report)
    return model, sorted(report["missing_keys"])


def load_trained_masked_lm(flag: str, name: str) -> PreTrainedModel:
    """A masked language model all of whose weights come from the checkpoint."""
    model, missing = load_masked_lm(flag, name)
    if missing:
        raise UsageError(
            f"`{flag}` must be a masked language model, {name} lacks {', '.join(missing)}; give it "
            f"a head first: codir-fast pretrain --student {name} --train_file TEXTS --output_dir "
            "NEW, and take NEW"
        )
    return model


def _load(flag: str, name: str, kind: Any, **options: Any) -> Any:
    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").is_file():
        raise UsageError(f"`{flag}` must be a model, the folder {name} has no config.json")
    if not is_folder and (Path(name).is_absolute() or name.startswith((".", "~"))):
        raise UsageError(f"`{flag}` must be a model's folder or hub name, there is no {name}")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing is told by the callers, in one line
    if is_folder:  # nothing to wait for; a download keeps its bar
        logging.disable_progress_bar()
    try:
        if is_folder:
            check_index(Path(name))
        return kind.from_pretrained(
            name, trust_remote_code=False, local_files_only=is_folder, **options
        )
    except RuntimeError as error:
        raise UsageError(
            f"`{flag}` {name} has weights of other sizes than its config.json"
        ) from error
    except (AttributeError, TypeError) as error:  # of a configuration with values of other types
        raise UsageError(
            f"`{flag}` can't be loaded from {name}, a value in its files is of another type: "
            f"{error}"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"`{flag}` can't be loaded from {name}: {first}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
