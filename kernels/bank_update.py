"""bank_update: momentum, renormalisation and scatter into a memory bank, in place.

The index is sorted by row, keys of the same row in their order; the program of a row's first key
takes all of them, one after the other. No row has two writers.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.launch import launch
from codir_fast.kernels.problem import QUERY_DTYPES, check, padded
from torch import Tensor


@triton.jit(do_not_specialize=["N", "K"])
def bank_update_kernel(
    bank_ptr,
    filled_ptr,
    row_ptr,
    order_ptr,
    keys_ptr,
    momentum,
    N,
    K,
    D,
    HAS_FILLED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (N,): program n owns the run of equal rows that begins at n, if one does."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + n)
    before = tl.load(row_ptr + n - 1, mask=n > 0, other=-1)
    if (row != before) & (row >= 0) & (row < K):
        d = tl.arange(0, BLOCK_D)
        at = bank_ptr + row * D + d
        current = tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        kept = momentum + tl.full((), 0.0, tl.float32)
        if HAS_FILLED:
            kept = tl.where(tl.load(filled_ptr + row) != 0, kept, 0.0)
        more = row >= 0
        while more:
            key = tl.load(keys_ptr + tl.load(order_ptr + n) * D + d, mask=d < D, other=0.0)
            # 0 * current would let a NaN of a row that was never filled through.
            mixed = tl.where(kept == 0, key, kept * current + (1 - kept) * key)
            norm = tl.sqrt(tl.sum(mixed.to(tl.float64) * mixed, 0))
            current = mixed / tl.maximum(norm, 1e-12).to(tl.float32)
            # What is stored is what the next key is mixed with.
            current = current.to(bank_ptr.dtype.element_ty).to(tl.float32)
            kept = momentum + tl.full((), 0.0, tl.float32)
            n += 1
            more = tl.load(row_ptr + n, mask=n < N, other=-1) == row
        tl.store(at, current.to(bank_ptr.dtype.element_ty), mask=d < D)
        if HAS_FILLED:
            tl.store(filled_ptr + row, tl.full((), 1, tl.uint8))


def bank_update(
    bank: Tensor, index: Tensor, keys: Tensor, momentum: float, filled: Tensor | None = None
) -> None:
    """bank[r] <- normalise(m * bank[r] + (1 - m) * keys[n]) for each n in order, r = index[n];
    filled[r] <- true.

    Seen right on an H200; for other GPUs compiled only, and run by the interpreter.

    Args:
        bank: (K, D), contiguous, float32, bfloat16 or float16.
        index: (N,) int64 in [0, K). A GPU stops at one that is out of range, as PyTorch's own
            indexing does.
        keys: (N, D) float32.
        momentum: m; 0 for a row where `filled`, (K,) bool, is given and false.
    """
    (K, D), N = bank.shape, index.numel()
    check("bank", bank, (K, D), QUERY_DTYPES, bank.device)
    if not bank.is_contiguous() or (filled is not None and not filled.is_contiguous()):
        raise ValueError("`bank` and `filled` must be contiguous")
    check("index", index, (N,), (torch.int64,), bank.device)
    check("keys", keys, (N, D), (torch.float32,), bank.device)
    if filled is not None:
        check("filled", filled, (K,), (torch.bool,), bank.device)
    if N == 0:
        return
    row, order = torch.sort(index, stable=True)
    torch._assert_async((row[0] >= 0) & (row[-1] < K), f"`index` must be in [0, {K})")
    with torch.cuda.device_of(bank):
        launch(
            bank_update_kernel,
            (N,),
            bank,
            None if filled is None else filled.view(torch.uint8),
            row,
            order,
            keys.contiguous(),
            float(momentum),
            *(N, K, D),
            HAS_FILLED=filled is not None,
            **tiles.bank_update(padded(D)),
        )
