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

import torch
import triton
import triton.language as tl
from codir_fast.kernels import autotune, tiles, work_split
from codir_fast.kernels.bank_access import (
    describe,
    load_bank,
    load_picks,
    load_queries,
    load_scale,
    mask_logits,
)
from codir_fast.kernels.bank_contrast_wide import two_products
from codir_fast.kernels.contrast import LOG2E, add_compensated, logistic, scalar
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import QUERY_DTYPES, Problem, check
from torch import Tensor

# Of logits of unit rows, in units of log 2: terms e^{s - 1/t} down to e^{-2/t} are normal numbers.
MAX_FIXED_SHIFT = tl.constexpr(62.5)
# Of terms under the fixed shift; below, they may have lost digits to underflow, and above, the sum
# of their rows may overflow: elements up to 2^27 fit.
SMALLEST_TOTAL = tl.constexpr(2.0**-100)
LARGEST_TOTAL = tl.constexpr(2.0**100)


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
        scale, usable = load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
        tile = load_bank(bank, j0, 0, usable, D, OPERAND, HAS_VALID, TMA, BLOCK_K, BLOCK_D)
        s = tl.dot(query, tl.trans(tile), input_precision=PRECISION) * factor
        if HAS_SCALE:
            s = s * scale[None, :]
        if not (NCE or FOLLOW) and (HAS_LABELS or HAS_EXCLUDE or HAS_VALID):
            # A row that counts leaves a trace in the total; NaN stays NaN.
            s = tl.maximum(s, factor - 126.0, propagate_nan=tl.PropagateNan.ALL)
        s = mask_logits(
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
    query = load_queries(query_ptr, i, d, B, D)
    label, excluded = load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS, HAS_EXCLUDE)
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
        overflow = tl.max(tl.where(total < LARGEST_TOTAL, 0, 1), 0) > 0  # NaN is not below it
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

    Seen right on an H200; for other GPUs compiled only, and run by the interpreter.

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
            sums = autotune.run_best(key, narrow, lambda t: _one_pass(problem, t), query.device)
        else:
            sums = two_products(problem)
        problem.combine(outputs, sums, positive)
    return outputs


def _one_pass(problem: Problem, tile: tiles.Tile) -> tuple[Tensor, Tensor, Tensor]:
    B, K, D = problem.B, problem.K, problem.D
    tile = dict(tile)
    rows_per_program = work_split.split(B, K, D, problem.dtype, tile, problem.device)
    sums = problem.partial_sums(max(1, cdiv(K, rows_per_program)))
    bank, TMA = describe(problem.bank, (tile["BLOCK_K"], tile["BLOCK_D"]), tile.pop("TMA"))
    query, masks = problem.prepare()
    launch(
        bank_contrast_kernel,
        (cdiv(B, tile["BLOCK_B"]), sums[0].shape[0]),
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
