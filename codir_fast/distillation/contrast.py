"""The contrastive term of a distillation: pooled layers of both sides, their heads, and the banks
of embeddings that hold the negatives.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from codir_fast.distillation.config import DistillationConfig, LayerConfig, PretrainingConfig
from codir_fast.distillation.standardization import Moments, Standardization, both_moments
from codir_fast.losses import ContrastiveLoss
from codir_fast.memory_bank import IndexedBank, MemoryQueue
from codir_fast.projection import ProjectionHead
from codir_fast.sampling import sample_negatives

Bank: TypeAlias = IndexedBank | MemoryQueue
Examples: TypeAlias = dict[str, Tensor]  # what a bank asks of each example, (B,) each


class LayerContrast(nn.Module):
    """CoDIR: a student's embedding z_S must recognise the teacher's z_T of the same text.

    z = head(pooled hidden states of the mapped layers, side by side), of unit length; the run may
    standardise what the head sees. The negatives are rows of a bank of z_T, which the subclass
    chooses. With `both_sides` z_T looks for z_S among a bank of those besides, and the term is the
    mean of the two.

    Args:
        config: how the term is made up.
        widths: features of student and teacher, L*H each.
        new_bank: makes a bank.
        process_group: ranks that train together and share the banks, see codir_fast.distributed.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.
    """

    def __init__(
        self,
        config: LayerConfig,
        widths: tuple[int, int],
        new_bank: Callable[[], Bank],
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.widths, self.process_group = config, widths, process_group
        self.student_projection = ProjectionHead(widths[0], config.projection_dim)
        self.teacher_projection = ProjectionHead(widths[1], config.projection_dim)
        if config.head_init == "equal":
            self.student_projection.load_state_dict(self.teacher_projection.state_dict())
        for head in (self.student_projection, self.teacher_projection):
            head.requires_grad_(config.train_heads)
        self.student_features = Standardization(widths[0], config)
        self.teacher_features = Standardization(widths[1], config)
        self.bank = new_bank()
        self.student_bank = new_bank() if config.both_sides else None
        self.loss = self._new_loss()
        self.teacher_loss = self._new_loss() if config.both_sides else None
        self._waiting: list[tuple[Tensor, Tensor, Examples]] = []
        self._has_rows = False

    def _new_loss(self) -> ContrastiveLoss:
        is_nce = self.config.objective == "nce"
        return ContrastiveLoss(
            self.config.temperature,
            objective=self.config.objective,
            normalize=False,  # both sides come out of their heads with unit length
            num_data=self.bank.size if is_nce else None,
            process_group=self.process_group,
        )

    @property
    def needs_features(self) -> bool:
        """Whether `fit_features` must be called before training."""
        return self.teacher_features.is_missing

    def fit_features(self, features: Iterable[tuple[Tensor | None, Tensor]]) -> None:
        """Takes mean and deviation from batches of both sides' features, (B, L*H) each; of the
        teacher's alone where it has the student's width.
        """
        device = self.teacher_features.mean.device
        self.set_features(*both_moments(features, self.widths, self.process_group, device))

    def set_features(self, student: Moments, teacher: Moments) -> None:
        self.student_features.set(*student)
        self.teacher_features.set(*teacher)

    def forward(self, student: Tensor, teacher: Tensor, **examples: Tensor) -> Tensor:
        """The term, a scalar; the embeddings wait for `update_banks`.

        Args:
            student, teacher: features (B, L*H), pooled mapped layers side by side.
            examples: what the bank asks of each example, (B,) each.
        """
        dtype = self.student_projection.linear.weight.dtype
        if not torch.is_autocast_enabled(student.device.type):  # models may be of another
            student, teacher = student.to(dtype), teacher.to(dtype)
        z_student = self.student_projection(self.student_features(student))
        z_teacher = self.teacher_projection(self.teacher_features(teacher))
        self._waiting.append((z_student.detach(), z_teacher.detach(), examples))
        self._has_rows = self._has_rows or not self.bank.is_empty()
        if not self._has_rows:  # nothing to tell apart from yet
            # Of both heads: DistributedDataParallel waits for the gradients of all parameters.
            return 0.0 * (z_student.sum() + z_teacher.sum())
        term = self._one_side(self.loss, z_student, z_teacher, self.bank, examples)
        if self.teacher_loss is None:
            return term
        other = self._one_side(self.teacher_loss, z_teacher, z_student, self.student_bank, examples)
        return (term + other) / 2

    def _one_side(
        self,
        loss: ContrastiveLoss,
        query: Tensor,
        positive: Tensor,
        bank: Bank | None,
        examples: Examples,
    ) -> Tensor:
        picks = self._picks(bank, len(query), examples)
        if picks is None:
            return 0.0 * (query.sum() + positive.sum())
        return loss(query, self._positive(bank, positive, examples), bank, **picks)

    def _picks(self, bank: Any, B: int, examples: Examples) -> dict[str, Any] | None:
        """The arguments of the loss that choose B queries' negatives; None if there are none."""
        raise NotImplementedError

    def _positive(self, bank: Any, positive: Tensor, examples: Examples) -> Tensor:
        return positive

    def _draw_filled(self, bank: Bank, B: int) -> Tensor:
        """num_negatives filled rows for each of B queries, with replacement, (B, M)."""
        (valid,) = bank.of_all_rows("drawing of negatives", bank.valid)
        filled = valid.nonzero()[:, 0]
        size = (B, self.config.num_negatives)
        return filled[torch.randint(len(filled), size, device=filled.device)]

    def update_banks(self) -> None:
        """Takes the embeddings of all examples seen since the last call, in their order."""
        for z_student, z_teacher, examples in self._waiting:
            self._write(self.bank, z_teacher, examples)
            if self.student_bank is not None:
                self._write(self.student_bank, z_student, examples)
        self.forget_waiting()

    def forget_waiting(self) -> None:
        """Lets go the embeddings that wait for `update_banks`: their step is not taken."""
        self._waiting.clear()

    def _write(self, bank: Any, keys: Tensor, examples: Examples) -> None:
        raise NotImplementedError


