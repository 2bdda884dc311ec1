"""Standardisation of pooled features over the training examples, of all ranks together."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codir_fast.distillation.config import LayerConfig

Moments: TypeAlias = tuple[Tensor, Tensor]  # mean and deviation of each feature


class Standardization(nn.Module):
    """(x - mean) / deviation of each of `size` features; the identity unless the run standardises.
    Buffers, NaN until they are set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, size: int, config: LayerConfig) -> None:
        super().__init__()
        self.is_used = config.standardize_features
        self._is_set = not self.is_used
        if self.is_used:
            self.register_buffer("mean", torch.full((size,), torch.nan))
            self.register_buffer("deviation", torch.full((size,), torch.nan))

    @property
    def is_missing(self) -> bool:
        if not self._is_set:  # asked until it is: a GPU is waited for
            self._is_set = not bool(self.mean.isnan().any())
        return not self._is_set

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.deviation if self.is_used else rows


class _Moments:
    """Mean and deviation of rows (N, size) that come in batches, in float64."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(3, size, dtype=torch.float64)  # of 1, x and x^2

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().to(torch.float64)
        ones = torch.full_like(rows[:1].sum(0), len(rows))
        self.sums = self.sums.to(rows.device)
        self.sums += torch.stack([ones, rows.sum(0), rows.square().sum(0)])

    def result(self, process_group: Any, device: torch.device) -> Moments:
        """A deviation of 0 becomes 1: such a feature is 0 once its mean is off."""
        sums = self.sums.to(device)
        if process_group is not None:
            dist.all_reduce(sums, group=process_group)
        count, total, squares = sums
        mean = total / count
        variance = (squares / count - mean * mean).clamp_min(0)
        small = variance <= 1e-12 * (mean * mean + 1e-12)
        return mean, variance.sqrt().masked_fill(small, 1)


def both_moments(
    features: Iterable[tuple[Tensor | None, Tensor]],
    widths: tuple[int, int],
    process_group: Any,
    device: torch.device,
) -> tuple[Moments, Moments]:
    """Mean and deviation of student's and teacher's features, of all ranks; the teacher's twice
    where it has the student's width.

    Args:
        features: batches (B, L*H) of this rank, of each side.
        widths: L*H of each side.
        device: where the ranks talk to each other.
    """
    student, teacher = (_Moments(width) for width in widths)
    for student_rows, teacher_rows in features:
        teacher.add(teacher_rows)
        if student_rows is not None:
            student.add(student_rows)
    of_teacher = teacher.result(process_group, device)
    if widths[0] == widths[1]:
        return of_teacher, of_teacher
    return student.result(process_group, device), of_teacher
