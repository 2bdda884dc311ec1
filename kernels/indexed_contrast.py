"""indexed_contrast: contrastive loss of B queries, each against its own M bank rows, named by
index.

A program gathers the rows of one query's split of its index, BLOCK_M at a time, and keeps sums
under the running maximum; combine_kernel merges the splits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles, work_split
from codir_fast.kernels.contrast import LOG2E, add_compensated, logistic, scalar
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import QUERY_DTYPES, Problem, check, padded
from torch import Tensor


@triton.jit
def _allowed(
    j,
    inside,
    label,
    excluded,
    bank_labels_ptr,
    valid_ptr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Which of the bank rows j count for a query."""
    allowed = inside
    if HAS_VALID:
        allowed = allowed & (tl.load(valid_ptr + j, mask=inside, other=0) != 0)
    if HAS_LABELS:
        allowed = allowed & (tl.load(bank_labels_ptr + j, mask=inside, other=0) != label)
    if HAS_EXCLUDE:
        allowed = allowed & (j != excluded)
    return allowed


@triton.jit(do_not_specialize=["B", "M", "K", "positions_per_split"])
def indexed_contrast_kernel(
    maximum_ptr,
    total_ptr,
    rows_ptr,
    query_ptr,
    bank_ptr,
    index_ptr,
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
    M,
    K,
    D,
    positions_per_split,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NCE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B, splits): as bank_contrast_kernel leaves them, maximum and total (splits, B), rows
    (splits, B, D). An index out of range makes the query's results NaN; nothing is read there.
    """
    i = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float32)
    label, excluded = i, i
    if HAS_LABELS:
        label = tl.load(labels_ptr + i)
    if HAS_EXCLUDE:
        excluded = tl.load(exclude_ptr + i)
    factor = scalar(inv_temperature, T_ON_DEVICE)
    offset = 0.0
    if NCE:
        offset = tl.load(log_partition_ptr).to(tl.float32) + log_noise
        maximum = tl.full((), 0.0, tl.float32)
    else:
        factor = factor * LOG2E
        maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    lost = tl.full((), 0.0, tl.float32)
    rows = tl.zeros((BLOCK_D,), tl.float32)
    first = split * positions_per_split
    end = tl.minimum(first + positions_per_split, M)
    for m0 in tl.range(first, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        j = tl.load(index_ptr + i * M + m, mask=m < end, other=0)
        known = (j >= 0) & (j < K)
        inside = (m < end) & known
        allowed = _allowed(
            j,
            inside,
            label,
            excluded,
            bank_labels_ptr,
            valid_ptr,
            HAS_LABELS,
            HAS_EXCLUDE,
            HAS_VALID,
        )
        at = bank_ptr + j[:, None] * D + d[None, :]
        tile = tl.load(at, mask=allowed[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        s = tl.sum(tile * query[None, :], 1) * factor
        scale = tl.full((BLOCK_M,), 1.0, tl.float32)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + j, mask=allowed, other=0.0)
            s = s * scale
        s = tl.where(allowed, s, -float("inf"))
        s = tl.where((m < end) & (known == 0), float("nan"), s)
        if NCE:
            weight, term = logistic(s - offset)
            term = tl.where(s == -float("inf"), 0.0, term + extra)
        else:
            larger = tl.maximum(maximum, tl.max(s, 0))
            base = tl.where(larger == -float("inf"), 0.0, larger)
            rescale = tl.exp2(maximum - base)
            weight = tl.exp2(s - base)
            term = weight
            maximum = larger
            lost = lost * rescale
            total = total * rescale
            rows = rows * rescale
        total, lost = add_compensated(total, lost, tl.sum(term, 0))
        rows += tl.sum((weight * scale)[:, None] * tile, 0)
    out = split * B + i
    tl.store(maximum_ptr + out, maximum)
    tl.store(total_ptr + out, total)
    tl.store(rows_ptr + out * D + d, rows, mask=d < D)


def indexed_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    index: Tensor,
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
    """Loss of each query against the rows index[i] of the bank, with its gradients.

    Seen right on an H200; for other GPUs compiled only, and run by the interpreter.

    Args:
        index: (B, M) int64 in [0, K); a row named twice counts twice. One that is out of range
            makes its query's results NaN.
        All others: as of codir_fast.kernels.bank_contrast.

    Returns:
        What bank_contrast returns.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    objective = (log_partition, num_noise, num_data)
    problem = Problem(query, bank, inv_temperature, bank_scale, *masks, *objective, normalize)
    check("positive", positive, tuple(query.shape), QUERY_DTYPES, query.device)
    M = check_index(index, problem)
    outputs = problem.outputs()
    B, K, D = problem.B, problem.K, problem.D
    if B == 0:
        return outputs
    tile = tiles.indexed_contrast(tiles.architecture(query.device), padded(D))
    num_blocks = max(1, cdiv(M, tile["BLOCK_M"]))
    splits = max(1, min(num_blocks, cdiv(work_split.num_programs(query.device, 8), B)))
    per_split = cdiv(num_blocks, splits) * tile["BLOCK_M"]
    sums = problem.partial_sums(max(1, cdiv(M, per_split)))
    with torch.cuda.device_of(query):
        unit, _ = problem.prepare(number_labels=False)
        launch(
            indexed_contrast_kernel,
            (B, sums[0].shape[0]),
            *sums,
            unit,
            problem.bank,
            index.contiguous(),
            *problem.masks,
            problem.inv_temperature,
            *problem.nce,
            *(B, M, K, D, per_split),
            **flags(problem),
            **tile,
        )
        problem.combine(outputs, sums, positive)
    return outputs


def check_index(index: Tensor, problem: Problem) -> int:
    """M."""
    shape = (problem.B, index.shape[-1] if index.ndim else 0)
    check("index", index, shape, (torch.int64,), problem.device)
    return index.shape[1]


def flags(problem: Problem) -> dict[str, Any]:
    return {name: value for name, value in problem.flags.items() if name != "PRECISION"}
