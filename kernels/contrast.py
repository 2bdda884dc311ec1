"""What the kernels of bank_contrast and indexed_contrast share: unit rows before the pass, and
after it the end of each query, from partial sums over splits of its negatives to loss and
gradients.

InfoNCE's logits are in units of log 2 in the pass (exp2 is what the hardware has), its partial sums
relative to 2^maximum. NCE's, with a = s - log Z - log(c + eps), are sums of softplus(a) and of
sigmoid(a) b; their maximum is 0. The end is computed in float64.
"""

import triton
import triton.language as tl
from codir_fast.kernels.labels import number_labels

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scalar(x, ON_DEVICE: tl.constexpr):
    """A number that came by value, or the one that x points to."""
    if ON_DEVICE:
        return tl.load(x).to(tl.float32)
    else:
        return tl.full((), 0.0, tl.float32) + x  # the interpreter hands numbers over as they are


@triton.jit
def logistic(a):
    """sigmoid(a) and softplus(a) = log(1 + e^a), with full relative precision where they are
    tiny.
    """
    small = tl.exp(-tl.abs(a))
    one = 1.0 + small
    # log(one) misses what rounding took from `small` in the sum; the quotient puts it back.
    exact = one == 1.0
    log1p = tl.where(exact, small, tl.log(one) * (small / tl.where(exact, 1.0, one - 1.0)))
    return tl.where(a > 0, 1.0, small) / one, tl.where(a > 0, a, 0.0) + log1p


@triton.jit
def add_compensated(total, lost, terms):
    """Kahan's sum of total and terms, and what was lost: sums of thousands of tiles wear off the
    last digits otherwise.
    """
    increment = terms - lost
    after = total + increment
    return after, (after - total) - increment


@triton.jit
def inverse_norm(row, NORMALIZE: tl.constexpr):
    """1 / max(|row|, 1e-12) of a row in float64, and whether the row is longer than that."""
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(row * row, 0))
        return 1.0 / tl.maximum(norm, 1e-12), norm > 1e-12  # as in torch.nn.functional.normalize
    else:
        return tl.full((), 1.0, tl.float64), tl.full((), 0, tl.int1)


@triton.jit
def through_norm(gradient, unit, inverse, moves):
    """Of a row, from that of its unit row: back through the division by the norm. `inverse` and
    `moves` as inverse_norm gave them.
    """
    along = tl.where(moves, tl.sum(gradient * unit, 0), 0.0)
    return (gradient - along * unit) * inverse


@triton.jit
def largest_maximum(maximum_ptr, stride, splits, BLOCK_S: tl.constexpr):
    """Of the splits' maxima of a row, which lie `stride` apart."""
    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * stride, mask=n < splits, other=-float("inf"))
        largest = tl.maximum(largest, maximum)
    return tl.max(largest, 0)


@triton.jit
def _unit_row(out_ptr, rows_ptr, n, D, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float64)
    inverse, _ = inverse_norm(row, True)
    unit = (row * inverse).to(tl.float32)
    tl.store(out_ptr + n * D + d, unit.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["B", "K", "num_rows", "label_blocks", "halvings"])
def prepare_kernel(
    unit_ptr,
    query_ptr,
    numbers_ptr,
    bank_numbers_ptr,
    labels_ptr,
    bank_labels_ptr,
    sought_ptr,
    B,
    K,
    D,
    num_rows,
    label_blocks,
    halvings,
    HAS_LABELS: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid (num_rows + label_blocks + blocks of K,): the queries that are to be brought to unit
    length, then labels as numbers (see labels.py), by those of the queries at sought_ptr.
    """
    n = tl.program_id(0)
    if n < num_rows:
        _unit_row(unit_ptr, query_ptr, n.to(tl.int64), D, BLOCK_D)
    elif HAS_LABELS:
        block = n - num_rows
        if block < label_blocks:
            number_labels(
                numbers_ptr,
                labels_ptr,
                sought_ptr,
                block,
                B,
                B,
                halvings,
                SORTED,
                BLOCK_N,
                BLOCK_B,
            )
        else:
            number_labels(
                bank_numbers_ptr,
                bank_labels_ptr,
                sought_ptr,
                block - label_blocks,
                K,
                B,
                halvings,
                SORTED,
                BLOCK_N,
                BLOCK_B,
            )


@triton.jit(do_not_specialize=["B", "splits"])
def combine_kernel(
    loss_ptr,
    lse_ptr,
    dquery_ptr,
    dpositive_ptr,
    dinv_temperature_ptr,
    maximum_ptr,
    total_ptr,
    rows_ptr,
    query_ptr,
    positive_ptr,
    inv_temperature,
    log_partition_ptr,
    log_noise,
    B,
    D,
    splits,
    NCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B,): merges the splits of one query, in an order that depends on their number alone."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    query = tl.load(query_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    largest = largest_maximum(maximum_ptr + i, B, splits, BLOCK_S)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros((BLOCK_S,), tl.float64)
    summed = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * B + i, mask=n < splits, other=-float("inf"))
        weight = tl.exp2(maximum - shift).to(tl.float64)
        total += weight * tl.load(total_ptr + n * B + i, mask=n < splits, other=0.0)
        rows = tl.load(
            rows_ptr + (n * B + i)[:, None] * D + d[None, :],
            mask=(n < splits)[:, None] & inside[None, :],
            other=0.0,
        )
        summed += weight[:, None] * rows
    total = tl.sum(total, 0)
    summed = tl.sum(summed, 0)

    query_scale, query_moves = inverse_norm(query, NORMALIZE)
    positive_scale, positive_moves = inverse_norm(positive, NORMALIZE)
    query = query * query_scale
    positive = positive * positive_scale
    inv_t = scalar(inv_temperature, T_ON_DEVICE).to(tl.float64)
    positive_logit = tl.sum(query * positive, 0) * inv_t
    if NCE:
        lse = tl.load(log_partition_ptr).to(tl.float64) + log_noise
        positive_weight, softplus = logistic(lse - positive_logit)
        loss = softplus + total
        direction = summed - positive_weight * positive
    else:
        # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+
        # is subtracted twice. No negative: total 0, gap -inf, loss 0.
        gap = (largest.to(tl.float64) * LN2 - positive_logit) + tl.log(total)
        positive_weight, loss = logistic(gap)  # what the positive's share lacks of 1
        lse = positive_logit + loss
        direction = positive_weight * (summed / tl.where(total == 0, 1.0, total) - positive)
    dquery = direction * inv_t
    dpositive = -positive_weight * query * inv_t
    if NORMALIZE:
        dquery = through_norm(dquery, query, query_scale, query_moves)
        dpositive = through_norm(dpositive, positive, positive_scale, positive_moves)
    tl.store(loss_ptr + i, loss)
    tl.store(lse_ptr + i, lse)
    tl.store(dinv_temperature_ptr + i, tl.sum(query * direction, 0))
    tl.store(dquery_ptr + i * D + d, dquery, mask=inside)
    tl.store(dpositive_ptr + i * D + d, dpositive, mask=inside)
