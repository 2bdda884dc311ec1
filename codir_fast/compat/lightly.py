"""NTXentLoss of lightly 1.5.26 (`lightly.loss.NTXentLoss`)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codir_fast.checks import as_number
from codir_fast.functional import contrastive_loss
from codir_fast.loss_arguments import check_pair, check_temperature
from codir_fast.memory_bank import MemoryQueue


class NTXentLoss(nn.Module):
    """The loss of SimCLR, or with a memory bank that of MoCo, as `lightly.loss.NTXentLoss`.

    Without a bank each of the 2 B views must find the other view of its image among all but itself,
    and the mean is over the 2 B views. With a bank the queries are `out0`, the positives `out1`
    (gradients flow to both) and the negatives the bank as it was before this batch; then, where
    `out0` requires a gradient, `out1` goes into it.

    As in lightly the bank starts as random unit rows, and a batch that runs over its end is cut
    there: the rest of it is dropped and the next batch starts at row 0.

    Differs from lightly in that nothing of size (2 B, 2 B) or (B, K) is stored; that the bank is a
    MemoryQueue, in the state_dict under `memory_bank.*` (lightly does not save its bank: load its
    checkpoints with strict=False); and that the bank does not change in eval mode.

    Args:
        temperature: t > 0.
        memory_bank_size: 0 for no bank, (rows, D), or only the number of rows: then the bank is
            made at the first batch, so that a saved state can't be loaded before it.
        gather_distributed: only False; True raises NotImplementedError.

    Example:
        >>> loss = NTXentLoss(memory_bank_size=(4096, 128))(view0, view1)

    Source: Chen et al. 2020, SimCLR, eq. 1; He et al. 2020, Momentum Contrast, eq. 1.
    """

    memory_bank: MemoryQueue | None

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if gather_distributed:
            raise NotImplementedError(
                "`gather_distributed=True` is not supported: negatives come from this process only"
            )
        self.temperature = temperature
        self.memory_bank_size = _as_sizes(memory_bank_size)
        self.memory_bank = None
        if self.memory_bank_size[0] > 0 and len(self.memory_bank_size) == 2:
            self.memory_bank = _random_queue(*self.memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss of two views, (B, D) each; a scalar, differentiable in both.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or device; the message names the argument.
        """
        check_pair(out0, out1, ("out0", "out1"))
        if self.memory_bank_size[0] == 0:
            return self._between_views(out0, out1)
        if self.memory_bank is None:
            with torch.inference_mode(False):  # which training may write to
                queue = _random_queue(self.memory_bank_size[0], out1.shape[1])
            self.memory_bank = queue.train(self.training)
        bank = self.memory_bank.to(out0.device)
        if out0.shape[1] != bank.dim:
            raise ValueError(
                f"`out0` must have shape (B, D) with D={bank.dim}, the width of the bank, "
                f"got {tuple(out0.shape)}"
            )
        if bank.rows.dtype == torch.float64 != out0.dtype:
            raise ValueError(f"`out0` must be float64, as the bank is, got {out0.dtype}")
        loss = contrastive_loss(out0, out1, bank, temperature=self.temperature)
        if out0.requires_grad:
            bank.enqueue(out1[: bank.rows.shape[0] - int(bank.position)])
        return loss

    def _between_views(self, out0: Tensor, out1: Tensor) -> Tensor:
        views = torch.cat([out0, out1])
        # The other views' positives are all views. An image is the label of its two views, so that
        # none meets itself, as the positive of its own positive.
        image = torch.arange(out0.shape[0], device=out0.device).repeat(2)
        others = torch.cat([out1, out0])
        return contrastive_loss(views, others, temperature=self.temperature, labels=image)


def _as_sizes(memory_bank_size: int | Sequence[int]) -> tuple[int, ...]:
    given = as_number(memory_bank_size)
    sizes = tuple(map(as_number, given if isinstance(given, Sequence) else (given,)))
    if len(sizes) not in (1, 2) or any(not isinstance(size, int) or size < 0 for size in sizes):
        raise ValueError(
            "`memory_bank_size` must be a number of rows or (rows, D), each at least 0, "
            f"got {memory_bank_size!r}"
        )
    return sizes


def _random_queue(rows: int, dim: int) -> MemoryQueue:
    queue = MemoryQueue(rows, dim, dtype=torch.float32)
    queue.enqueue(torch.randn(rows, dim))  # fills it whole, so that the next key goes to row 0
    return queue
