"""Which rank of a process group holds which rows of a bank, and the batch that all ranks have
together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codir_fast.collectives import (
    Ranks,
    Settings,
    agree,
    exchange,
    exchange_counts,
    gather,
    outside_graphs,
    ranks_of,
)


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
