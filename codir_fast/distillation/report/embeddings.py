"""Student's and teacher's embeddings of the same texts, and their first two components."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from codir_fast.distillation.arguments import TextArguments
from codir_fast.distillation.config import DistillationConfig, PretrainingConfig
from codir_fast.distillation.layer_mapping import layer_pairs
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import load_encoder, load_tokenizer
from codir_fast.distillation.report.bank import load_state
from codir_fast.distillation.report.runs import Run, read_json
from codir_fast.distillation.trainer import STATE_FILE
from codir_fast.errors import UsageError
from codir_fast.pooling import pool_hidden_states

CONFIGURATIONS = DistillationConfig.FILE_NAME, PretrainingConfig.FILE_NAME
HEAD = "student_projection.linear.weight"


@dataclass(frozen=True)
class Embeddings:
    """Of one run.

    Args:
        student, teacher: (N, D), unit rows of the same texts.
        same, other: mean cosine of a text's two embeddings, and of two texts' (None for one text).
        found: share of texts whose student's embedding is nearest to their own teacher's.
    """

    student: Tensor
    teacher: Tensor
    same: float
    other: float | None
    found: float

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> "Embeddings":
        cosines = student @ teacher.T
        N = len(cosines)
        same, total = float(cosines.diagonal().mean()), float(cosines.sum())
        other = (total - N * same) / (N * N - N) if N > 1 else None
        found = float((cosines.argmax(1) == torch.arange(N)).double().mean())
        return cls(student, teacher, same, other, found)


def has_heads(run: Run) -> bool:
    """Whether the run has saved the projection heads of a contrastive term."""
    return any(name.endswith(HEAD) for name in load_state(run.path))


@torch.inference_mode()
def embed(
    run: Run, teacher: str, texts: Dataset, data: TextArguments, batch_size: int, device: str
) -> Embeddings:
    """z of both sides: pooled hidden states of the mapped layers, standardised where the run does
    so, through their head, of unit length. With a contrastive term for each layer, its embeddings
    side by side, so that a cosine is the mean of the layers' cosines.

    Args:
        run: has a student and heads.
        teacher: folder or hub name of the teacher's model.
        texts: with the column text and, for pairs, pair.
        data: how the texts are read.

    Raises:
        UsageError: the teacher is not the run's, or a file is damaged.
    """
    student_encoder = load_encoder("runs", str(run.path)).eval().to(device)
    teacher_encoder = load_encoder("teacher", teacher).eval().to(device)
    tokenizer = load_tokenizer("runs", str(run.path))
    settings, state = _layer_settings(run), load_state(run.path)
    mapping, mode = str(settings.get("layer_mapping")), str(settings.get("pooling"))
    encoders = student_encoder, teacher_encoder
    longest = longest_text(data, tokenizer, *encoders)
    batches = _batches(texts, tokenizer, longest, batch_size)
    try:
        depths = [encoder.config.num_hidden_layers for encoder in encoders]
        layers = list(zip(*layer_pairs(mapping, depths[0], depths[1]), strict=True))
        features = [
            _features(encoder, batches, list(side), mode)
            for encoder, side in zip(encoders, layers, strict=True)
        ]
        heads = sorted((n.removesuffix(HEAD) for n in state if n.endswith(HEAD)), key=_layer)
        student, teacher_rows = (
            _project(rows, side, heads, state)
            for rows, side in zip(features, ("student", "teacher"), strict=True)
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise UsageError(
            f"`teacher` {teacher} and {run.path / STATE_FILE} do not fit each other: {error}"
        ) from error
    return Embeddings.of(student, teacher_rows)


def _layer_settings(run: Run) -> dict[str, Any]:
    files = [run.path / name for name in CONFIGURATIONS]
    return read_json(next((file for file in files if file.is_file()), files[0]))


def _batches(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, longest: int, batch_size: int
) -> list[dict[str, Tensor]]:
    pairs = texts["pair"] if "pair" in texts.column_names else [None] * len(texts)
    rows: Any = [
        tokenizer(text, pair, truncation=True, max_length=longest)
        for text, pair in zip(texts["text"], pairs, strict=True)
    ]
    collate: Any = DataCollatorWithPadding(tokenizer)
    return list(DataLoader(rows, batch_size=batch_size, collate_fn=collate))


def _features(
    encoder: PreTrainedModel, batches: Sequence[dict[str, Tensor]], layers: list[int], mode: str
) -> Tensor:
    """Pooled hidden states of these layers, side by side, (N, L*H)."""
    found = []
    for batch in batches:
        inputs = {name: value.to(encoder.device) for name, value in batch.items()}
        states = encoder(**inputs, output_hidden_states=True).hidden_states
        found.append(
            pool_hidden_states(states, inputs["attention_mask"], mode=mode, layers=layers).cpu()
        )
    return torch.cat(found).float()


def _layer(prefix: str) -> list[int]:
    """Its numbers: contrast.layers.10 comes after contrast.layers.2."""
    return [int(part) for part in prefix.split(".") if part.isdecimal()]


def _project(rows: Tensor, side: str, heads: list[str], state: dict[str, Tensor]) -> Tensor:
    """Features (N, L*H) through the run's heads; of unit length over all heads."""
    found = []
    for prefix, part in zip(heads, rows.chunk(len(heads), dim=1), strict=True):
        mean = state.get(f"{prefix}{side}_features.mean")
        if mean is not None:
            part = (part - mean) / state[f"{prefix}{side}_features.deviation"]
        linear = f"{prefix}{side}_projection.linear"
        z = F.linear(part, state[f"{linear}.weight"].float(), state[f"{linear}.bias"].float())
        found.append(F.normalize(z, dim=1))
    return F.normalize(torch.cat(found, dim=1), dim=1).double()


def first_two_components(rows: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Coordinates (N, 2) of rows (N, D) on the two directions in which they vary most, and the
    share of their variance that each has.
    """
    centred = rows - rows.mean(0)
    U, S, V = torch.linalg.svd(centred, full_matrices=False)
    coordinates = torch.zeros(len(rows), 2, dtype=rows.dtype)
    kept = min(2, len(S))
    # A sign that does not depend on the solver: the largest weight of a direction is positive.
    largest = V[:kept].gather(1, V[:kept].abs().argmax(1, keepdim=True))[:, 0]
    coordinates[:, :kept] = U[:, :kept] * S[:kept] * largest.sign()
    shares = torch.zeros(2, dtype=rows.dtype)
    shares[:kept] = S[:kept].square() / S.square().sum().clamp_min(1e-30)
    return coordinates, (float(shares[0]), float(shares[1]))
