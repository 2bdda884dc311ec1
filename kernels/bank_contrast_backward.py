"""Gradient of bank_contrast to the bank: a program owns a piece of it and walks over all queries;
their weights are computed again, from the log-sum-exp.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.bank_access import (
    dot_products,
    load_picks,
    load_queries,
    load_scale,
    mask_logits,
)
from codir_fast.kernels.contrast import logistic, scalar
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.problem import QUERY_DTYPES, Problem, check, padded
from torch import Tensor


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
    scale, usable = load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE, HAS_VALID)
    factor = scalar(inv_temperature, T_ON_DEVICE)
    dbank = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i0 in range(0, B, BLOCK_B):
        i = (i0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        s = dot_products(
            query_ptr,
            bank,
            i0,
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
        query = load_queries(query_ptr, i, d, B, D)
        weight = tl.trans(weight).to(OPERAND)
        dbank = tl.dot(weight, query, dbank, input_precision=PRECISION)
    if HAS_SCALE:
        dbank = dbank * scale[:, None]
    # A row that is not usable has only zero weights.
    inside = (j < K)[:, None] & (d < D)[None, :]
    at = dbank_ptr + j[:, None] * D + d[None, :]
    tl.store(at, dbank.to(dbank_ptr.dtype.element_ty), mask=inside)


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
        grid = (cdiv(K, tile["BLOCK_K"]), cdiv(D, tile["BLOCK_D"]))
        launch(
            bank_contrast_backward_kernel,
            grid,
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
