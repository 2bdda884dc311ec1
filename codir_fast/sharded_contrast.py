"""The contrastive loss where the negatives are sharded over ranks: all queries go to all ranks,
each scans its own rows once, and the partial sums go back to each query's rank. What travels does
not depend on the number of rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codir_fast.collectives import exchange, gather, outside_graphs
from codir_fast.negatives import ChosenNegatives
from codir_fast.ops import registration
from codir_fast.ops.contrast import PreparedPair, wide
from codir_fast.partial_sums import PartialSums, combine_partial_sums, combine_repeated, unpack
from codir_fast.sharded_passes import NO_ROWS, Direction, Objective, Pass, Queries, passes_over
from codir_fast.sharding import GlobalBatch


def scan(
    query: Tensor, positive: Tensor, negatives: ChosenNegatives, objective: Objective
) -> PartialSums:
    """Partial sums over these negatives, without autograd."""
    picks = (negatives.labels, negatives.exclude_index, negatives.index)
    queries = Queries(query, positive, *picks)
    op = "bank_contrast" if negatives.index is None else "indexed_contrast"
    return Pass(op, slice(None), queries, negatives, objective).sums()[0]


def positive_sums(
    query: Tensor, positive: Tensor, negatives: ChosenNegatives, objective: Objective
) -> tuple[PartialSums, Tensor]:
    """NCE's term of the positive, and the gradient to it."""
    alone = Pass("bank_contrast", NO_ROWS, Queries(query, positive), negatives, objective)
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
    queries = Queries.gathered(directions, batch, objective)
    with torch.no_grad():
        scans = [_Scan(queries, directions[0], batch, objective)]
        scans += [_Scan(queries.exchanged(), way, batch, objective) for way in directions[1:]]
    return [
        _Finish.apply(query, positive, negatives.rows, objective.inv_temperature, scan)
        for (query, positive, negatives), scan in zip(directions, scans, strict=True)
    ]


class _Scan:
    """All queries against this rank's rows, and the sums of this rank's queries on their way from
    all ranks.
    """

    def __init__(
        self, queries: Queries, way: Direction, batch: GlobalBatch, objective: Objective
    ) -> None:
        self.batch, self.objective = batch, objective
        self.query, self.positive, self.negatives = way
        self.passes = passes_over(queries, self.negatives, objective)
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
