"""The end of each pair of in_batch_contrast, from partial sums over splits to losses, and to
gradients; in float64, a program a pair.
"""

import triton
import triton.language as tl
from codir_fast.kernels.contrast import (
    LN2,
    inverse_norm,
    largest_maximum,
    logistic,
    scalar,
    through_norm,
)
from codir_fast.kernels.problem import combine_tile


@triton.jit(do_not_specialize=["B", "splits"])
def in_batch_losses_kernel(
    loss_ptr,
    lse_ptr,
    maximum_ptr,
    total_ptr,
    query_ptr,
    positive_ptr,
    inv_temperature,
    B,
    D,
    splits,
    WAYS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B,): the mean loss of a pair over the ways, and lse (WAYS, B)."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float64)
    query_scale, _ = inverse_norm(query, NORMALIZE)
    positive_scale, _ = inverse_norm(positive, NORMALIZE)
    inv_t = scalar(inv_temperature, T_ON_DEVICE).to(tl.float64)
    positive_logit = tl.sum((query * query_scale) * (positive * positive_scale), 0) * inv_t
    mean = tl.full((), 0.0, tl.float64)
    for way in tl.static_range(WAYS):
        at = way * B + i
        largest = largest_maximum(maximum_ptr + at, WAYS * B, splits, BLOCK_S)
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = tl.zeros((BLOCK_S,), tl.float64)
        for n0 in range(0, splits, BLOCK_S):
            n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
            of_split = n * (WAYS * B) + at
            maximum = tl.load(maximum_ptr + of_split, mask=n < splits, other=-float("inf"))
            weight = tl.exp2(maximum - shift).to(tl.float64)
            total += weight * tl.load(total_ptr + of_split, mask=n < splits, other=0.0)
        gap = (largest.to(tl.float64) * LN2 - positive_logit) + tl.log(tl.sum(total, 0))
        _, loss = logistic(gap)
        tl.store(lse_ptr + at, positive_logit + loss)
        mean += loss / WAYS
    tl.store(loss_ptr + i, mean)


@triton.jit
def _merged_share(share_ptr, at, B, splits, BLOCK_S: tl.constexpr):
    """Of one row of one side, over the splits."""
    share = tl.zeros((BLOCK_S,), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        share += tl.load(share_ptr + n * (2 * B) + at, mask=n < splits, other=0.0)
    return tl.sum(share, 0)


@triton.jit
def _merged_sums(sums_ptr, at, B, W, splits, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) of one row of one side, over the splits."""
    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        inside = (n < splits)[:, None] & (d < W)[None, :]
        row = (n * (2 * B) + at)[:, None] * W
        sums += tl.load(sums_ptr + row + d[None, :], mask=inside, other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["B", "splits"])
def in_batch_gradients_kernel(
    dquery_ptr,
    dpositive_ptr,
    dinv_temperature_ptr,
    share_ptr,
    sums_ptr,
    grad_ptr,
    unit_ptr,
    query_ptr,
    positive_ptr,
    inv_temperature,
    B,
    D,
    splits,
    STRIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B,): gradients of a pair, and its part of that to 1/t. unit_ptr: what all that came in
    was divided by, or None.
    """
    W = tl.cdiv(D, 16) * 16  # of sums, as of the rows that they are sums of
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    query = tl.load(query_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    share = _merged_share(share_ptr, i, B, splits, BLOCK_S)
    query_sums = _merged_sums(sums_ptr, i, B, W, splits, BLOCK_S, BLOCK_D)
    query_scale, query_moves = inverse_norm(query, NORMALIZE)
    positive_scale, positive_moves = inverse_norm(positive, NORMALIZE)
    query = query * query_scale
    positive = positive * positive_scale
    # What a positive loses is what its negatives take.
    taken = tl.load(grad_ptr + i * STRIDE).to(tl.float64)
    meant = tl.full((), 1.0, tl.float64)
    if SYMMETRIC:
        share += _merged_share(share_ptr, B + i, B, splits, BLOCK_S)
        meant = meant * 0.5
    taken = taken * share
    if unit_ptr is not None:
        meant = meant * tl.load(unit_ptr)
    direction = meant * (query_sums - taken * positive)  # d / d (query / t)
    inv_t = scalar(inv_temperature, T_ON_DEVICE).to(tl.float64)
    tl.store(dinv_temperature_ptr + i, tl.sum(query * direction, 0))
    dquery = direction * inv_t
    if NORMALIZE:
        dquery = through_norm(dquery, query, query_scale, query_moves)
    dquery = dquery.to(tl.float32).to(dquery_ptr.dtype.element_ty)
    tl.store(dquery_ptr + i * D + d, dquery, mask=inside)
    key_sums = _merged_sums(sums_ptr, B + i, B, W, splits, BLOCK_S, BLOCK_D)
    dpositive = meant * inv_t * (key_sums - taken * query)
    if NORMALIZE:
        dpositive = through_norm(dpositive, positive, positive_scale, positive_moves)
    dpositive = dpositive.to(tl.float32).to(dpositive_ptr.dtype.element_ty)
    tl.store(dpositive_ptr + i * D + d, dpositive, mask=inside)


def pair_tile(BLOCK_D: int, splits: int) -> dict[str, int]:
    """As bank_contrast's queries are finished; what spills least has more registers a thread."""
    tile = combine_tile(BLOCK_D, splits)
    return {**tile, "num_warps": min(8, tile["num_warps"])}
