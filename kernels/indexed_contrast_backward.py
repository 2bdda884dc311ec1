"""The gradient of indexed_contrast to the bank, by rows: the pairs of a query and a row are sorted
by row, and a program adds up its row's pairs in their order.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.contrast import logistic, scalar
from codir_fast.kernels.indexed_contrast import check_index, flags
from codir_fast.kernels.launch import launch
from codir_fast.kernels.problem import QUERY_DTYPES, Problem, check, padded
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def indexed_contrast_backward_kernel(
    dbank_ptr,
    grad_ptr,
    lse_ptr,
    query_ptr,
    bank_ptr,
    pair_ptr,
    begin_ptr,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    inv_temperature,
    M,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NCE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (K,): dbank's row j, from its pairs [begin[j], begin[j + 1]) of positions i * M + m."""
    j = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    usable = True
    if HAS_VALID:
        usable = tl.load(valid_ptr + j) != 0
    row = tl.load(bank_ptr + j * D + d, mask=(d < D) & usable, other=0.0).to(tl.float32)
    scale = tl.full((), 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + j, mask=usable, other=0.0)
    factor = scalar(inv_temperature, T_ON_DEVICE)
    dbank = tl.zeros((BLOCK_D,), tl.float32)
    end = tl.load(begin_ptr + j + 1)
    for n0 in tl.range(tl.load(begin_ptr + j), end, BLOCK_M):
        n = n0 + tl.arange(0, BLOCK_M)
        i = tl.load(pair_ptr + n, mask=n < end, other=0) // M
        allowed = (n < end) & usable
        if HAS_LABELS:
            label = tl.load(labels_ptr + i, mask=allowed, other=0)
            allowed = allowed & (label != tl.load(bank_labels_ptr + j))
        if HAS_EXCLUDE:
            allowed = allowed & (tl.load(exclude_ptr + i, mask=allowed, other=-1) != j)
        at = query_ptr + i[:, None] * D + d[None, :]
        query = tl.load(at, mask=allowed[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        s = tl.sum(query * row[None, :], 1) * (factor * scale)
        lse = tl.load(lse_ptr + i, mask=allowed, other=0.0)
        high = lse.to(tl.float32)
        gap = (s - high) - (lse - high).to(tl.float32)
        if NCE:
            weight, _ = logistic(gap)
        else:
            weight = tl.exp(gap)
        grad = tl.load(grad_ptr + i, mask=allowed, other=0.0)
        weight = tl.where(allowed, weight * grad * factor, 0.0)
        dbank += tl.sum(weight[:, None] * query, 0)
    dbank = (dbank * scale).to(dbank_ptr.dtype.element_ty)
    tl.store(dbank_ptr + j * D + d, dbank, mask=d < D)


def indexed_contrast_backward(
    grad_loss: Tensor,
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
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
) -> Tensor:
    """Gradient to the bank, (K, D) in its dtype, every row written; repeated rows are added up in
    the order of the index.

    `grad_loss` is (B,) float32, `lse` (B,) as indexed_contrast returned it; the other arguments as
    they were given to it.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    objective = (log_partition, num_noise, num_data)
    problem = Problem(query, bank, inv_temperature, bank_scale, *masks, *objective, normalize)
    B, K, D = problem.B, problem.K, problem.D
    check("bank", bank, (K, D), QUERY_DTYPES, query.device)
    check("grad_loss", grad_loss, (B,), (torch.float32,), query.device)
    check("lse", lse, (B,), (torch.float64,), query.device)
    M = check_index(index, problem)
    dbank = torch.empty(K, D, dtype=bank.dtype, device=bank.device)
    if K == 0 or B == 0 or M == 0:
        return dbank.zero_()
    row, pair = torch.sort(index.flatten(), stable=True)
    begin = torch.searchsorted(row, torch.arange(K + 1, device=row.device))
    tile = tiles.indexed_contrast_backward(tiles.architecture(query.device), padded(D))
    with torch.cuda.device_of(query):
        unit, _ = problem.prepare(number_labels=False)
        launch(
            indexed_contrast_backward_kernel,
            (K,),
            dbank,
            grad_loss.contiguous(),
            lse.contiguous(),
            unit,
            problem.bank,
            pair,
            begin,
            *problem.masks,
            problem.inv_temperature,
            *(M, D),
            **flags(problem),
            **tile,
        )
    return dbank
