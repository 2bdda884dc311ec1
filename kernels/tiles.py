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


# 8 or 16 values a thread, in two to four 16-byte loads.
MASKED_POOL: dict[int, dict[torch.dtype, PoolTile]] = {
    80: {
        torch.float16: PoolTile(16, 128, 128, 4),
        torch.bfloat16: PoolTile(16, 128, 128, 4),
        torch.float32: PoolTile(16, 128, 128, 4),
        torch.float64: PoolTile(8, 128, 128, 4),
    },
}


class ContrastTile(NamedTuple):
    """BLOCK_B queries against BLOCK_K bank rows; products run over CHUNK_D columns at a time."""

    BLOCK_B: int
    BLOCK_K: int
    CHUNK_D: int
    num_warps: int
    num_stages: int


# By the dtype of the arithmetic, then by the largest padded D that the tile serves. Larger ones
# spill: three-part tf32 products hold every operand twice.
BANK_CONTRAST: dict[int, dict[torch.dtype, dict[int, ContrastTile]]] = {
    80: {
        torch.float32: {
            128: ContrastTile(16, 32, 64, num_warps=4, num_stages=2),
            256: ContrastTile(16, 32, 64, num_warps=8, num_stages=2),
        },
        torch.float64: {256: ContrastTile(4, 8, 32, num_warps=4, num_stages=1)},
    },
}
COMBINED_SPLITS = 16  # partial sums that one program of the combine kernel merges at a time


def bank_contrast(device: torch.device, dtype: torch.dtype, D: int) -> dict[str, int]:
    """The tile for embeddings of D columns, with BLOCK_D: D padded to 64, 128 or 256."""
    BLOCK_D = max(64, 1 << max(D - 1, 0).bit_length())
    by_size = choose(BANK_CONTRAST, device)[dtype]
    tile = by_size[min(size for size in by_size if size >= BLOCK_D)]._asdict()
    return {**tile, "BLOCK_D": BLOCK_D}


def num_programs(device: torch.device) -> int:
    """Programs that keep a GPU busy: two on each multiprocessor. Four for the interpreter."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def choose(table: dict[int, Tile], device: torch.device) -> Tile:
    """The row of a table for the GPU of `device`; the oldest one for Triton's interpreter."""
    if device.type != "cuda":
        return table[min(table)]
    major, minor = torch.cuda.get_device_capability(device)
    return table[max(arch for arch in table if arch <= 10 * major + minor)]
