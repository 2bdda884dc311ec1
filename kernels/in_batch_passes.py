"""The passes of in_batch_contrast: a program keeps a block of one side's rows, and walks over rows
of the other.
"""

import triton
import triton.language as tl
from codir_fast.kernels.bank_access import dot_products, load_bank, load_queries
from codir_fast.kernels.contrast import LOG2E, add_compensated, inverse_norm, scalar


@triton.jit
def _padded_unit_row(out, row_ptr, n, B, D, W, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    row = tl.load(row_ptr + n * D + d, mask=(n < B) & (d < D), other=0.0)
    if NORMALIZE:
        inverse, _ = inverse_norm(row.to(tl.float64), True)
        row = (row * inverse).to(tl.float32)
    tl.store(out + n * W + d, row.to(out.dtype.element_ty), mask=d < W)


@triton.jit(do_not_specialize=["B"])
def in_batch_rows_kernel(
    rows_ptr,
    query_ptr,
    positive_ptr,
    B,
    D,
    W,
    padded_B,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (padded_B, 2): rows (2, padded_B, W), of query and positive, 0 beyond B and D."""
    n = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _padded_unit_row(rows_ptr, query_ptr, n, B, D, W, NORMALIZE, BLOCK_D)
    else:
        out = rows_ptr + padded_B.to(tl.int64) * W
        _padded_unit_row(out, positive_ptr, n, B, D, W, NORMALIZE, BLOCK_D)


@triton.jit
def _logits(
    query,
    queries,
    rows,
    x0,
    y0,
    own,
    others,
    label,
    labels_ptr,
    factor,
    B,
    W,
    HAS_LABELS: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Of rows x0.. of one side, which begins at row `own`, and y0.. of the other, -inf where they
    are no negatives of each other. If WHOLE, `query` holds the former, and the latter come with the
    logits; else `queries` is how tiles of the former are loaded.
    """
    every = tl.full((BLOCK_K,), 1, tl.int1)  # a padded side has whole tiles
    if WHOLE:
        OPERAND: tl.constexpr = query.dtype
        tile = load_bank(rows, others + y0, 0, every, W, OPERAND, False, TMA, BLOCK_K, BLOCK_D)
        s = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
    else:
        s = dot_products(
            queries,
            rows,
            own + x0,
            others + y0,
            every,
            2 * (own + others),
            W,
            False,
            PRECISION,
            TMA,
            BLOCK_B,
            BLOCK_K,
            CHUNK_D,
        )
        tile = s
    x, y = x0 + tl.arange(0, BLOCK_B), y0 + tl.arange(0, BLOCK_K)
    s = tl.where((x[:, None] != y[None, :]) & (y < B)[None, :], s * factor, -float("inf"))
    if HAS_LABELS:
        other = tl.load(labels_ptr + y, mask=y < B, other=0)
        s = tl.where(label[:, None] != other[None, :], s, -float("inf"))
    return s, tile


@triton.jit(do_not_specialize=["B", "rows_per_split"])
def in_batch_sums_kernel(
    maximum_ptr,
    total_ptr,
    queries,
    rows,
    labels_ptr,
    inv_temperature,
    B,
    W,
    padded_B,
    rows_per_split,
    HAS_LABELS: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of B, splits, ways): maximum (splits, ways, B) of a row's logits in units of log
    2, total the sum of 2^{s - maximum}. Way 0: queries among keys.
    """
    x0 = tl.program_id(0) * BLOCK_B
    x = x0 + tl.arange(0, BLOCK_B)
    split, way = tl.program_id(1), tl.program_id(2).to(tl.int64)
    own, others = way * padded_B, (1 - way) * padded_B
    label, query = x, x
    if HAS_LABELS:
        label = tl.load(labels_ptr + x, mask=x < B, other=0)
    if WHOLE:
        query = load_queries(queries, own + x, tl.arange(0, BLOCK_D), own + padded_B, W)
    factor = scalar(inv_temperature, T_ON_DEVICE) * LOG2E
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, B)
    shift = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    lost = tl.zeros((BLOCK_B,), tl.float32)
    for y0 in tl.range(first, end, BLOCK_K):
        s, _ = _logits(
            query,
            queries,
            rows,
            x0,
            y0,
            own,
            others,
            label,
            labels_ptr,
            factor,
            B,
            W,
            HAS_LABELS,
            WHOLE,
            PRECISION,
            TMA,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
            CHUNK_D,
        )
        larger = tl.maximum(shift, tl.max(s, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # no negative yet
        rescale = tl.exp2(shift - base)
        shift = larger
        terms = tl.sum(tl.exp2(s - base[:, None]), 1)
        total, lost = add_compensated(total * rescale, lost * rescale, terms)
    out = (split * tl.num_programs(2) + way) * B + x  # of 64 bits, as `way` is
    tl.store(maximum_ptr + out, shift, mask=x < B)
    tl.store(total_ptr + out, total, mask=x < B)


@triton.jit
def _shares(lse_ptr, grad_ptr, at, n, B, counts, STRIDE: tl.constexpr):
    """lse of rows n in units of log 2, in two parts, and what comes in for them; 0 and 1 where they
    do not count. STRIDE: 0 where the same comes in for all.
    """
    wanted = (n < B) & counts
    lse = tl.load(lse_ptr + at + n, mask=wanted, other=0.0) * LOG2E
    high = lse.to(tl.float32)
    grad = tl.load(grad_ptr + n * STRIDE, mask=wanted, other=1.0)
    return high, (lse - high).to(tl.float32), grad


@triton.jit
def _share_of(gap):
    """2^gap of a logit below lse, 1 at most: a long one, made again, may have been rounded the
    other way.
    """
    return tl.exp2(tl.minimum(gap, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["B", "rows_per_split"])
def in_batch_gradient_sums_kernel(
    share_ptr,
    sums_ptr,
    queries,
    rows,
    lse_ptr,
    grad_ptr,
    labels_ptr,
    inv_temperature,
    B,
    W,
    padded_B,
    rows_per_split,
    STRIDE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of B, splits, 2 sides of each piece of D): share (splits, 2, B), the sum of
    e^{s - lse} over a row's own negatives; sums (splits, 2, B, W) of the other side's rows, each by
    e^{s - lse} times the gradient of the loss, of each way.
    """
    OPERAND: tl.constexpr = queries.dtype.element_ty
    x0 = tl.program_id(0) * BLOCK_B
    x = x0 + tl.arange(0, BLOCK_B)
    split, side = tl.program_id(1), (tl.program_id(2) % 2).to(tl.int64)
    d0 = (tl.program_id(2) // 2) * BLOCK_D
    own, others = side * padded_B, (1 - side) * padded_B
    label, query = x, x
    if HAS_LABELS:
        label = tl.load(labels_ptr + x, mask=x < B, other=0)
    if WHOLE:
        query = load_queries(queries, own + x, tl.arange(0, BLOCK_D), own + padded_B, W)
    # Which way a row of this side looks, and one of the other; one way, one side looks.
    if SYMMETRIC:
        x_at, y_at = side * B, (1 - side) * B
    else:
        x_at, y_at = 0, 0
    x_looks, y_looks = SYMMETRIC or side == 0, SYMMETRIC or side == 1
    x_high, x_low, x_grad = _shares(lse_ptr, grad_ptr, x_at, x, B, x_looks, STRIDE)
    factor = scalar(inv_temperature, T_ON_DEVICE) * LOG2E
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, B)
    share = tl.zeros((BLOCK_B,), tl.float32)
    lost = tl.zeros((BLOCK_B,), tl.float32)
    sums = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for y0 in tl.range(first, end, BLOCK_K):
        y = y0 + tl.arange(0, BLOCK_K)
        s, tile = _logits(
            query,
            queries,
            rows,
            x0,
            y0,
            own,
            others,
            label,
            labels_ptr,
            factor,
            B,
            W,
            HAS_LABELS,
            WHOLE,
            PRECISION,
            TMA,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
            CHUNK_D,
        )
        y_high, y_low, y_grad = _shares(lse_ptr, grad_ptr, y_at, y, B, y_looks, STRIDE)
        # In two parts: the first is taken from a logit near lse without rounding.
        if SYMMETRIC:
            looking = _share_of((s - x_high[:, None]) - x_low[:, None])
            looked_at = _share_of((s - y_high[None, :]) - y_low[None, :])
            weight = looking * x_grad[:, None] + looked_at * y_grad[None, :]
        else:
            high, low = x_high[:, None] + y_high[None, :], x_low[:, None] + y_low[None, :]
            looking = _share_of((s - high) - low)
            weight = looking * (x_grad[:, None] * y_grad[None, :])
        share, lost = add_compensated(share, lost, tl.sum(looking, 1))
        if not WHOLE:
            every = tl.full((BLOCK_K,), 1, tl.int1)
            at = others + y0
            tile = load_bank(rows, at, d0, every, W, OPERAND, False, False, BLOCK_K, BLOCK_D)
        sums = tl.dot(weight.to(OPERAND), tile, sums, input_precision=PRECISION)
    d = d0 + tl.arange(0, BLOCK_D)
    out = (split * 2 + side) * B + x
    tl.store(share_ptr + out, share, mask=(x < B) & (d0 == 0))
    inside = (x < B)[:, None] & (d < W)[None, :]
    tl.store(sums_ptr + out[:, None] * W + d[None, :], sums, mask=inside)


def rows_tile(BLOCK_D: int) -> dict[str, int]:
    return {"BLOCK_D": BLOCK_D, "num_warps": 4 if BLOCK_D >= 512 else 1}
