"""The contrastive term of a distillation: pooled layers of both sides, their heads, and the banks
of embeddings that hold the negatives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.distillation.config import DistillationConfig
from codir_fast.losses import ContrastiveLoss
from codir_fast.memory_bank import IndexedBank
from codir_fast.pooling import pool_hidden_states
from codir_fast.projection import ProjectionHead
from codir_fast.sampling import sample_negatives


class LayerContrast(nn.Module):
    """CoDIR: a student's embedding z_S must recognise the teacher's z_T of the same text.

    z = head(pooled hidden states of the mapped layers, side by side), of unit length. The negatives
    are rows of a bank with one row per training example, z_T as it last was. With `both_sides`
    z_T looks for z_S among a bank of those besides, and the term is the mean of the two.

    Args:
        config: how the term is made up.
        layers: student's and teacher's layer numbers, pairwise.
        widths: hidden sizes of student and teacher.
        labels: (num_examples,) integers, of the training examples.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.
    """

    def __init__(
        self,
        config: DistillationConfig,
        layers: tuple[list[int], list[int]],
        widths: tuple[int, int],
        labels: Tensor,
    ) -> None:
        super().__init__()
        self.config, (self.student_layers, self.teacher_layers) = config, layers
        width, dim = len(self.student_layers), config.projection_dim
        self.student_projection = ProjectionHead(width * widths[0], dim)
        self.teacher_projection = ProjectionHead(width * widths[1], dim)
        if config.head_init == "equal":
            if widths[0] != widths[1]:
                raise ValueError(
                    "`head_init` equal needs a student as wide as the teacher, got hidden sizes "
                    f"{widths[0]} and {widths[1]}"
                )
            self.student_projection.load_state_dict(self.teacher_projection.state_dict())
        for head in (self.student_projection, self.teacher_projection):
            head.requires_grad_(config.train_heads)
        self.bank = self._new_bank(labels)
        self.student_bank = self._new_bank(labels) if config.both_sides else None
        self.loss = self._new_loss(len(labels))
        self.teacher_loss = self._new_loss(len(labels)) if config.both_sides else None
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def _new_bank(self, labels: Tensor) -> IndexedBank:
        config = self.config
        bank = IndexedBank(
            len(labels), config.projection_dim, momentum=config.bank_momentum, labels=labels
        )
        if config.bank_init == "random":
            bank.update(torch.arange(len(labels)), torch.randn(bank.rows.shape))
        return bank

    def _new_loss(self, num_data: int) -> ContrastiveLoss:
        return ContrastiveLoss(
            self.config.temperature,
            objective=self.config.objective,
            normalize=False,  # both sides come out of their heads with unit length
            num_data=num_data if self.config.objective == "nce" else None,
        )

    def forward(
        self,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
        mask: Tensor,
        labels: Tensor,
        index: Tensor,
    ) -> Tensor:
        """The term, a scalar; the embeddings wait for `update_banks`.

        Args:
            student_states, teacher_states: hidden states (B, T, H) of all layers, the embeddings'
                output first.
            mask, labels, index: (B, T), (B,), (B,), as DistillationModel takes them.
        """
        pooling = self.config.pooling
        z_student = self.student_projection(
            pool_hidden_states(student_states, mask, mode=pooling, layers=self.student_layers)
        )
        z_teacher = self.teacher_projection(
            pool_hidden_states(teacher_states, mask, mode=pooling, layers=self.teacher_layers)
        )
        self._waiting.append((index, z_student.detach(), z_teacher.detach()))
        if not len(self.bank):  # nothing to tell apart from yet
            return 0.0 * z_student.sum()
        term = self._one_side(self.loss, z_student, z_teacher, self.bank, labels, index)
        if self.teacher_loss is None:
            return term
        other = self._one_side(
            self.teacher_loss, z_teacher, z_student, self.student_bank, labels, index
        )
        return (term + other) / 2

    def _one_side(
        self,
        loss: ContrastiveLoss,
        query: Tensor,
        positive: Tensor,
        bank: IndexedBank | None,
        labels: Tensor,
        index: Tensor,
    ) -> Tensor:
        assert bank is not None
        config = self.config
        if config.positive == "bank":
            there = bank.valid[index][:, None]
            positive = torch.where(there, bank.rows[index].to(positive.dtype), positive)
        picks: dict[str, Any] = {"exclude_index": index}
        if config.negatives == "other_labels":
            picks["labels"] = labels
        if config.num_negatives:
            picks["negative_index"] = self._draw(bank, labels)
            if picks["negative_index"] is None:
                return 0.0 * query.sum()
        return loss(query, positive, bank, **picks)

    def _draw(self, bank: IndexedBank, labels: Tensor) -> Tensor | None:
        """Rows for each query, (B, M), with replacement; None while a query has none to draw."""
        M = self.config.num_negatives
        if self.config.negatives == "all":
            filled = bank.valid.nonzero()[:, 0]
            size = (len(labels), M)
            return filled[torch.randint(len(filled), size, device=filled.device)]
        assert bank.labels is not None
        others = bank.labels[bank.valid][None, :] != labels.unique()[:, None]
        if not bool(others.any(1).all()):
            return None
        return sample_negatives(bank, labels, M, replacement=True)

    def update_banks(self) -> None:
        """Moves the rows of all examples seen since the last call to their embeddings."""
        for index, z_student, z_teacher in self._waiting:
            self.bank.update(index, z_teacher)
            if self.student_bank is not None:
                self.student_bank.update(index, z_student)
        self._waiting.clear()
