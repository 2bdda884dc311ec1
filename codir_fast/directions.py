"""A contrastive loss as directions, of queries that look for their positives among negatives, and
the pass over the negatives that each of them takes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from codir_fast.loss_arguments import (
    check_float8,
    inverse_temperature,
    prepare,
    product_dtype,
)
from codir_fast.negative_rows import RowForm, as_rows, carries_gradient, scaled_rows
from codir_fast.negatives import ChosenNegatives, Negatives, choose_negatives
from codir_fast.ops.bank_contrast import bank_contrast
from codir_fast.ops.contrast import compute_dtype
from codir_fast.ops.indexed_contrast import indexed_contrast
from codir_fast.sharded_contrast import sharded_losses
from codir_fast.sharded_passes import Direction, Objective
from codir_fast.sharding import GlobalBatch

# labels, negative_labels, negative_index, exclude_index
Picks = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def arrange(
    vectors: tuple[Tensor, Tensor, Negatives],
    temperature: float | Tensor,
    normalize: bool,
    symmetric: bool,
    backend: str,
    given: Picks,
    batch: GlobalBatch | None,
    is_nce: bool,
) -> tuple[list[Direction], Objective]:
    """Who looks for whom among what, one way or both, and InfoNCE's objective for it."""
    query, positive_key, negative_keys = vectors
    is_split_nce = batch is not None and is_nce
    wide = compute_dtype(query.dtype)
    dtype = wide if is_split_nce else product_dtype(query, backend)
    # The operator widens query and positive and brings them to unit length, unless NCE's sums are
    # split over ranks, or they are needed so several times. Keys that serve as negatives need not
    # be: a CPU scales them as it reads them. On a GPU that is no faster, and some kernels can't.
    in_batch = negative_keys is None
    only_keys = in_batch and batch is None and not (symmetric or carries_gradient(positive_key))
    scales_keys = only_keys and query.is_cpu
    several_times = symmetric or (in_batch and not scales_keys)
    raw = dtype != wide or (normalize and not (several_times or is_split_nce))
    q, p = (query, positive_key) if raw else prepare(query, positive_key, normalize, backend)
    if p.dtype != q.dtype:  # kernels take one dtype, or a positive in float32
        p = p.to(wide)
    by_operator = normalize and raw
    serve = partial(as_rows, form=RowForm(by_operator, dtype, backend))  # as negatives in-batch
    inv_temperature = inverse_temperature(temperature, query)
    key, scale = p, None
    if in_batch:
        key, scale = scaled_rows(p, wide) if scales_keys and by_operator else (serve(p), None)
    form = RowForm(normalize, dtype, backend)
    negatives = choose_negatives(query, key, negative_keys, form, *given, batch)
    if scale is not None:
        negatives.scale = scale
    check_float8(negatives, temperature)
    ways = _both_ways(q, p, negatives, serve if symmetric else None)
    return ways, Objective(inv_temperature, None, 1, 1, by_operator, backend)


def losses_of(
    directions: list[Direction],
    objective: Objective,
    batch: GlobalBatch | None,
    reduction: str = "none",
) -> list[Tensor]:
    """The loss (B,) of each direction; reduced where no `batch` of several ranks is."""
    if batch is not None and not directions[0][2].own:
        assert reduction == "none"
        return sharded_losses(directions, batch, objective)
    return [_loss(*direction, objective, reduction) for direction in directions]


def _loss(
    query: Tensor,
    positive: Tensor,
    negatives: ChosenNegatives,
    objective: Objective,
    reduction: str,
) -> Tensor:
    vectors = (query, positive, negatives.rows, objective.inv_temperature)
    picks: dict[str, Any] = {
        "bank_scale": negatives.scale,
        "labels": negatives.labels,
        "bank_labels": negatives.row_labels,
        "exclude_index": negatives.exclude_index,
        "valid": negatives.valid,
        "log_partition": objective.log_partition,
        "num_noise": objective.num_noise,
        "num_data": objective.num_data,
        "normalize": objective.normalize,
        "backend": objective.backend,
        "reduction": reduction,
    }
    if negatives.index is None:
        return bank_contrast(*vectors, **picks)
    return indexed_contrast(*vectors, negatives.index, **picks)


def _both_ways(
    query: Tensor,
    positive: Tensor,
    negatives: ChosenNegatives,
    serve: Callable[[Tensor], Tensor] | None,
) -> list[Direction]:
    """Who looks for whom among what; the other way round too if the queries `serve` as negatives in
    their turn.
    """
    directions = [(query, positive, negatives)]
    if serve is not None:
        exchanged = replace(negatives, rows=serve(query)) if negatives.in_batch else negatives
        directions.append((positive, query, exchanged))
    return directions
