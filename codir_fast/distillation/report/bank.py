"""Statistics of the memory banks that a run has saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codir_fast.distillation.trainer import STATE_FILE
from codir_fast.errors import UsageError

BINS = 80  # of cosines, from -1 to 1
SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class BankStatistics:
    """Of one bank.

    Args:
        name: of its module.
        size, dim: rows, filled or not, and their width.
        filled: number of filled rows; the rest is about these.
        norms: mean, least and largest length.
        per_label: filled rows of each label; None where rows have none.
        within, between: mean cosine of two different rows of one label, and of two labels; None
            where there is no such pair. Without labels `between` is of any two rows.
        histograms: "one label", "two labels" -> share of pairs in each of BINS bins, over at most
            SAMPLED_ROWS rows; None where there is no such pair.
    """

    name: str
    size: int
    dim: int
    filled: int
    norms: tuple[float, float, float] | None
    per_label: dict[int, int] | None
    within: float | None
    between: float | None
    histograms: dict[str, Tensor | None]


def load_state(path: Path) -> dict[str, Tensor]:
    """Heads and banks of a run's folder; empty where it has none.

    Raises:
        UsageError: the file is damaged.
    """
    file = path / STATE_FILE
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} can't be read as safetensors: {error}") from error


def bank_statistics(path: Path) -> list[BankStatistics]:
    """Of each bank of a run's folder; none where it has none.

    Raises:
        UsageError: a bank is damaged, or holds rows that are not finite.
    """
    state = load_state(path)
    found = []
    for name in _banks(state):
        try:
            found.append(_statistics(name, state))
        except ValueError as error:
            raise UsageError(f"{path / STATE_FILE}: {error}") from error
    return found


def _banks(state: dict[str, Tensor]) -> Iterator[str]:
    for key in sorted(state):
        name = key.removesuffix(".rows")
        if name != key and f"{name}.valid" in state:
            yield name


def _statistics(name: str, state: dict[str, Tensor]) -> BankStatistics:
    rows, labels = _filled_rows(name, state)
    size, dim = state[f"{name}.rows"].shape
    norms = rows.norm(dim=1)
    unit = rows / norms.clamp_min(1e-12)[:, None]
    within, between = mean_cosines(unit, labels)
    counts = None if labels is None else labels.unique(return_counts=True)
    return BankStatistics(
        name=name.removeprefix("contrast."),
        size=size,
        dim=dim,
        filled=len(rows),
        norms=(float(norms.mean()), float(norms.min()), float(norms.max())) if len(rows) else None,
        per_label=None if counts is None else dict(zip(*(c.tolist() for c in counts), strict=True)),
        within=within,
        between=between,
        histograms=_histograms(unit, labels),
    )


def _filled_rows(name: str, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    rows, valid = state[f"{name}.rows"], state[f"{name}.valid"]
    labels, scale = (state.get(f"{name}.{part}") for part in ("row_labels", "row_scale"))
    for part in (valid, labels, scale):
        if rows.ndim != 2 or (part is not None and part.shape != rows.shape[:1]):
            raise ValueError(f"{name} must have rows (K, D), and (K,) of what belongs to them")
    valid = valid.bool()
    wide = rows.double()[valid]
    if scale is not None:
        wide = wide * scale.double()[valid, None]
    if not bool(wide.isfinite().all()):
        raise ValueError(f"{name} has rows that are not finite")
    return wide, None if labels is None else labels[valid]


def mean_cosines(unit: Tensor, labels: Tensor | None) -> tuple[float | None, float | None]:
    """Mean of u_i·u_j over i != j of one label, and of two labels, for unit rows u (N, D).

    The sum over all pairs of a set is |sum u|^2, the N pairs of a row with itself included.
    """
    N = len(unit)
    if labels is None:
        return None, _ratio(float(unit.sum(0).square().sum()) - N, N * N - N)
    kinds, place, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(kinds), unit.shape[1]).index_add_(0, place, unit)
    same = float(sums.square().sum())
    pairs = int(counts.square().sum())
    every = float(unit.sum(0).square().sum())
    return _ratio(same - N, pairs - N), _ratio(every - same, N * N - pairs)


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None


def _histograms(unit: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
    chosen = evenly(len(unit), SAMPLED_ROWS)
    unit = unit[chosen]
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    cosines = (unit @ unit.T)[first, second].clamp(-1, 1)
    if labels is None:
        return {"any two rows": _shares(cosines)}
    is_same = labels[chosen][first] == labels[chosen][second]
    return {"one label": _shares(cosines[is_same]), "two labels": _shares(cosines[~is_same])}


def _shares(cosines: Tensor) -> Tensor | None:
    if not len(cosines):
        return None
    return torch.histc(cosines, BINS, -1, 1) / len(cosines)


def evenly(total: int, count: int) -> Tensor:
    """At most `count` of `total` indices, spread evenly: files are often grouped by label."""
    return torch.arange(min(total, count)) * total // max(min(total, count), 1)
