"""Memory banks of negatives: a first-in-first-out queue, and one row per training example; whole on
each process, or sharded over the ranks of a process group.
"""

from typing import Any

import torch
from torch import Tensor

from codir_fast.bank_rows import BankRows
from codir_fast.checks import (
    check_count,
    check_device,
    check_flag,
    check_index,
    check_integers,
    check_number,
)
from codir_fast.ops.registration import is_transformed, under_functorch


class MemoryQueue(BankRows):
    """First-in-first-out queue of negatives (the dictionary of MoCo).

    Rows are L2-normalised and carry no gradient. A new queue is empty and gives no negatives. In
    eval mode it never changes: `enqueue` checks its arguments and does nothing. The whole state
    (rows, labels, position, fill) is in the state_dict; it loads into a queue of another dtype or
    device.

    Args:
        size: number of rows, K.
        dim: width of a row, D.
        dtype: of the rows; default torch's default dtype. Half precision halves the memory,
            torch.float8_e4m3fn takes a quarter: its rows have a float32 factor each, gradients are
            right to about 1 % of their largest element at a temperature of 0.07, which must not be
            lower. The Triton kernels take it on sm_89 and newer; elsewhere backend "torch" runs. On
            an H200 a step takes 3 times as long as with bfloat16 rows at 4,096 queries, and up to
            twice as long, most of it Python, with few.
        with_labels: keep an int64 label per row, to leave out negatives of the query's own class.
        process_group: ranks of torch.distributed that share the rows; see codir_fast.distributed.
            Default: this process has them all.

    Example:
        >>> queue = MemoryQueue(65536, 128)
        >>> loss = ContrastiveLoss()(query, positive_key, queue)
        >>> queue.enqueue(positive_key)

    Source: He et al. 2020, Momentum Contrast, section 3.2.
    """

    position: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        with_labels: bool = False,
        process_group: Any = None,
    ) -> None:
        size = check_count("size", size)
        check_flag("with_labels", with_labels)
        super().__init__(size, dim, dtype, None, process_group)
        if with_labels:
            self.row_labels = torch.full((self.rows.shape[0],), -1)
        # Where the next key goes; a tensor, so that it travels with the state and needs no
        # recompilation.
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def keys(self) -> Tensor:
        """The filled rows, oldest first: a copy, (len, D); in float32 for a float8 queue. Of a
        sharded queue, those of this rank.
        """
        return self._rows_at(self._oldest_first())

    @property
    def labels(self) -> Tensor | None:
        """Labels of `keys`, (len,) int64; None for a queue without labels."""
        return None if self.row_labels is None else self.row_labels[self._oldest_first()]

    def _oldest_first(self) -> Tensor:
        size = self.rows.shape[0]
        start = self.position
        if self.shard is not None:  # the oldest row may be another rank's
            start = start - self.shard.first
            start = torch.where((start >= 0) & (start < size), start, 0)
        order = (start + torch.arange(size, device=self.rows.device)) % size
        return order[self.valid[order]]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Writes keys over the oldest rows, in order; of more keys than rows the newest stay.

        A sharded queue takes the keys of all ranks, those of rank 0 first, as one process would
        take them one after the other; all ranks must call it, with as many keys as each has.

        Args:
            keys: (N, D) floating point, any length; detached and normalised here. N need not divide
                the size.
            labels: (N,) integers, given exactly where the queue was made with labels.

        Raises:
            ValueError, TypeError: a wrong shape, device or dtype; labels missing or not expected;
                nothing is changed then.
        """
        self._check_keys(keys)
        self._check_labels(keys, labels)
        if not self.training:
            return
        if under_functorch() and not is_transformed(self.position):  # it can't write `position`
            raise RuntimeError(
                "MemoryQueue.enqueue must be called outside of torch.func's transforms"
            )
        N = total = keys.shape[0]
        before = 0  # keys of lower ranks
        if self.shard is not None:
            settings = (*self._settings(), ("keys", str(keys.dtype)))
            told = self.shard.agree("MemoryQueue.enqueue", settings, N, self.first_row)
            total, before = sum(told), sum(told[: self.shard.ranks.rank])
        skipped = min(max(total - self.size - before, 0), N)
        offset = torch.arange(before + skipped, before + N, device=keys.device)
        index, keys = (self.position + offset) % self.size, keys[skipped:]
        if labels is not None:
            labels = labels[skipped:].to(torch.int64)
        if self.shard is not None:
            index, keys, labels = self._to_owners(index, keys, labels)
        self._write(index, keys, momentum=0.0)
        if self.row_labels is not None and labels is not None:
            self.row_labels[index] = labels
        self.position.copy_((self.position + total) % self.size)

    def clear(self) -> None:
        super().clear()
        self.position.zero_()

    def _to_owners(
        self, index: Tensor, keys: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.shard is not None
        columns = [index, keys] if labels is None else [index, keys, labels]
        index, keys, *of_labels = self.shard.to_owners("MemoryQueue.enqueue", *columns)
        return index, keys, of_labels[0] if of_labels else None

    def _find_if_full(self) -> None:
        super()._find_if_full()
        if not self.valid.is_cpu:
            self._full = self._full or self._until_full <= 0  # every row has had its turn

    def _check_labels(self, keys: Tensor, labels: Tensor | None) -> None:
        if self.row_labels is None:
            if labels is not None:
                raise ValueError("`labels` needs a MemoryQueue made with with_labels=True")
            return
        if labels is None:
            raise ValueError("`labels` must be given: the queue was made with with_labels=True")
        check_integers("labels", labels, f"(N,) with N={keys.shape[0]}", keys.shape[0])
        check_device("labels", labels, self.rows.device, "the bank")


class IndexedBank(BankRows):
    """One row per training example: b_r <- normalise(m * b_r + (1 - m) * key).

    A row that was never updated is no negative, and takes its first key, normalised. In eval mode
    the bank never changes: `update` checks its arguments and does nothing. The whole state (rows,
    which of them are filled, labels) is in the state_dict; it loads into a bank of another dtype or
    device.

    Args:
        num_rows: number of training examples, K.
        dim: width of a row, D.
        momentum: m in [0, 1].
        dtype: of the rows; default torch's default dtype; torch.float8_e4m3fn as for MemoryQueue.
        labels: (num_rows,) integers, the class of each example; of a sharded bank too.
        process_group: ranks of torch.distributed that share the rows; see codir_fast.distributed.
            Default: this process has them all.

    Source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination; momentum 0.5 as in Sun et al. 2020, Contrastive Distillation on Intermediate
        Representations.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype | None = None,
        labels: Tensor | None = None,
        process_group: Any = None,
    ) -> None:
        momentum = check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must be in [0, 1], got {momentum}")
        num_rows = check_count("num_rows", num_rows)
        if labels is not None:
            check_integers("labels", labels, f"(num_rows,) with num_rows={num_rows}", num_rows)
            labels = labels.to(torch.int64, copy=True)
        super().__init__(num_rows, dim, dtype, labels, process_group)
        self.momentum = momentum

    @property
    def keys(self) -> Tensor:
        """All rows in order, (num_rows, D): the bank itself, no copy (one in float32 for a float8
        bank); a row that was never updated is 0. Of a sharded bank, those of this rank.
        """
        if self.row_scale is None:
            return self.rows
        return self.rows.float() * self.row_scale[:, None].float()

    @property
    def labels(self) -> Tensor | None:
        """The label of each of `keys`, int64; None for a bank without labels."""
        return self.row_labels

    @torch.no_grad()
    def update(self, index: Tensor, keys: Tensor) -> None:
        """Mixes each key into its example's row; a row that is named more than once takes its keys
        one after the other, in batch order.

        A sharded bank takes the keys of all ranks, those of rank 0 first; all ranks must call it,
        with as many keys as each has, of whatever rows. It waits for the device.

        Nothing else waits for a GPU, but where backend "torch" runs there (see
        codir_fast.backends()): it reads back how often rows repeat if momentum is above 0, so that
        no CUDA graph can hold it.

        Args:
            index: (N,) integers in [0, num_rows). The range is checked on the CPU; a GPU checks it
                by itself.
            keys: (N, D) floating point, any length; detached here.

        Raises:
            ValueError, TypeError: a wrong shape, device, dtype or index; nothing is changed then.
        """
        self._check_keys(keys)
        check_integers("index", index, f"(N,) with N={keys.shape[0]}", keys.shape[0])
        check_device("index", index, self.rows.device, "the bank")
        check_index("index", index, 0, self.size)
        if not self.training:
            return
        index = index.to(torch.int64)
        if self.shard is not None:
            own = (("momentum", self.momentum), ("keys", str(keys.dtype)))
            what = "IndexedBank.update"
            self.shard.agree(what, (*self._settings(), *own), keys.shape[0], self.first_row)
            index, keys = self.shard.to_owners(what, index, keys)
        self._write(index, keys, self.momentum)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}"
