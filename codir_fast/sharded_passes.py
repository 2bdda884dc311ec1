"""What a rank does with its own rows, where negatives are sharded: passes of an operator over them,
by the queries of all ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.bank_facts import rows_of
from codir_fast.collectives import gather
from codir_fast.negatives import ChosenNegatives
from codir_fast.ops import registration
from codir_fast.ops.contrast import Outputs
from codir_fast.partial_sums import PartialSums
from codir_fast.reference import NCE_EPS
from codir_fast.sharding import GlobalBatch

NO_ROWS = slice(0, 0)
Direction = tuple[Tensor, Tensor, ChosenNegatives]  # query, positive, negatives


@dataclass(frozen=True)
class Objective:
    """What all ranks compute alike. `normalize`: by the operator, in InfoNCE alone."""

    inv_temperature: Tensor
    log_partition: Tensor | None
    num_noise: int
    num_data: int
    normalize: bool
    backend: str

    @property
    def is_nce(self) -> bool:
        return self.log_partition is not None


@dataclass(frozen=True)
class Queries:
    """The queries of all ranks, (B, D), and what picks their negatives."""

    query: Tensor
    positive: Tensor | None
    labels: Tensor | None = None
    exclude_index: Tensor | None = None
    index: Tensor | None = None

    @staticmethod
    def gathered(
        directions: Sequence[Direction], batch: GlobalBatch, objective: Objective
    ) -> "Queries":
        query, positive, negatives = directions[0]
        needs_positive = not objective.is_nce or len(directions) > 1
        picks = (negatives.labels, negatives.exclude_index, negatives.index)
        given = (query, positive if needs_positive else None, *picks)
        columns = [column for column in given if column is not None]
        what = "contrastive_loss, its queries on the way"
        first, *others = gather(batch.ranks, what, columns, batch.sizes).wait()
        came = iter(others)
        return Queries(first, *(None if column is None else next(came) for column in given[1:]))

    def exchanged(self) -> "Queries":
        assert self.positive is not None
        return replace(self, query=self.positive, positive=self.query)


@dataclass(frozen=True)
class Pass:
    """One operator over a part of this rank's rows. Its negatives count `times` (B,) over, or
    once.
    """

    op: str
    part: slice
    queries: Queries
    negatives: ChosenNegatives
    objective: Objective
    times: Tensor | None = None

    def sums(self) -> tuple[PartialSums, Tensor]:
        """Partial sums of each query, and lse."""
        if not self.objective.is_nce:
            assert self.queries.positive is not None
            loss, lse, dquery, _, dinv_temperature = self.run(self.queries.positive)
            return PartialSums(loss, dquery, dinv_temperature), lse
        far = _far_positive(self.queries.query, self.objective)
        loss, lse, dquery, _, dinv_temperature = self.run(far)
        alone = replace(
            self, op="bank_contrast", part=NO_ROWS, queries=Queries(self.queries.query, far)
        )
        return PartialSums(loss - alone.run(far)[0], dquery, dinv_temperature), lse

    def run(self, positive: Tensor) -> Outputs:
        query, bank = self.queries.query, self.negatives.rows[self.part]
        name = self._backend(query, bank)
        return registration.overload(self.op, name)(query, positive, bank, *self._rest())

    def backward(self, grad_loss: Tensor, lse: Tensor) -> Tensor:
        """Gradient to the rows of the part, as of all queries' losses."""
        query, bank = self.queries.query, self.negatives.rows[self.part]
        name = self._backend(query, bank)
        inv_temperature, *rest = self._rest()
        if self.times is not None:
            grad_loss = grad_loss * self.times
        backward = registration.overload(f"{self.op}_backward", name)
        return backward(grad_loss, query, bank, inv_temperature, lse, *rest)

    def _backend(self, query: Tensor, bank: Tensor) -> str:
        negatives, objective = self.negatives, self.objective
        picks = (self.queries.labels, self.queries.exclude_index, negatives.valid)
        rows = rows_of(
            bank, negatives.scale, objective.inv_temperature, *picks, objective.log_partition
        )
        return resolve(self.op, objective.backend, query, rows)

    def _rest(self) -> tuple[Any, ...]:
        queries, chosen, objective = self.queries, self.negatives, self.objective
        of_rows = (chosen.scale, chosen.row_labels, chosen.valid)
        scale, row_labels, valid = (None if x is None else x[self.part] for x in of_rows)
        if queries.labels is None:
            row_labels = None
        return (
            objective.inv_temperature,
            *(() if queries.index is None else (queries.index,)),
            *(scale, queries.labels, row_labels, queries.exclude_index, valid),
            *(objective.log_partition, objective.num_noise, objective.num_data),
            objective.normalize,
        )


def _far_positive(query: Tensor, objective: Objective) -> Tensor:
    """A positive for each query that NCE finds beyond doubt: its term is 0, so that the operator
    gives the sum over the negatives alone.

    It lies along the query, s+ = offset + 120, and e^-120 is nothing. Where the query is 0 so is
    the positive: a constant term, and no gradient.
    """
    dtype = query.dtype
    assert objective.log_partition is not None
    log_noise = math.log(objective.num_noise / objective.num_data + NCE_EPS)
    logit = objective.log_partition.to(dtype) + (log_noise + 120)
    square = query.square().sum(1, keepdim=True)
    factor = logit / (square.clamp_min(1e-30) * objective.inv_temperature.to(dtype))
    return query * factor.masked_fill(square < 1e-30, 0)


def passes_over(queries: Queries, negatives: ChosenNegatives, objective: Objective) -> list[Pass]:
    """What a rank has to do for all queries to meet the negatives that it has."""
    excluded = queries.exclude_index
    if excluded is not None:
        excluded = _in_shard(excluded, negatives)
    if queries.index is None:
        own = replace(queries, exclude_index=excluded)
        return [Pass("bank_contrast", slice(None), own, negatives, objective)]
    index = _in_shard(queries.index, negatives)
    if excluded is not None:
        index = index.where(index != excluded[:, None], -1)
    # Lists are as long as the longest: the others are filled up with row 0, which no query's list
    # counts. Who names it meets it in a pass of its own, as often as it is named.
    listed = index.clamp_min(0).sort(dim=1, descending=True).values
    longest = int((listed > 0).sum(1).max()) if listed.numel() else 0
    times = (index == 0).sum(1)
    row_0 = replace(queries, index=None, exclude_index=None)
    listed = listed[:, :longest].contiguous()
    lists = replace(queries, index=listed, exclude_index=torch.zeros_like(times))
    return [
        Pass("indexed_contrast", slice(None), lists, negatives, objective),
        Pass("bank_contrast", slice(0, 1), row_0, negatives, objective, times),
    ]


def _in_shard(rows: Tensor, negatives: ChosenNegatives) -> Tensor:
    """Row numbers within this rank's rows; -1 for those of others."""
    rows = rows - negatives.first_row
    return rows.where((rows >= 0) & (rows < len(negatives.rows)), -1)
