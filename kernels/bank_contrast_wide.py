"""bank_contrast of embeddings wider than registers hold: two products over chunks of the bank that
stay in cache, weights, then weights times rows.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles, work_split
from codir_fast.kernels.bank_access import (
    describe,
    dot_products,
    fits_copy_engine,
    load_bank,
    load_picks,
    load_scale,
    mask_logits,
)
from codir_fast.kernels.contrast import LOG2E, add_compensated, logistic, scalar
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import Problem
from torch import Tensor


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
    i0 = tl.program_id(0) * BLOCK_B
    i = (i0 + tl.arange(0, BLOCK_B)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K
    j0 = tl.cast(chunk_begin, tl.int64) + column
    j = j0 + tl.arange(0, BLOCK_K)
    scale, usable = load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
    s = dot_products(
        query_ptr, bank, i0, j0, usable, B, D, HAS_VALID, PRECISION, TMA, BLOCK_B, BLOCK_K, CHUNK_D
    )
    factor = scalar(inv_temperature, T_ON_DEVICE)
    if not NCE:
        factor = factor * LOG2E
    s = s * factor
    if HAS_SCALE:
        s = s * scale[None, :]
    label, excluded = load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS, HAS_EXCLUDE)
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
        _, usable = load_scale(valid_ptr, valid_ptr, j, K, False, HAS_VALID)
        tile = load_bank(bank, j0, d0, usable, D, OPERAND, HAS_VALID, TMA, BLOCK_K, BLOCK_D)
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


def two_products(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    B, K, D, dtype, device = problem.B, problem.K, problem.D, problem.dtype, problem.device
    arch = tiles.architecture(device)
    first, second = tiles.bank_contrast_wide(arch, dtype, B, problem.flags, problem.bank.dtype)
    BLOCK_K = first["BLOCK_K"]
    chunk = min(work_split.chunk_rows(B, D, dtype, BLOCK_K), cdiv(max(K, 1), BLOCK_K) * BLOCK_K)
    blocks = cdiv(B, second["BLOCK_B"]) * cdiv(D, second["BLOCK_D"])
    num_tiles = chunk // BLOCK_K
    splits = max(1, min(num_tiles, work_split.num_programs(device, 1) // blocks))
    per_split = cdiv(num_tiles, splits)
    splits = cdiv(num_tiles, per_split)
    maximum, total, rows = problem.partial_sums(splits)
    before = torch.empty_like(maximum), torch.empty_like(total)
    tile_maximum, tile_total = (torch.empty(num_tiles, B, device=device) for _ in range(2))
    query, masks = problem.prepare()
    weights = torch.empty(B, chunk, dtype=dtype, device=device)
    # The kernel takes both through the copy engine, or neither.
    wants_tma = first.pop("TMA") and fits_copy_engine(query)
    bank_of_first, TMA = describe(problem.bank, (BLOCK_K, first["CHUNK_D"]), wants_tma)
    bank_of_second, _ = describe(problem.bank, (BLOCK_K, second["BLOCK_D"]), TMA)
    described, _ = describe(query, (first["BLOCK_B"], first["CHUNK_D"]), TMA)
    precision = {"PRECISION": problem.flags["PRECISION"], "TMA": TMA}
    *_, valid = masks
    for begin in range(0, max(K, 1), chunk):
        in_chunk = cdiv(min(chunk, K - begin), BLOCK_K)
        launch(
            bank_contrast_weights_kernel,
            (cdiv(B, first["BLOCK_B"]), max(in_chunk, 1)),
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
        grid = (cdiv(B, second["BLOCK_B"]), cdiv(D, second["BLOCK_D"]), splits)
        launch(
            bank_contrast_rows_kernel,
            grid,
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
