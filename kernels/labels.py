"""Labels as numbers of 32 bits, equal exactly where the labels are: in a pass over the bank they
take half the registers of 64-bit labels, and half the traffic.

The number of a label says which query, or which place among the queries' sorted labels, has it; -1
where none has. Few queries are all compared with each label; the labels of many are sorted, and
each label is looked up by bisection: some 4 instructions a pair would add up to a good part of a
pass.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels.launch import cdiv
from torch import Tensor

LABEL_BLOCK = 256
_MAX_COMPARED = 128


@triton.jit
def number_labels(
    numbers_ptr,
    given_ptr,
    labels_ptr,
    block,
    N,
    B,
    halvings,
    SORTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Numbers of one block of N given labels. labels_ptr: the queries', ascending if SORTED, and
    then B < 2^halvings.
    """
    n = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    given = tl.load(given_ptr + n, mask=n < N, other=0)
    if SORTED:
        below = tl.zeros((BLOCK_N,), tl.int32)  # of the queries' labels, how many are smaller
        for halving in range(0, halvings):
            upper = below + (1 << (halvings - 1 - halving))
            inside = upper <= B
            label = tl.load(labels_ptr + upper - 1, mask=inside, other=0)
            below = tl.where(inside & (label < given), upper, below)
        label = tl.load(labels_ptr + below, mask=below < B, other=0)
        number = tl.where((below < B) & (label == given), below, -1)
    else:
        first = tl.full((BLOCK_N,), 2147483647, tl.int32)
        for i0 in range(0, B, BLOCK_B):
            i = i0 + tl.arange(0, BLOCK_B)
            label = tl.load(labels_ptr + i, mask=i < B, other=0)
            same = (given[:, None] == label[None, :]) & (i < B)[None, :]
            first = tl.minimum(first, tl.min(tl.where(same, i[None, :], 2147483647), 1))
        number = tl.where(first == 2147483647, -1, first)
    tl.store(numbers_ptr + n, number, mask=n < N)


def label_blocks(size: int) -> int:
    """Programs for so many labels."""
    return cdiv(size, LABEL_BLOCK)


def is_sorted(B: int) -> bool:
    """Whether the labels of so many queries are sorted."""
    return B > _MAX_COMPARED


def as_sought(labels: Tensor | None) -> Tensor | None:
    """The queries' labels as number_labels looks through them."""
    if labels is None or not is_sorted(len(labels)):
        return labels
    return torch.sort(labels).values
