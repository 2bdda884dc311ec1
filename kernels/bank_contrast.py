"""bank_contrast: contrastive loss of B queries against all K bank rows; loss and gradients in one
bank pass.

Up to a width that registers hold, a program keeps BLOCK_B queries and walks over its split of the
bank: s = q.b/t, weights e^{s - shift} (sigmoid in NCE), sums of weights and of weight * b, as
attention does with keys = values = bank. Rows of unit length allow the fixed shift 1/t. A program
whose sums overflow or vanish all the same, and float16, whose weights would vanish, follow the
running maximum. Wider embeddings take two products over chunks of the bank that stay in cache:
weights, then weights times rows. Either way combine_kernel merges the splits in a fixed order.
Nothing of size B x K exists.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.contrast import (
    LOG2E,
    QUERY_DTYPES,
    Problem,
    add_compensated,
    check,
    logistic,
    padded,
    scalar,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of logits of unit rows, in units of log 2: terms e^{s - 1/t} down to e^{-2/t} are normal numbers.
MAX_FIXED_SHIFT = tl.constexpr(62.5)
# Of terms under the fixed shift; below, they may have lost digits to underflow.
SMALLEST_TOTAL = tl.constexpr(2.0**-100)


@triton.jit
def _load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE: tl.constexpr, HAS_VALID: tl.constexpr):
    """Scale of bank rows j, and which of them may be read: not past the end, and valid."""
    usable = j < K
    if HAS_VALID:
        usable = usable & (tl.load(valid_ptr + j, mask=usable, other=0) != 0)
    scale = tl.full(j.shape, 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + j, mask=usable, other=0.0)
    return scale, usable


@triton.jit
def _widened(rows):
    """float8 becomes float32; other rows stay what they are."""
    if rows.dtype == tl.float8e4nv:
        return rows.to(tl.float32)
    else:
        return rows


@triton.jit
def _load_bank(
    bank,
    j0,
    d0,
    usable,
    D,
    OPERAND: tl.constexpr,
    HAS_VALID: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows j0.. and columns d0.. of the bank, 0 where a row is not usable: it may hold NaN."""
    if TMA:
        rows = _widened(bank.load([tl.cast(j0, tl.int32), d0]))
        if HAS_VALID:
            rows = tl.where(usable[:, None], rows, 0.0)
    else:
        d = d0 + tl.arange(0, BLOCK_D)
        at = bank + j0 * D + (tl.arange(0, BLOCK_K)[:, None] * D + d[None, :])
        rows = _widened(tl.load(at, mask=usable[:, None] & (d < D)[None, :], other=0.0))
    return rows.to(OPERAND)


