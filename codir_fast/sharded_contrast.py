"""The contrastive loss where the negatives are sharded over ranks: all queries go to all ranks,
each scans its own rows once, and the partial sums go back to each query's rank. What travels does
not depend on the number of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from codir_fast.backend import resolve, rows_of
from codir_fast.collectives import exchange, gather, outside_graphs
from codir_fast.negatives import ChosenNegatives
from codir_fast.ops import registration
from codir_fast.ops.contrast import Outputs, PreparedPair, wide
from codir_fast.partial_sums import PartialSums, combine_partial_sums, combine_repeated, unpack
from codir_fast.reference import NCE_EPS
from codir_fast.sharding import GlobalBatch

_NO_ROWS = slice(0, 0)
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


def scan(
    query: Tensor, positive: Tensor, negatives: ChosenNegatives, objective: Objective
) -> PartialSums:
    """Partial sums over these negatives, without autograd."""
    picks = (negatives.labels, negatives.exclude_index, negatives.index)
    queries = _Queries(query, positive, *picks)
    op = "bank_contrast" if negatives.index is None else "indexed_contrast"
    return _Pass(op, slice(None), queries, negatives, objective).sums()[0]


def positive_sums(
    query: Tensor, positive: Tensor, negatives: ChosenNegatives, objective: Objective
) -> tuple[PartialSums, Tensor]:
    """NCE's term of the positive, and the gradient to it."""
    alone = _Pass("bank_contrast", _NO_ROWS, _Queries(query, positive), negatives, objective)
    loss, _, dquery, dpositive, dinv_temperature = alone.run(positive)
    return PartialSums(loss, dquery, dinv_temperature), dpositive


@outside_graphs
def gather_numbers(batch: GlobalBatch, numbers: Tensor) -> Tensor:
    """Each rank's numbers (N,), as (R, N)."""
    what = "contrastive_loss, its log_partition on the way"
    return gather(batch.ranks, what, [numbers[None]], [1] * batch.ranks.size).wait()[0]


@outside_graphs
def sharded_losses(
    directions: Sequence[Direction], batch: GlobalBatch, objective: Objective
) -> list[Tensor]:
    """The loss of this rank's queries in each direction, (B,), differentiable as bank_contrast's.

    The second direction, if there is one, has query and positive exchanged. Its rows are scanned
    while the first one's sums travel.
    """
    queries = _Queries.gathered(directions, batch, objective)
    with torch.no_grad():
        scans = [_Scan(queries, directions[0], batch, objective)]
        scans += [_Scan(queries.exchanged(), way, batch, objective) for way in directions[1:]]
    return [
        _Finish.apply(query, positive, negatives.rows, objective.inv_temperature, scan)
        for (query, positive, negatives), scan in zip(directions, scans, strict=True)
    ]


@dataclass(frozen=True)
class _Queries:
    """The queries of all ranks, (B, D), and what picks their negatives."""

    query: Tensor
    positive: Tensor | None
    labels: Tensor | None = None
    exclude_index: Tensor | None = None
    index: Tensor | None = None

    @staticmethod
    def gathered(
        directions: Sequence[Direction], batch: GlobalBatch, objective: Objective
    ) -> "_Queries":
        query, positive, negatives = directions[0]
        needs_positive = not objective.is_nce or len(directions) > 1
        picks = (negatives.labels, negatives.exclude_index, negatives.index)
        given = (query, positive if needs_positive else None, *picks)
        columns = [column for column in given if column is not None]
        what = "contrastive_loss, its queries on the way"
        first, *others = gather(batch.ranks, what, columns, batch.sizes).wait()
        came = iter(others)
        return _Queries(first, *(None if column is None else next(came) for column in given[1:]))

    def exchanged(self) -> "_Queries":
        assert self.positive is not None
        return replace(self, query=self.positive, positive=self.query)


@dataclass(frozen=True)
class _Pass:
    """One operator over a part of this rank's rows. Its negatives count `times` (B,) over, or
    once.
    """

    op: str
    part: slice
    queries: _Queries
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
            self, op="bank_contrast", part=_NO_ROWS, queries=_Queries(self.queries.query, far)
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


def _passes(queries: _Queries, negatives: ChosenNegatives, objective: Objective) -> list[_Pass]:
    """What a rank has to do for all queries to meet the negatives that it has."""
    excluded = queries.exclude_index
    if excluded is not None:
        excluded = _in_shard(excluded, negatives)
    if queries.index is None:
        own = replace(queries, exclude_index=excluded)
        return [_Pass("bank_contrast", slice(None), own, negatives, objective)]
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
        _Pass("indexed_contrast", slice(None), lists, negatives, objective),
        _Pass("bank_contrast", slice(0, 1), row_0, negatives, objective, times),
    ]