class BankContrast(LayerContrast):
    """LayerContrast with a row of the bank for each training example, z_T as it last was, and its
    label; each call takes `labels` and `index`, as DistillationModel does.

    Args:
        labels: (num_examples,) integers, of the training examples.
        process_group: as for LayerContrast.
    """

    config: DistillationConfig

    def __init__(
        self,
        config: DistillationConfig,
        widths: tuple[int, int],
        labels: Tensor,
        process_group: Any = None,
    ) -> None:
        def new_bank() -> IndexedBank:
            num_rows, dim = len(labels), config.projection_dim
            bank = IndexedBank(
                num_rows,
                dim,
                momentum=config.bank_momentum,
                labels=labels,
                process_group=process_group,
            )
            if config.bank_init == "random":
                bank.update(*_of_rank(bank, torch.arange(num_rows), torch.randn(num_rows, dim)))
            return bank

        super().__init__(config, widths, new_bank, process_group)
        self._can_draw = False

    def _picks(self, bank: IndexedBank, B: int, examples: Examples) -> dict[str, Any] | None:
        picks = {"exclude_index": examples["index"]}
        if self.config.negatives == "other_labels":
            picks["labels"] = examples["labels"]
        if self.config.num_negatives:
            drawn = self._draw(bank, examples["labels"])
            if drawn is None:
                return None
            picks["negative_index"] = drawn
        return picks

    def _draw(self, bank: IndexedBank, labels: Tensor) -> Tensor | None:
        """Rows for each query, (B, M), with replacement; None while the bank has one label."""
        if self.config.negatives == "all":
            return self._draw_filled(bank, len(labels))
        self._can_draw = self._can_draw or self._has_two_labels(bank)
        if not self._can_draw:  # a query may have no row to draw
            return None
        return sample_negatives(bank, labels, self.config.num_negatives, replacement=True)

    def _has_two_labels(self, bank: IndexedBank) -> bool:
        assert bank.row_labels is not None
        valid, row_labels = bank.of_all_rows("labels of the bank", bank.valid, bank.row_labels)
        return len(row_labels[valid].unique()) > 1

    def _positive(self, bank: IndexedBank, positive: Tensor, examples: Examples) -> Tensor:
        if self.config.positive == "current":
            return positive
        columns = (bank.valid, bank.rows)
        there, rows = bank.entries("positives of the bank", examples["index"], *columns)
        return torch.where(there[:, None], rows.to(positive.dtype), positive)

    def _write(self, bank: IndexedBank, keys: Tensor, examples: Examples) -> None:
        bank.update(examples["index"], keys)


class QueueContrast(LayerContrast):
    """LayerContrast with a first-in-first-out queue of z_T: its rows are the negatives, whatever
    their text.
    """

    config: PretrainingConfig

    def __init__(
        self, config: PretrainingConfig, widths: tuple[int, int], process_group: Any = None
    ) -> None:
        def new_queue() -> MemoryQueue:
            size, dim = config.queue_size, config.projection_dim
            try:
                queue = MemoryQueue(size, dim, process_group=process_group)
                if config.bank_init == "random":
                    queue.enqueue(*_of_rank(queue, torch.randn(size, dim)))
            except (RuntimeError, ValueError) as error:
                reason = str(error).rpartition("DefaultCPUAllocator: ")[2]
                raise ValueError(
                    f"`queue_size` {size} can't be had, as rows of {dim} numbers: {reason}"
                ) from error
            return queue

        super().__init__(config, widths, new_queue, process_group)

    def _picks(self, bank: MemoryQueue, B: int, examples: Examples) -> dict[str, Any]:
        return {"negative_index": self._draw_filled(bank, B)} if self.config.num_negatives else {}

    def _write(self, bank: MemoryQueue, keys: Tensor, examples: Examples) -> None:
        bank.enqueue(keys)


def _of_rank(bank: Bank, *rows: Tensor) -> list[Tensor]:
    """This rank's part of something that there is of every row."""
    return list(rows) if bank.shard is None else [bank.shard.own(part) for part in rows]
