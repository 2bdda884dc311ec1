"""Which rank of a process group holds which rows of a bank, and the batch that all ranks have
together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codir_fast.checks import as_number
from codir_fast.collectives import (
    Ranks,
    Settings,
    agree,
    exchange,
    exchange_counts,
    gather,
    gather_blocks,
    outside_graphs,
    ranks_of,
)
from codir_fast.ops.registration import under_functorch

_BLOCK_BYTES = 1 << 26  # of a bank that travel at once


@dataclass(frozen=True)
class Shard:
    """Rows [first, first + num_rows) of `size`, which this rank holds.

    Every rank has ceil(size / R) rows, as torch.chunk cuts them, the last ones what is left.
    """

    ranks: Ranks
    size: int

    @property
    def block(self) -> int:
        return -(-self.size // self.ranks.size)

    @property
    def first(self) -> int:
        return self.first_of(self.ranks.rank)

    @property
    def num_rows(self) -> int:
        return self.first_of(self.ranks.rank + 1) - self.first

    def first_of(self, rank: int) -> int:
        return min(rank * self.block, self.size)

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of something that there is of every row."""
        return rows[self.first : self.first + self.num_rows]

    @outside_graphs
    def agree(self, what: str, settings: Settings, count: int, first_row: Tensor) -> list[int]:
        """Every rank's count, once it is known that all have the same settings, and `first_row`
        that they hold their own rows.
        """
        asked = (self.ranks, what, settings, (count, 0), first_row.device, first_row)
        every = agree(*asked)
        check_first_rows(self, [first for *_, first in every])
        return [each for each, *_ in every]

    @outside_graphs
    def to_owners(self, what: str, row: Tensor, *columns: Tensor) -> list[Tensor]:
        """Sends each entry (N,) of `row`, and what belongs to it, to the rank that holds that row.

        Returns:
            What came for rows of this rank, in the order of ranks and then as sent: numbers within
            the shard, and the columns.
        """
        owner = row // self.block
        order = owner.argsort(stable=True)
        send = torch.bincount(owner, minlength=self.ranks.size)
        receive = exchange_counts(self.ranks, what, send)
        moved = [column[order] for column in (row, *columns)]
        row, *moved = exchange(self.ranks, what, moved, send.tolist(), receive).wait()
        return [row - self.first, *moved]

    @outside_graphs
    def from_owners(self, what: str, row: Tensor, *columns: Tensor) -> list[Tensor]:
        """What the ranks that hold each of `row` (N,) have of it in the columns, (N, ...) each."""
        owner = row // self.block
        order = owner.argsort(stable=True)
        send = torch.bincount(owner, minlength=self.ranks.size)
        receive = exchange_counts(self.ranks, what, send)
        (asked,) = exchange(self.ranks, what, [row[order]], send.tolist(), receive).wait()
        found = [column[asked - self.first] for column in columns]
        came = exchange(self.ranks, what, found, receive, send.tolist()).wait()
        back = order.argsort()
        return [column[back] for column in came]

    @outside_graphs
    def whole(self, what: str, *columns: Tensor) -> list[Tensor]:
        """The columns of all rows, on every rank."""
        sizes = [self.first_of(rank + 1) - self.first_of(rank) for rank in range(self.ranks.size)]
        return gather(self.ranks, what, columns, sizes).wait()

    def gathered(self, what: str, column: Tensor, dst: int) -> Tensor:
        """A column of all rows, on the CPU; of rank dst alone."""
        whole = column.new_empty(0, device="cpu")
        if self.ranks.rank == dst:
            whole = torch.empty(self.size, *column.shape[1:], dtype=column.dtype)
        row_bytes = column.element_size() * column.shape[1:].numel()
        step = max(1, _BLOCK_BYTES // row_bytes // self.ranks.size)
        for start in range(0, self.block, step):
            own = column[start : start + step]
            sent = column.new_zeros(min(step, self.block - start), *column.shape[1:])
            sent[: len(own)] = own
            blocks = gather_blocks(self.ranks, what, sent, dst)
            for rank, block in enumerate(blocks or ()):
                first = self.first_of(rank) + start
                end = min(first + len(block), self.first_of(rank + 1))
                if first < end:
                    whole[first:end] = block[: end - first].cpu()
        return whole


def shard_of(size: int, process_group: Any) -> Shard | None:
    """This process's part of `size` rows; None: all of them."""
    ranks = ranks_of(process_group)
    return None if ranks is None else Shard(ranks, size)


def check_first_rows(shard: Shard, found: list[int]) -> None:
    """That no bank was copied from one rank to others."""
    for rank, first in enumerate(found):
        if first != shard.first_of(rank):
            raise RuntimeError(
                f"a sharded bank of {shard.size} rows holds rows from {first} on at rank {rank}, "
                f"where rows from {shard.first_of(rank)} on belong: something copied the buffers "
                "of one rank to another, as DistributedDataParallel does; call "
                "codir_fast.distributed.ignore_shards_in_ddp(model) before it wraps the model"
            )


def check_dst(dst: Any, ranks: Ranks) -> None:
    """That it is a rank of the group; a collective would blame ranks that have ended."""
    number = as_number(dst)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < ranks.size:
        raise ValueError(
            f"`dst` must be a rank of the banks' process group, an int in [0, {ranks.size}), "
            f"got {dst!r}"
        )


def refuse_transforms(what: str, process_group: Any) -> None:
    """That no transform of torch.func is at work: it can take no step of several ranks, and would
    say so in the middle of one, in words of torch's.
    """
    if under_functorch() and ranks_of(process_group) is not None:
        raise RuntimeError(
            f"{what} with a `process_group` can't run under torch.func's transforms (grad, vmap, "
            "jvp and their kin): take gradients by backward() or torch.autograd.grad"
        )


@dataclass(frozen=True)
class GlobalBatch:
    """The queries of all ranks, sizes[r] of rank r, and the negatives that they share: `num_rows`
    of them, this rank's from `first_row` on.
    """

    ranks: Ranks
    sizes: tuple[int, ...]
    first_row: int
    num_rows: int

    @property
    def size(self) -> int:
        return sum(self.sizes)
