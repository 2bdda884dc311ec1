"""How work is split over a GPU: enough programs to fill it, in whole waves, and little memory for
their partial sums.
"""

import functools
from typing import Any

import torch
from codir_fast.kernels.launch import cdiv

MAX_PARTIAL_BYTES = 1 << 28
# Of weights, and of bank rows: the second product finds in L2 what the first one has left there.
_WEIGHT_BYTES, _CHUNK_BYTES = 1 << 24, 1 << 26


def split(
    B: int, K: int, D: int, dtype: torch.dtype, tile: dict[str, Any], device: torch.device
) -> int:
    """Bank rows of each program, whole blocks: enough programs to fill the GPU, in whole waves."""
    resident = 2 if tile["num_warps"] <= 4 else 1  # programs that fit on a multiprocessor
    processors = num_programs(device, 1)
    return _split(B, K, D, dtype, tile["BLOCK_B"], tile["BLOCK_K"], resident, processors)


@functools.lru_cache(maxsize=1024)
def _split(
    B: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    BLOCK_B: int,
    BLOCK_K: int,
    resident: int,
    processors: int,
) -> int:
    slots = resident * processors
    overhead = 2  # blocks of rows that a program's start and its partial sums cost, about
    blocks, num_tiles = cdiv(B, BLOCK_B), max(1, cdiv(K, BLOCK_K))
    partial_bytes = 4 * B * (D + 2)
    # float32 sums of very many rows lose digits; they are added up in float64 in the end.
    longest = cdiv(8192, BLOCK_K) if dtype == torch.float32 else num_tiles
    least = min(cdiv(num_tiles, longest), max(1, MAX_PARTIAL_BYTES // partial_bytes))
    # More than one program a multiprocessor only where partial sums are little beside the bank.
    quarter_of_bank = K * D * dtype.itemsize // (4 * partial_bytes)
    most = max(quarter_of_bank, cdiv(processors, blocks))
    most = max(least, min(num_tiles, 2 * cdiv(slots, blocks), most))

    def cost(splits: int) -> tuple[int, int]:
        waves = cdiv(blocks * splits, slots)
        return waves * (cdiv(num_tiles, splits) + overhead), splits

    _, splits = min(cost(splits) for splits in range(least, most + 1))
    return cdiv(num_tiles, splits) * BLOCK_K


def chunk_rows(B: int, D: int, dtype: torch.dtype, BLOCK_K: int) -> int:
    """Bank rows of a chunk of the two-product form, whole blocks."""
    rows = min(_WEIGHT_BYTES // B, _CHUNK_BYTES // D) // dtype.itemsize
    return max(1, rows // BLOCK_K) * BLOCK_K


def num_programs(device: torch.device, resident: int) -> int:
    """Programs that run at once, `resident` on each multiprocessor. Four for the interpreter."""
    if device.type != "cuda":
        return 4
    return resident * _num_multiprocessors(device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