@triton.jit
def _load_queries(query_ptr, i, d, B, D):
    inside = (i < B)[:, None] & (d < D)[None, :]
    return tl.load(query_ptr + i[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _mask(
    s,
    label,
    excluded,
    bank_labels_ptr,
    j0,
    usable,
    K,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits (BLOCK_B, BLOCK_K), -inf where a row is no negative."""
    # Places within the tile: a thread knows its own, and needs no register for each.
    place = tl.arange(0, BLOCK_K)
    if HAS_VALID:
        s = tl.where(usable[None, :], s, -float("inf"))
    elif HAS_TAIL:
        left = tl.minimum(K - j0, BLOCK_K).to(tl.int32)
        s = tl.where((place < left)[None, :], s, -float("inf"))
    if HAS_LABELS:
        bank_label = tl.load(bank_labels_ptr + j0 + place, mask=usable, other=-1)
        s = tl.where(label[:, None] != bank_label[None, :], s, -float("inf"))
    if HAS_EXCLUDE:
        near = (excluded >= j0) & (excluded < j0 + BLOCK_K)
        own = tl.where(near, (excluded - j0).to(tl.int32), -1)
        s = tl.where(own[:, None] != place[None, :], s, -float("inf"))
    return s


@triton.jit
def _load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS: tl.constexpr, HAS_EXCLUDE: tl.constexpr):
    """Label and excluded row of each query."""
    label, excluded = i, i
    if HAS_LABELS:
        label = tl.load(labels_ptr + i, mask=i < B, other=-1)
    if HAS_EXCLUDE:
        excluded = tl.load(exclude_ptr + i, mask=i < B, other=-1)
    return label, excluded


@triton.jit
def _scan(
    shift,
    query,
    label,
    excluded,
    bank,
    scale_ptr,
    bank_labels_ptr,
    valid_ptr,
    factor,
    offset,
    extra,
    first,
    end,
    K,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    NCE: tl.constexpr,
    FOLLOW: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Shift, sum of terms and of weighted rows over bank rows [first, end). FOLLOW: the shift is
    the running maximum.
    """
    OPERAND: tl.constexpr = query.dtype
    total = tl.zeros((BLOCK_B,), tl.float32)
    lost = tl.zeros((BLOCK_B,), tl.float32)
    rows = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for j0 in tl.range(first, end, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        scale, usable = _load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
        tile = _load_bank(bank, j0, 0, usable, D, OPERAND, HAS_VALID, TMA, BLOCK_K, BLOCK_D)
        s = tl.dot(query, tl.trans(tile), input_precision=PRECISION) * factor
        if HAS_SCALE:
            s = s * scale[None, :]
        if not (NCE or FOLLOW) and (HAS_LABELS or HAS_EXCLUDE or HAS_VALID):
            # A row that counts leaves a trace in the total; NaN stays NaN.
            s = tl.maximum(s, factor - 126.0, propagate_nan=tl.PropagateNan.ALL)
        s = _mask(
            s,
            label,
            excluded,
            bank_labels_ptr,
            j0,
            usable,
            K,
            HAS_LABELS,
            HAS_EXCLUDE,
            HAS_VALID,
            HAS_TAIL,
            BLOCK_K,
        )
        if NCE:
            weight, term = logistic(s - offset)
            term = tl.where(s == -float("inf"), 0.0, term + extra)
        else:
            if FOLLOW:
                larger = tl.maximum(shift, tl.max(s, 1))
                base = tl.where(larger == -float("inf"), 0.0, larger)  # no allowed row yet
                rescale = tl.exp2(shift - base)
                shift = larger
                lost = lost * rescale
                total = total * rescale
                rows = rows * rescale[:, None]
            else:
                base = shift
            weight = tl.exp2(s - base[:, None])
            term = weight
        total, lost = add_compensated(total, lost, tl.sum(term, 1))
        if HAS_SCALE:
            weight = weight * scale[None, :]
        rows = tl.dot(weight.to(OPERAND), tile, rows, input_precision=PRECISION)
    return shift, total, rows


@triton.jit(do_not_specialize=["B", "K", "rows_per_split"])
def bank_contrast_kernel(
    maximum_ptr,
    total_ptr,
    rows_ptr,
    query_ptr,
    bank,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    inv_temperature,
    log_partition_ptr,
    log_noise,
    extra,
    B,
    K,
    D,
    rows_per_split,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    NCE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of B, splits): maximum (splits, B) in units of log 2, total sum of
    2^{s - maximum}, rows (splits, B, D) sum of 2^{s - maximum} b. NCE: maximum 0, total the sum of
    its terms, rows that of sigmoid(a) b.
    """
    OPERAND: tl.constexpr = query_ptr.dtype.element_ty
    i = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    query = _load_queries(query_ptr, i, d, B, D)
    label, excluded = _load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS, HAS_EXCLUDE)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    end = tl.minimum(first + rows_per_split, K)
    factor = scalar(inv_temperature, T_ON_DEVICE)
    offset = 0.0
    if NCE:
        offset = tl.load(log_partition_ptr).to(tl.float32) + log_noise
        shift = tl.zeros((BLOCK_B,), tl.float32)
    else:
        factor = factor * LOG2E
        shift = tl.full((BLOCK_B,), -float("inf"), tl.float32)
    HAS_MASKS: tl.constexpr = HAS_LABELS or HAS_EXCLUDE or HAS_VALID
    fixed: tl.constexpr = NCE or (FIXED and tl.float16 != OPERAND)
    total = tl.zeros((BLOCK_B,), tl.float32)
    rows = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    follow = True
    if fixed:
        fits = True
        if not NCE:
            shift = tl.full((BLOCK_B,), 0.0, tl.float32) + factor
            fits = factor <= MAX_FIXED_SHIFT
        shift, total, rows = _scan(
            shift,
            query,
            label,
            excluded,
            bank,
            scale_ptr,
            bank_labels_ptr,
            valid_ptr,
            factor,
            offset,
            extra,
            first,
            tl.where(fits, end, first),
            K,
            D,
            HAS_SCALE,
            HAS_LABELS,
            HAS_EXCLUDE,
            HAS_VALID,
            HAS_TAIL,
            NCE,
            False,
            PRECISION,
            TMA,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
        )
        overflow = tl.max(tl.where(total < float("inf"), 0, 1), 0) > 0  # NaN is not below it
        follow = overflow | (not fits)
        if not NCE:
            # Terms that vanish, or lost digits: not where nothing was allowed.
            too_small = (total < SMALLEST_TOTAL) & ((not HAS_MASKS) | (total > 0))
            follow = follow | (tl.max(too_small.to(tl.int32), 0) > 0)
    if not NCE:  # noqa: SIM102 (known to the compiler, as the next is not)
        if follow:
            shift, total, rows = _scan(
                tl.full((BLOCK_B,), -float("inf"), tl.float32),
                query,
                label,
                excluded,
                bank,
                scale_ptr,
                bank_labels_ptr,
                valid_ptr,
                factor,
                offset,
                extra,
                first,
                end,
                K,
                D,
                HAS_SCALE,
                HAS_LABELS,
                HAS_EXCLUDE,
                HAS_VALID,
                HAS_TAIL,
                NCE,
                True,
                PRECISION,
                TMA,
                BLOCK_B,
                BLOCK_K,
                BLOCK_D,
            )
    out = split * B + i
    tl.store(maximum_ptr + out, shift, mask=i < B)
    tl.store(total_ptr + out, total, mask=i < B)
    inside = (i < B)[:, None] & (d < D)[None, :]
    tl.store(rows_ptr + out[:, None] * D + d[None, :], rows, mask=inside)


@triton.jit
def _product(
    query_ptr,
    bank,
    i,
    j0,
    usable,
    B,
    D,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """q_i.b_j over all D, CHUNK_D columns at a time. query_ptr: a descriptor with TMA."""
    s = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for d0 in tl.range(0, D, CHUNK_D):
        if TMA:
            query = query_ptr.load([tl.program_id(0) * BLOCK_B, d0])
        else:
            query = _load_queries(query_ptr, i, d0 + tl.arange(0, CHUNK_D), B, D)
        tile = _load_bank(bank, j0, d0, usable, D, query.dtype, HAS_VALID, TMA, BLOCK_K, CHUNK_D)
        s = tl.dot(query, tl.trans(tile), s, input_precision=PRECISION)
    return s


@triton.jit(do_not_specialize=["B", "K", "chunk_begin"])
def bank_contrast_weights_kernel(
    weights_ptr,
    maximum_ptr,
    total_ptr,
    query_ptr,
    bank,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    inv_temperature,
    log_partition_ptr,
    log_noise,
    extra,
    B,
    K,
    D,
    chunk_begin,
    chunk_rows,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    NCE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of B, tiles of the chunk): weights (B, chunk_rows) relative to the tile's own
    maximum, which is stored with the sum of terms, (tiles, B).
    """
    i = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K
    j0 = tl.cast(chunk_begin, tl.int64) + column
    j = j0 + tl.arange(0, BLOCK_K)
    scale, usable = _load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
    s = _product(
        query_ptr, bank, i, j0, usable, B, D, HAS_VALID, PRECISION, TMA, BLOCK_B, BLOCK_K, CHUNK_D
    )
    factor = scalar(inv_temperature, T_ON_DEVICE)
    if not NCE:
        factor = factor * LOG2E
    s = s * factor
    if HAS_SCALE:
        s = s * scale[None, :]
    label, excluded = _load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS, HAS_EXCLUDE)
    s = _mask(
        s,
        label,
        excluded,
        bank_labels_ptr,
        j0,
        usable,
        K,
        HAS_LABELS,
        HAS_EXCLUDE,
        HAS_VALID,
        HAS_TAIL,
        BLOCK_K,
    )
    if NCE:
        offset = tl.load(log_partition_ptr).to(tl.float32) + log_noise
        weight, term = logistic(s - offset)
        term = tl.where(s == -float("inf"), 0.0, term + extra)
        maximum = tl.zeros((BLOCK_B,), tl.float32)
    else:
        maximum = tl.max(s, 1)
        weight = tl.exp2(s - tl.where(maximum == -float("inf"), 0.0, maximum)[:, None])
        term = weight
    out = tl.program_id(1).to(tl.int64) * B + i
    tl.store(maximum_ptr + out, maximum, mask=i < B)
    tl.store(total_ptr + out, tl.sum(term, 1), mask=i < B)
    if HAS_SCALE:
        weight = weight * scale[None, :]
    at = weights_ptr + i[:, None] * chunk_rows + (column + tl.arange(0, BLOCK_K))[None, :]
    tl.store(at, weight.to(weights_ptr.dtype.element_ty), mask=(i < B)[:, None])


@triton.jit(do_not_specialize=["B", "K", "chunk_begin", "tiles_in_chunk", "tiles_per_split"])
def bank_contrast_rows_kernel(
    maximum_ptr,
    total_ptr,
    rows_ptr,
    maximum_before_ptr,
    total_before_ptr,
    weights_ptr,
    tile_maximum_ptr,
    tile_total_ptr,
    bank,
    valid_ptr,
    B,
    K,
    D,
    chunk_begin,
    chunk_rows,
    tiles_in_chunk,
    tiles_per_split,
    HAS_VALID: tl.constexpr,
    FIRST: tl.constexpr,
    NCE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (blocks of B, blocks of D, splits of the chunk): adds the chunk's weighted rows to those
    of the chunks before, under the larger of their maxima.
    """
    OPERAND: tl.constexpr = weights_ptr.dtype.element_ty
    i = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    d0 = tl.program_id(1) * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    out = split.to(tl.int64) * B + i
    at = rows_ptr + out[:, None] * D + d[None, :]
    inside = (i < B)[:, None] & (d < D)[None, :]
    if FIRST:
        maximum = tl.full((BLOCK_B,), -float("inf"), tl.float32)
        if NCE:
            maximum = tl.zeros((BLOCK_B,), tl.float32)
        total = tl.zeros((BLOCK_B,), tl.float32)
        rows = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    else:
        maximum = tl.load(maximum_before_ptr + out, mask=i < B, other=0.0)
        total = tl.load(total_before_ptr + out, mask=i < B, other=0.0)
        rows = tl.load(at, mask=inside, other=0.0)
    lost = tl.zeros((BLOCK_B,), tl.float32)
    end = tl.minimum((split + 1) * tiles_per_split, tiles_in_chunk)
    for n in tl.range(split * tiles_per_split, end):
        column = n * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weights_ptr + i[:, None] * chunk_rows + column[None, :],
            mask=(i < B)[:, None],
            other=0.0,
        )
        j0 = tl.cast(chunk_begin, tl.int64) + n * BLOCK_K
        j = j0 + tl.arange(0, BLOCK_K)
        _, usable = _load_scale(valid_ptr, valid_ptr, j, K, False, HAS_VALID)
        tile = _load_bank(bank, j0, d0, usable, D, OPERAND, HAS_VALID, TMA, BLOCK_K, BLOCK_D)
        part = tl.cast(n, tl.int64) * B + i
        term = tl.load(tile_total_ptr + part, mask=i < B, other=0.0)
        if NCE:
            rows = tl.dot(weight, tile, rows, input_precision=PRECISION)
        else:
            of_tile = tl.load(tile_maximum_ptr + part, mask=i < B, other=0.0)
            larger = tl.maximum(maximum, of_tile)
            base = tl.where(larger == -float("inf"), 0.0, larger)
            rescale = tl.exp2(maximum - base)
            share = tl.exp2(of_tile - base)
            maximum = larger
            lost = lost * rescale
            total = total * rescale
            term = term * share
            product = tl.dot(weight, tile, input_precision=PRECISION)
            rows = rows * rescale[:, None] + product * share[:, None]
        total, lost = add_compensated(total, lost, term)
    # Programs of other columns still read what the chunks before left: it is not overwritten.
    first_columns = (i < B) & (tl.program_id(1) == 0)
    tl.store(maximum_ptr + out, maximum, mask=first_columns)
    tl.store(total_ptr + out, total, mask=first_columns)
    tl.store(at, rows, mask=inside)


@triton.jit(do_not_specialize=["B", "K"])
def bank_contrast_backward_kernel(
    dbank_ptr,
    grad_ptr,
    lse_ptr,
    query_ptr,
    bank,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    inv_temperature,
    B,
    K,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NCE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of K, blocks of D): a program owns a piece of dbank and walks over all
    queries.
    """
    OPERAND: tl.constexpr = query_ptr.dtype.element_ty
    j0 = tl.program_id(0).to(tl.int64) * BLOCK_K
    j = j0 + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    scale, usable = _load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
    factor = scalar(inv_temperature, T_ON_DEVICE)
    dbank = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i0 in range(0, B, BLOCK_B):
        i = (i0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        s = _product(
            query_ptr,
            bank,
            i,
            j0,
            usable,
            B,
            D,
            HAS_VALID,
            PRECISION,
            False,
            BLOCK_B,
            BLOCK_K,
            CHUNK_D,
        )
        s = s * factor
        if HAS_SCALE:
            s = s * scale[None, :]
        label, excluded = _load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS, HAS_EXCLUDE)
        s = _mask(
            s,
            label,
            excluded,
            bank_labels_ptr,
            j0,
            usable,
            K,
            HAS_LABELS,
            HAS_EXCLUDE,
            HAS_VALID,
            True,
            BLOCK_K,
        )
        lse = tl.load(lse_ptr + i, mask=i < B, other=0.0)
        grad = tl.load(grad_ptr + i, mask=i < B, other=0.0)
        # In two parts: the first is taken from a logit near lse without rounding.
        high = lse.to(tl.float32)
        low = (lse - high).to(tl.float32)
        gap = (s - high[:, None]) - low[:, None]
        if NCE:
            weight, _ = logistic(gap)
        else:
            weight = tl.exp(gap)
        weight = weight * (grad * factor)[:, None]
        query = _load_queries(query_ptr, i, d, B, D)
        weight = tl.trans(weight).to(OPERAND)
        dbank = tl.dot(weight, query, dbank, input_precision=PRECISION)
    if HAS_SCALE:
        dbank = dbank * scale[:, None]
    # A row that is not usable has only zero weights.
    inside = (j < K)[:, None] & (d < D)[None, :]
    at = dbank_ptr + j[:, None] * D + d[None, :]
    tl.store(at, dbank.to(dbank_ptr.dtype.element_ty), mask=inside)


def bank_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
    normalize: bool = False,
) -> tuple[Tensor, ...]:
    """Loss of each query against all allowed bank rows, with its gradients; any temperature.

    InfoNCE, or NCE where log Z is given. Products run in the dtype of the query, float32 ones as
    torch.backends.cuda.matmul.fp32_precision says (by default in full precision, as three products
    of tf32 parts); sums in float32, the end of each query in float64.

    Not seen on a GPU yet: run by the interpreter, and compiled for sm_80, sm_90 and sm_100.

    Args:
        query, positive: (B, D), float32, bfloat16 or float16, D up to 4096.
        bank: (K, D), float32, bfloat16 or float16; or float8_e4m3fn, which needs sm_89 or newer,
            with the factors of its rows as bank_scale. It takes half the memory of bfloat16;
            gradients are right to about 1 % of their largest element at t = 0.07 (D =
            128, random unit rows), and worse at lower temperatures.
        inv_temperature: 0-d, 1/t, on the CPU or the query's device.
        bank_scale: (K,) float32, a factor of each bank row.
        labels, bank_labels: (B,) and (K,) int64: rows of the query's own label are no negatives.
        exclude_index: (B,) int64: one row that is no negative, -1 for none.
        valid: (K,) bool: other rows are no negatives, and are not read.
        log_partition: 0-d, log Z of NCE, on the query's device.
        num_noise, num_data: M and n of NCE, c = M / n.
        normalize: L2-normalise query and positive; the gradients are of what was given.

    Returns:
        loss (B,), lse (B,), dquery (B, D), dpositive (B, D), dinv_temperature (B,) in float32, lse
        in float64: log-sum-exp with the positive (NCE: log Z + log(c + eps)), and the derivatives
        of loss_i.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    objective = (log_partition, num_noise, num_data)
    problem = Problem(query, bank, inv_temperature, bank_scale, *masks, *objective, normalize)
    check("positive", positive, tuple(query.shape), QUERY_DTYPES, query.device)
    outputs = problem.outputs()
    if problem.B == 0:
        return outputs
    with torch.cuda.device_of(query):
        arch = tiles.architecture(query.device)
        sizes = (problem.B, problem.D)
        narrow = tiles.bank_contrast(arch, query.dtype, *sizes, problem.flags, bank.dtype)
        if narrow:
            flags = tuple(problem.flags.items())
            key = ("bank_contrast", problem.B, problem.K, problem.D, query.dtype, bank.dtype, flags)
            sums = tiles.run_best(key, narrow, lambda t: _one_pass(problem, t), query.device)
        else:
            sums = _two_products(problem)
        problem.combine(outputs, sums, positive)
    return outputs


def _one_pass(problem: Problem, tile: tiles.Tile) -> tuple[Tensor, Tensor, Tensor]:
    B, K, D = problem.B, problem.K, problem.D
    tile = dict(tile)
    rows_per_program = tiles.split(B, K, D, problem.dtype, tile, problem.device)
    sums = problem.partial_sums(max(1, triton.cdiv(K, rows_per_program)))
    bank, TMA = _described(problem.bank, (tile["BLOCK_K"], tile["BLOCK_D"]), tile.pop("TMA"))
    query, masks = problem.prepare()
    bank_contrast_kernel[(triton.cdiv(B, tile["BLOCK_B"]), sums[0].shape[0])](
        *sums,
        query,
        bank,
        *masks,
        problem.inv_temperature,
        *problem.nce,
        *(B, K, D, rows_per_program),
        HAS_TAIL=K % tile["BLOCK_K"] != 0,
        TMA=TMA,
        **problem.flags,
        **tile,
    )
    return sums


def _two_products(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    B, K, D, dtype, device = problem.B, problem.K, problem.D, problem.dtype, problem.device
    arch = tiles.architecture(device)
    first, second = tiles.bank_contrast_wide(arch, dtype, problem.flags, problem.bank.dtype)
    BLOCK_K = first["BLOCK_K"]
    chunk = min(tiles.chunk_rows(B, D, dtype, BLOCK_K), triton.cdiv(max(K, 1), BLOCK_K) * BLOCK_K)
    blocks = triton.cdiv(B, second["BLOCK_B"]) * triton.cdiv(D, second["BLOCK_D"])
    num_tiles = chunk // BLOCK_K
    splits = max(1, min(num_tiles, tiles.num_programs(device, 1) // blocks))
    per_split = triton.cdiv(num_tiles, splits)
    splits = triton.cdiv(num_tiles, per_split)
    maximum, total, rows = problem.partial_sums(splits)
    before = torch.empty_like(maximum), torch.empty_like(total)
    tile_maximum, tile_total = (torch.empty(num_tiles, B, device=device) for _ in range(2))
    query, masks = problem.prepare()
    weights = torch.empty(B, chunk, dtype=dtype, device=device)
    # The kernel takes both through the copy engine, or neither.
    wants_tma = first.pop("TMA") and _fits_copy_engine(query)
    bank_of_first, TMA = _described(problem.bank, (BLOCK_K, first["CHUNK_D"]), wants_tma)
    bank_of_second, _ = _described(problem.bank, (BLOCK_K, second["BLOCK_D"]), TMA)
    described, _ = _described(query, (first["BLOCK_B"], first["CHUNK_D"]), TMA)
    precision = {"PRECISION": problem.flags["PRECISION"], "TMA": TMA}
    *_, valid = masks
    for begin in range(0, max(K, 1), chunk):
        in_chunk = triton.cdiv(min(chunk, K - begin), BLOCK_K)
        bank_contrast_weights_kernel[(triton.cdiv(B, first["BLOCK_B"]), max(in_chunk, 1))](
            weights,
            tile_maximum,
            tile_total,
            described,
            bank_of_first,
            *masks,
            problem.inv_temperature,
            *problem.nce,
            *(B, K, D, begin, chunk),
            HAS_TAIL=K % BLOCK_K != 0 or K == 0,
            TMA=TMA,
            **problem.flags,
            **first,
        )
        # Read and written in turn: programs of one launch read what others of it would overwrite.
        (maximum, total), before = before, (maximum, total)
        grid = (triton.cdiv(B, second["BLOCK_B"]), triton.cdiv(D, second["BLOCK_D"]), splits)
        bank_contrast_rows_kernel[grid](
            maximum,
            total,
            rows,
            *before,
            weights,
            tile_maximum,
            tile_total,
            bank_of_second,
            valid,
            *(B, K, D, begin, chunk, in_chunk, per_split),
            HAS_VALID=valid is not None,
            FIRST=begin == 0,
            NCE=problem.flags["NCE"],
            BLOCK_K=BLOCK_K,
            **precision,
            **second,
        )
    return maximum, total, rows


def _fits_copy_engine(tensor: Tensor) -> bool:
    """Rows begin at multiples of 16 bytes, and there are some, by numbers of 32 bits."""
    row_bytes = tensor.shape[1] * tensor.element_size()
    return 0 < tensor.shape[0] < 1 << 31 and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0


def _described(tensor: Tensor, block: tuple[int, int], wanted: bool) -> tuple[Any, bool]:
    """A tensor as a kernel loads its blocks, and whether that is through the copy engine: if it is
    wanted, and the tensor fits.
    """
    if not (wanted and _fits_copy_engine(tensor)):
        return tensor, False
    return TensorDescriptor.from_tensor(tensor, list(block)), True


def bank_contrast_backward(
    grad_loss: Tensor,
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
    normalize: bool = False,
) -> Tensor:
    """Gradient to the bank, (K, D) in its dtype; 0 in rows that are not valid.

    `grad_loss` is (B,) float32, `lse` (B,) as bank_contrast returned it; the other arguments as
    they were given to it.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    objective = (log_partition, num_noise, num_data)
    problem = Problem(query, bank, inv_temperature, bank_scale, *masks, *objective, normalize)
    B, K, D = problem.B, problem.K, problem.D
    check("bank", bank, (K, D), QUERY_DTYPES, query.device)
    check("grad_loss", grad_loss, (B,), (torch.float32,), query.device)
    check("lse", lse, (B,), (torch.float64,), query.device)
    dbank = torch.empty(K, D, dtype=bank.dtype, device=bank.device)
    if K == 0 or B == 0:
        return dbank.zero_()
    tile = tiles.bank_contrast_backward(tiles.architecture(query.device), query.dtype, padded(D))
    with torch.cuda.device_of(query):
        operand, masks = problem.prepare()
        grid = (triton.cdiv(K, tile["BLOCK_K"]), triton.cdiv(D, tile["BLOCK_D"]))
        bank_contrast_backward_kernel[grid](
            dbank,
            grad_loss.contiguous(),
            lse.contiguous(),
            operand,
            problem.bank,
            *masks,
            problem.inv_temperature,
            *(B, K, D),
            **problem.flags,
            **tile,
        )
    return dbank
