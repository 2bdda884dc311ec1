"""Block sizes of the Triton kernels: one table per operator, by architecture and dtype.

A table's row serves its architecture and all later ones up to the next row. None of these sizes has
been timed yet: they follow from 16-byte loads, registers and the bytes that must be in flight.
"""

from typing import NamedTuple, TypeVar

import torch

Tile = TypeVar("Tile")


class PoolTile(NamedTuple):
    """A program keeps BLOCK_T x BLOCK_H sums; BLOCK_SCAN mask entries are read at a time."""

    BLOCK_T: int
    BLOCK_H: int
    BLOCK_SCAN: int
    num_warps: int


# 16 to 32 values a thread, in one or two 16-byte loads of each row of tokens.
MASKED_POOL: dict[int, dict[torch.dtype, PoolTile]] = {
    80: {
        torch.float16: PoolTile(16, 128, 128, 4),
        torch.bfloat16: PoolTile(16, 128, 128, 4),
        torch.float32: PoolTile(16, 128, 128, 4),
        torch.float64: PoolTile(8, 128, 128, 4),
    },
}


def choose(table: dict[int, Tile], device: torch.device) -> Tile:
    """The row of a table for the GPU of `device`; the oldest one for Triton's interpreter."""
    if device.type != "cuda":
        return table[min(table)]
    major, minor = torch.cuda.get_device_capability(device)
    return table[max(arch for arch in table if arch <= 10 * major + minor)]