def _in_shard(rows: Tensor, negatives: ChosenNegatives) -> Tensor:
    """Row numbers within this rank's rows; -1 for those of others."""
    rows = rows - negatives.first_row
    return rows.where((rows >= 0) & (rows < len(negatives.rows)), -1)


class _Scan:
    """All queries against this rank's rows, and the sums of this rank's queries on their way from
    all ranks.
    """

    def __init__(
        self, queries: _Queries, way: Direction, batch: GlobalBatch, objective: Objective
    ) -> None:
        self.batch, self.objective = batch, objective
        self.query, self.positive, self.negatives = way
        self.passes = _passes(queries, self.negatives, objective)
        part, lse = self.passes[0].sums()
        ranks, sizes = batch.ranks, batch.sizes
        own = slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
        self._loss, self._lse = part.loss[own], lse[own]
        if len(self.passes) > 1:
            parts = [part, *(each.sums()[0] for each in self.passes[1:])]
            times = [each.times for each in self.passes]
            part = combine_repeated(parts, times, objective.is_nce)
        what = "contrastive_loss, its partial sums on the way"
        receive = [len(self.query)] * ranks.size
        self._pending = exchange(ranks, what, [part.packed()], sizes, receive)

    def finish(self) -> tuple[PartialSums, Tensor, Tensor]:
        """Loss and gradients of this rank's queries, the gradient to their positives, and lse."""
        nce = self.objective.is_nce  # its positive while the sums travel
        way = (self.query, self.positive, self.negatives)
        of_positive, dpositive = positive_sums(*way, self.objective) if nce else (None, None)
        (came,) = self._pending.wait()
        by_rank = (self.batch.ranks.size, len(self.query), came.shape[1])
        parts = [unpack(part) for part in came.view(by_rank)]
        if of_positive is not None and dpositive is not None:
            sums = combine_partial_sums([of_positive, *parts], objective="nce")
            return sums, dpositive, self._lse
        sums = combine_partial_sums(parts)
        lse = self._lse + (wide(sums.loss) - wide(self._loss))
        return sums, self._dpositive(sums.loss), lse

    def _dpositive(self, loss: Tensor) -> Tensor:
        """InfoNCE: dl/dp = -(1 - e^{-l}) q / t."""
        pair = PreparedPair(self.query, self.positive, self.objective.normalize)
        inv_t = self.objective.inv_temperature.to(pair.query.dtype)
        dpositive = torch.expm1(-loss)[:, None] * pair.query * inv_t
        return pair.bring_back((loss, loss, pair.query, dpositive, loss))[3]

    def drows(self, grad_loss: Tensor, lse: Tensor) -> Tensor:
        """Gradient to this rank's rows, of the losses of all ranks."""
        what = "contrastive_loss, its gradients on the way"
        columns = gather(self.batch.ranks, what, [grad_loss, lse], self.batch.sizes).wait()
        first, *others = self.passes
        drows = first.backward(*columns)
        for each in others:
            drows[each.part] += each.backward(*columns)
        return drows


class _Finish(torch.autograd.Function):
    """This rank's losses (B,), of query, positive, this rank's rows and inv_temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        rows: Tensor,
        inv_temperature: Tensor,
        scan: _Scan,
    ) -> Tensor:
        (loss, dquery, dinv_temperature), dpositive, lse = scan.finish()
        needs = ctx.needs_input_grad
        ctx.scan = scan if needs[2] else None
        inputs = (query, positive, rows, inv_temperature)
        given = tuple(x for x, needed in zip(inputs, needs, strict=False) if needed)
        ctx.num_given = len(given)
        ctx.dtypes = query.dtype, positive.dtype
        ctx.inv_temperature_like = inv_temperature.dtype, inv_temperature.device
        ctx.save_for_backward(
            *given,
            dquery if needs[0] else None,
            dpositive if needs[1] else None,
            rows if needs[2] else None,
            dinv_temperature if needs[3] else None,
            lse if needs[2] else None,
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        saved = ctx.saved_tensors
        dquery, dpositive, rows, dinv_temperature, lse = saved[ctx.num_given :]
        dtype, device = ctx.inv_temperature_like
        grads = (
            None if dquery is None else (grad_loss[:, None] * dquery).to(ctx.dtypes[0]),
            None if dpositive is None else (grad_loss[:, None] * dpositive).to(ctx.dtypes[1]),
            None if rows is None else ctx.scan.drows(grad_loss, lse),
            None
            if dinv_temperature is None
            else (grad_loss * dinv_temperature).sum().to(dtype=dtype, device=device),
        )
        given = (*saved[: ctx.num_given], grad_loss)
        return (*registration.first_derivative_only("bank_contrast", grads, given), None)
