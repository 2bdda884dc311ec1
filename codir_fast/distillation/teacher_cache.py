"""The teacher's outputs on the training examples, computed once and kept on disk as Arrow.

In fine-tuning the texts are fixed and the teacher is deterministic. A cache is a folder named by a
hash of all that its numbers depend on, which made_from.json tells: outputs.arrow and a manifest.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from codir_fast.distillation.arguments import say
from codir_fast.distillation.data import telling_full_disk
from codir_fast.distillation.fingerprint import INPUTS, canonical, hash_tokens, hash_weights
from codir_fast.distillation.manifest import verify, write_manifest
from codir_fast.distillation.model import DistillationModel

FORMAT = 1  # of the files; another number makes other folders
COLUMNS = ("teacher_logits", "teacher_features")
OUTPUTS, MADE_FROM = "outputs.arrow", "made_from.json"
# Batches that are read together and sorted by length, so that padding costs little.
BATCHES_TOGETHER = 64


class TeacherCollator(DataCollatorWithPadding):
    """Pads tokens; the teacher's cached outputs, tensors already, are stacked."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        cached = {
            name: torch.stack([row.pop(name) for row in rows])
            for name in COLUMNS
            if name in rows[0]
        }
        return {**super().__call__(rows), **cached}


def default_directory() -> Path:
    """codir_fast/teacher in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "codir_fast/teacher"


def with_teacher_outputs(
    model: DistillationModel,
    tokens: Dataset,
    collator: Callable[[list[dict[str, Any]]], Any],
    *,
    directory: Path,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    turns: Sequence[bool] = (True,),
    wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """`tokens` with the columns teacher_logits (C,) and, where a term compares layers,
    teacher_features (L*H,), float32: what `model.teacher_outputs` gives for each example.

    Args:
        model: has the teacher, the mapped layers and the pooling.
        tokens: training examples as `tokenize` gives them.
        collator: makes a batch of rows.
        directory: of caches; the one that fits is used if it is whole, else made.
        batch_size: texts that the teacher reads together.
        device, dtype: where and in which precision the teacher runs (autocast below float32).
        turns: whether this process makes what is missing when its turn comes; of several, one
            after the other, as they may share a disk.
        wait: returns once every process has called it.

    Raises:
        ValueError: an output of the teacher is not finite.
    """
    parts = _parts(model, tokens, dtype)
    key = hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]
    folder = directory / key
    for is_mine in turns:
        fault = _fault(folder, parts) if is_mine else None
        if fault is not None:
            if folder.exists():
                say(f"the teacher cache {folder} {fault}; it is made again")
            outputs = _Outputs(model, collator, batch_size, device, dtype)
            _make(folder, parts, tokens, outputs)
        wait()
    cached = Dataset.from_file(str(folder / OUTPUTS))
    names = cached.column_names
    joined = concatenate_datasets([tokens, cached], axis=1)
    return joined.with_format("torch", columns=names, output_all_columns=True)


class _Outputs:
    """Rows of tokens -> columns of the teacher's outputs, in the rows' order."""

    def __init__(
        self,
        model: DistillationModel,
        collator: Callable[[list[dict[str, Any]]], Any],
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.collator, self.batch_size = model, collator, batch_size
        self.device, self.dtype = device, dtype
        torch.nn.Module.to(model.teacher, device)

    def __call__(self, columns: dict[str, list]) -> dict[str, numpy.ndarray]:
        names = [name for name in INPUTS if name in columns]
        lengths = [len(ids) for ids in columns["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        parts = []
        for start in range(0, len(order), self.batch_size):
            wanted = order[start : start + self.batch_size]
            batch = self.collator([{name: columns[name][n] for name in names} for n in wanted])
            parts.append(self._run({name: batch[name].to(self.device) for name in names}))
        back = torch.tensor(order).argsort()
        found = {
            name: torch.cat(column)[back]
            for name, column in zip(COLUMNS, zip(*parts, strict=True), strict=True)
            if column[0] is not None
        }
        for values in found.values():
            if not bool(values.isfinite().all()):
                row = int((~values.isfinite()).any(1).nonzero()[0])
                raise ValueError(
                    "`teacher` must give finite outputs, it does not for training example "
                    f"{columns['index'][row]}"
                )
        return {name: values.numpy() for name, values in found.items()}

    def _run(self, inputs: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.model.teacher_outputs(**inputs)
        return tuple(None if values is None else values.float().cpu() for values in outputs)


def _make(folder: Path, parts: dict[str, Any], tokens: Dataset, outputs: _Outputs) -> None:
    """The folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        sample = outputs(tokens[:1])
        features = {
            name: List(Value("float32"), length=values.shape[1]) for name, values in sample.items()
        }
        with telling_full_disk():
            tokens.map(
                outputs,
                batched=True,
                batch_size=BATCHES_TOGETHER * outputs.batch_size,
                remove_columns=tokens.column_names,
                features=Features(features),
                cache_file_name=str(partial / OUTPUTS),
                load_from_cache_file=False,
                new_fingerprint=folder.name,  # else datasets pickles the teacher to find one
                desc="Teacher",
            )
        (partial / MADE_FROM).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
        write_manifest(partial, 0)
        _put(partial, folder, parts)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put(partial: Path, folder: Path, parts: dict[str, Any]) -> None:
    """Another run may have made the same meanwhile, and read it: what is whole stays."""
    if folder.exists() and _fault(folder, parts) is not None:
        shutil.rmtree(folder)
    try:
        partial.rename(folder)
    except OSError:
        if _fault(folder, parts) is not None:
            raise
        shutil.rmtree(partial)


def _fault(folder: Path, parts: dict[str, Any]) -> str | None:
    """Why the cache can't be used; None if it can."""
    try:
        verify(folder)
        made_from = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"is damaged: {error}"
    return None if made_from == parts else "is of another teacher or other texts"


def _parts(model: DistillationModel, tokens: Dataset, dtype: torch.dtype) -> dict[str, Any]:
    """All that the outputs depend on. The tokens stand for texts, tokenizer and length."""
    sees_layers = model.sees_layers
    return {
        "format": FORMAT,
        "teacher": hash_weights(model.teacher),
        "config": _config_of(model.teacher),
        "tokens": hash_tokens(tokens),
        "layers": model.teacher_layers if sees_layers else [],
        "pooling": model.distillation_config.pooling if sees_layers else "",
        "dtype": str(dtype),
    }


def _config_of(teacher: PreTrainedModel) -> str:
    config = teacher.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # where it lay, who wrote it
        config.pop(name, None)
    return canonical(config)
