"""How the kernels of bank_contrast read a bank: tiles of its rows, by the copy engine where the
architecture has one, which rows count for which query, and the products with queries.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def load_scale(scale_ptr, valid_ptr, j, K, HAS_SCALE: tl.constexpr, HAS_VALID: tl.constexpr):
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
def load_bank(
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
def load_queries(query_ptr, i, d, B, D):
    """Rows i and columns d of the queries, 0 beyond their ends."""
    inside = (i < B)[:, None] & (d < D)[None, :]
    return tl.load(query_ptr + i[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def mask_logits(
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
def load_picks(labels_ptr, exclude_ptr, i, B, HAS_LABELS: tl.constexpr, HAS_EXCLUDE: tl.constexpr):
    """Label and excluded row of each query."""
    label, excluded = i, i
    if HAS_LABELS:
        label = tl.load(labels_ptr + i, mask=i < B, other=-1)
    if HAS_EXCLUDE:
        excluded = tl.load(exclude_ptr + i, mask=i < B, other=-1)
    return label, excluded


@triton.jit
def dot_products(
    query_ptr,
    bank,
    i0,
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
    """q_i.b_j of rows i0.. and j0.. over all D, CHUNK_D columns at a time. query_ptr: a descriptor
    with TMA.
    """
    i = (i0 + tl.arange(0, BLOCK_B)).to(tl.int64)
    s = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for d0 in tl.range(0, D, CHUNK_D):
        if TMA:
            query = query_ptr.load([tl.cast(i0, tl.int32), d0])
        else:
            query = load_queries(query_ptr, i, d0 + tl.arange(0, CHUNK_D), B, D)
        tile = load_bank(bank, j0, d0, usable, D, query.dtype, HAS_VALID, TMA, BLOCK_K, CHUNK_D)
        s = tl.dot(query, tl.trans(tile), s, input_precision=PRECISION)
    return s


def fits_copy_engine(tensor: Tensor) -> bool:
    """Rows begin at multiples of 16 bytes, and there are some, by numbers of 32 bits."""
    row_bytes = tensor.shape[1] * tensor.element_size()
    return 0 < tensor.shape[0] < 1 << 31 and row_bytes % 16 == 0 and tensor.data_ptr() % 16 == 0


def describe(tensor: Tensor, block: tuple[int, int], wanted: bool) -> tuple[Any, bool]:
    """A contiguous matrix as a kernel loads its blocks, and whether through the copy engine: if
    that is wanted, and the matrix fits.
    """
    if not (wanted and fits_copy_engine(tensor)):
        return tensor, False
    # A single row may have any stride, and the copy engine asks it to be a multiple of 16 bytes.
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], list(block)), True
