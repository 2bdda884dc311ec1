"""Block sizes of the Triton kernels: one table per operator, by architecture and dtype.

A table's row serves its architecture and all later ones up to the next row. For sm_90 those that
the shapes of benchmarks/shapes.py take in bfloat16, without labels, scales or NCE, were chosen by
time on an H200. All others follow from what compiles without spilling, from 16-byte loads and from
the bytes that must be in flight. CODIR_FAST_AUTOTUNE=1 (autotune.py) looks around them on the GPU
at hand.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import torch
from codir_fast.kernels.launch import next_power_of_2

Row = TypeVar("Row")
Tile = dict[str, Any]
HALF = "half"  # bfloat16 and float16


class PoolTile(NamedTuple):
    """A program keeps BLOCK_T x BLOCK_H sums; BLOCK_SCAN mask entries are read at a time."""

    BLOCK_T: int
    BLOCK_H: int
    BLOCK_SCAN: int
    num_warps: int


# 64 bytes of a thread at a time, in four loads: on an H200, in bfloat16, one warp a program is
# faster than more, which wait for one another at the end.
MASKED_POOL: dict[int, dict[torch.dtype, PoolTile]] = {
    80: {
        torch.float16: PoolTile(16, 64, 128, 1),
        torch.bfloat16: PoolTile(16, 64, 128, 1),
        torch.float32: PoolTile(16, 32, 128, 1),
        torch.float64: PoolTile(8, 32, 128, 1),
    },
}
MASKED_POOL[120] = MASKED_POOL[80] | {  # where 64 bytes spill
    torch.float32: PoolTile(8, 32, 128, 1),
}


class ContrastTile(NamedTuple):
    """BLOCK_B queries against BLOCK_K bank rows. TMA: through the hardware's copy engine. FIXED:
    the shift 1/t is tried before the running maximum, which costs registers.
    """

    BLOCK_B: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    TMA: bool = False
    FIXED: bool = True


def _tma(*sizes: int, FIXED: bool = True) -> ContrastTile:
    return ContrastTile(*sizes, TMA=True, FIXED=FIXED)


# One pass: by what products run in, by the largest padded D that the row serves, by the largest B.
# The first tile is for banks whose rows all count alike. The second is for labels, scales and NCE,
# which hold a number for each of a tile's columns; half of its BLOCK_K for more of that at once.
# Wider embeddings take two products.
_Tiles = tuple[ContrastTile, ContrastTile]
_ALL = 1 << 62
BANK_CONTRAST: dict[int, dict[Any, dict[int, dict[int, _Tiles]]]] = {
    80: {
        HALF: {
            64: {
                16: (ContrastTile(16, 128, 4, 3), ContrastTile(16, 64, 4, 3)),
                32: (ContrastTile(32, 64, 4, 3), ContrastTile(32, 64, 4, 3)),
                64: (ContrastTile(64, 64, 4, 3), ContrastTile(64, 32, 4, 3)),
                _ALL: (ContrastTile(128, 64, 8, 3), ContrastTile(128, 32, 8, 3)),
            },
            128: {
                16: (ContrastTile(16, 64, 4, 3), ContrastTile(16, 64, 8, 2)),
                32: (ContrastTile(32, 64, 4, 3), ContrastTile(32, 32, 4, 3)),
                64: (ContrastTile(64, 64, 8, 3), ContrastTile(64, 32, 4, 3)),
                _ALL: (ContrastTile(128, 64, 8, 3), ContrastTile(64, 32, 4, 3)),
            },
            256: {
                16: (ContrastTile(16, 64, 8, 2), ContrastTile(16, 32, 8, 2)),
                _ALL: (ContrastTile(64, 32, 8, 2), ContrastTile(64, 32, 8, 2)),
            },
        },
        torch.float32: {
            64: {_ALL: (ContrastTile(32, 32, 4, 2), ContrastTile(32, 32, 4, 2))},
            128: {_ALL: (ContrastTile(16, 32, 8, 2), ContrastTile(16, 32, 8, 2))},
        },
    },
    90: {
        HALF: {
            64: {
                16: (_tma(16, 128, 4, 4), _tma(16, 64, 4, 4)),
                32: (_tma(64, 128, 4, 4), _tma(32, 32, 4, 4)),
                64: (_tma(64, 128, 4, 4), _tma(64, 32, 4, 4)),
                _ALL: (_tma(128, 128, 8, 3), _tma(128, 64, 8, 3)),
            },
            128: {
                16: (_tma(16, 128, 4, 3), _tma(16, 64, 4, 3)),
                32: (_tma(32, 128, 4, 3), _tma(32, 64, 4, 3)),
                64: (_tma(64, 128, 4, 3), _tma(64, 64, 4, 3)),
                256: (_tma(64, 128, 4, 3), _tma(128, 64, 8, 3)),
                2048: (_tma(128, 64, 8, 3), _tma(128, 64, 8, 3)),
                _ALL: (_tma(64, 128, 4, 3), _tma(128, 64, 8, 3)),
            },
            256: {
                16: (_tma(16, 64, 4, 3), _tma(16, 32, 8, 3)),
                32: (_tma(32, 64, 4, 3), _tma(32, 32, 8, 2)),
                64: (_tma(64, 64, 4, 3), _tma(64, 32, 8, 3)),
                _ALL: (_tma(128, 64, 8, 3), _tma(64, 32, 8, 3)),
            },
            512: {
                _ALL: (_tma(64, 64, 8, 2, FIXED=False), _tma(64, 32, 8, 3, FIXED=False)),
            },
        },
        torch.float32: {
            64: {_ALL: (_tma(32, 32, 4, 2), _tma(32, 32, 4, 2))},
            128: {_ALL: (_tma(16, 32, 8, 2), _tma(16, 32, 8, 2))},
        },
    },
    100: {
        HALF: {
            64: {
                16: (_tma(16, 128, 4, 4), _tma(16, 64, 4, 4)),
                32: (_tma(32, 128, 4, 4), _tma(32, 32, 4, 4)),
                64: (_tma(64, 128, 4, 4), _tma(64, 32, 8, 3)),
                _ALL: (_tma(128, 128, 8, 3), _tma(64, 32, 8, 3)),
            },
            128: {
                16: (_tma(16, 128, 4, 3), _tma(16, 64, 4, 3)),
                32: (_tma(32, 128, 4, 3), _tma(32, 64, 8, 3)),
                64: (_tma(64, 128, 4, 3), _tma(64, 64, 8, 2)),
                _ALL: (_tma(128, 128, 8, 3), _tma(64, 64, 8, 2)),
            },
            256: {
                16: (_tma(16, 64, 4, 3), _tma(16, 32, 8, 3)),
                32: (_tma(32, 64, 4, 3), _tma(32, 32, 8, 2)),
                _ALL: (_tma(64, 32, 8, 3), _tma(64, 32, 8, 3)),
            },
        },
        torch.float32: {
            64: {_ALL: (_tma(32, 32, 4, 2), _tma(32, 32, 4, 2))},
            128: {_ALL: (_tma(16, 32, 8, 2), _tma(16, 32, 8, 2))},
        },
    },
}

BANK_CONTRAST[120] = BANK_CONTRAST[80]  # no wgmma, no tcgen05, and less shared memory than sm_80


class WideTile(NamedTuple):
    """The product that makes weights: BLOCK_B x BLOCK_K of them, CHUNK_D columns at a time."""

    BLOCK_B: int
    BLOCK_K: int
    CHUNK_D: int
    num_warps: int
    num_stages: int
    TMA: bool = False


class RowsTile(NamedTuple):
    """The product of weights and rows: BLOCK_B x BLOCK_D sums; BLOCK_K is that of the weights."""

    BLOCK_B: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# Weights, weights of NCE, rows.
BANK_CONTRAST_WIDE: dict[int, dict[Any, tuple[WideTile, WideTile, RowsTile]]] = {
    80: {
        HALF: (
            WideTile(128, 64, 64, 4, 3),
            WideTile(64, 64, 64, 4, 3),
            RowsTile(64, 128, 8, 3),
        ),
        torch.float32: (
            WideTile(32, 32, 32, 4, 2),
            WideTile(32, 32, 32, 4, 2),
            RowsTile(32, 64, 4, 2),
        ),
    },
    90: {
        HALF: (
            WideTile(256, 128, 64, 8, 4, TMA=True),
            WideTile(64, 128, 64, 8, 4, TMA=True),
            RowsTile(128, 128, 8, 3),
        ),
        torch.float32: (
            WideTile(32, 32, 32, 4, 2, TMA=True),
            WideTile(32, 32, 32, 4, 2, TMA=True),
            RowsTile(32, 64, 8, 2),
        ),
    },
}

BANK_CONTRAST_WIDE[100] = {  # labels and scales leave no registers for 256 rows
    **BANK_CONTRAST_WIDE[90],
    HALF: (
        WideTile(128, 128, 64, 8, 4, TMA=True),
        WideTile(64, 128, 64, 8, 4, TMA=True),
        RowsTile(128, 128, 8, 3),
    ),
}
BANK_CONTRAST_WIDE[120] = BANK_CONTRAST_WIDE[80]


class BackwardTile(NamedTuple):
    """BLOCK_K x BLOCK_D of the bank's gradient; logits of BLOCK_B queries, CHUNK_D columns at a
    time.
    """

    BLOCK_B: int
    BLOCK_K: int
    BLOCK_D: int
    CHUNK_D: int
    num_warps: int
    num_stages: int


BANK_CONTRAST_BACKWARD: dict[int, dict[Any, BackwardTile]] = {
    80: {
        HALF: BackwardTile(32, 64, 256, 64, num_warps=8, num_stages=2),
        torch.float32: BackwardTile(16, 32, 128, 32, num_warps=4, num_stages=2),
    },
}


class IndexedTile(NamedTuple):
    """A program gathers BLOCK_M rows of one query at a time; elements of a tile, by padded D."""

    ELEMENTS: int
    num_warps: int


INDEXED_CONTRAST: dict[int, IndexedTile] = {
    80: IndexedTile(8192, 8),
    90: IndexedTile(4096, 1),
    120: IndexedTile(4096, 2),
}
INDEXED_CONTRAST_BACKWARD: dict[int, IndexedTile] = {80: IndexedTile(8192, 8)}


def bank_contrast(
    arch: int,
    dtype: torch.dtype,
    B: int,
    D: int,
    flags: dict[str, Any],
    bank_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The tile of the one-pass kernel, with BLOCK_D; empty where D is too wide for it."""
    load = sum(flags[name] for name in ("HAS_LABELS", "HAS_SCALE", "NCE")) + 2 * flags["HAS_VALID"]
    return dict(_bank_contrast(arch, dtype, B, D, load, bank_dtype))


@functools.lru_cache(maxsize=1024)
def _bank_contrast(
    arch: int, dtype: torch.dtype, B: int, D: int, load: int, bank_dtype: torch.dtype | None
) -> dict[str, Any]:
    """`load`: what takes registers beside the products."""
    BLOCK_D = max(64, next_power_of_2(D))
    by_width = choose(BANK_CONTRAST, arch)[_key(dtype)]
    converted = _is_converted(dtype, bank_dtype)
    widest = min(256, max(by_width)) if converted else max(by_width)
    wide_enough = [width for width in by_width if BLOCK_D <= width <= widest]
    if not wide_enough:
        return {}
    by_queries = by_width[min(wide_enough)]
    plain, masked = by_queries[min(limit for limit in by_queries if limit >= B)]
    load += converted
    tile = masked if load else plain
    if load > 1:
        tile = tile._replace(BLOCK_K=max(16, tile.BLOCK_K // 2))
    if load > 2 and _is_widest(dtype, bank_dtype):
        tile = tile._replace(num_stages=2)
    return {**tile._asdict(), "BLOCK_D": BLOCK_D}


def _is_converted(dtype: torch.dtype, bank_dtype: torch.dtype | None) -> bool:
    """Whether bank rows take registers on their way to the queries' dtype, beside shared memory in
    their own.
    """
    if bank_dtype == torch.float8_e4m3fn:
        return True
    return _key(dtype) == HALF and bank_dtype not in (None, dtype)


def _is_widest(dtype: torch.dtype, bank_dtype: torch.dtype | None) -> bool:
    """Whether that is twice the shared memory that the tables reckon with."""
    return _key(dtype) == HALF and bank_dtype == torch.float32


def bank_contrast_wide(
    arch: int,
    dtype: torch.dtype,
    B: int,
    flags: dict[str, Any],
    bank_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tiles of the two products."""
    weights, of_nce, rows = choose(BANK_CONTRAST_WIDE, arch)[_key(dtype)]
    first, BLOCK_B = of_nce if flags["NCE"] else weights, max(64, next_power_of_2(B))
    if _is_widest(dtype, bank_dtype):
        rows, BLOCK_B = rows._replace(BLOCK_D=64), min(128, BLOCK_B)
    first = first._replace(BLOCK_B=min(first.BLOCK_B, BLOCK_B))
    return first._asdict(), rows._asdict()


def bank_contrast_backward(arch: int, dtype: torch.dtype, padded_D: int) -> dict[str, Any]:
    tile = choose(BANK_CONTRAST_BACKWARD, arch)[_key(dtype)]
    BLOCK_D, CHUNK_D = min(tile.BLOCK_D, padded_D), min(tile.CHUNK_D, padded_D)
    if BLOCK_D < 128:
        tile = tile._replace(BLOCK_K=32, num_warps=4)
    return tile._replace(BLOCK_D=BLOCK_D, CHUNK_D=CHUNK_D)._asdict()


def in_batch_contrast(
    arch: int, dtype: torch.dtype, B: int, D: int, has_labels: bool
) -> dict[str, Any]:
    """That of bank_contrast's pass, or of the first of its two products."""
    narrow = _in_batch(arch, dtype, B, D, int(has_labels))
    if narrow:
        return dict(narrow)
    wide = choose(BANK_CONTRAST_WIDE, arch)[_key(dtype)][0]
    BLOCK_B = min(wide.BLOCK_B, max(64, next_power_of_2(B)), 128 if has_labels else 256)
    return {**wide._replace(BLOCK_B=BLOCK_B)._asdict(), "BLOCK_D": wide.CHUNK_D, "WHOLE": False}


def in_batch_contrast_backward(arch: int, dtype: torch.dtype, B: int, D: int) -> dict[str, Any]:
    """That of bank_contrast's pass with numbers for each of a tile's columns; or that of its
    gradient to the bank.
    """
    narrow = dict(_in_batch(arch, dtype, B, D, 1))
    if narrow:
        if 100 <= arch < 120 and narrow["BLOCK_B"] == 64 and narrow["BLOCK_D"] <= 128:
            narrow |= {"num_warps": 4, "num_stages": 3}  # with 8 warps some bytes are spilled
        return narrow
    tile = choose(BANK_CONTRAST_BACKWARD, arch)[_key(dtype)]
    blocks = {"BLOCK_B": tile.BLOCK_K, "BLOCK_K": tile.BLOCK_B}
    return {**tile._asdict(), **blocks, "TMA": False, "WHOLE": False}


@functools.lru_cache(maxsize=1024)
def _in_batch(arch: int, dtype: torch.dtype, B: int, D: int, load: int) -> dict[str, Any]:
    tile = dict(_bank_contrast(arch, dtype, B, D, load, None))
    if tile:
        del tile["FIXED"]  # sums follow the running maximum, and weights know lse
        tile |= {"CHUNK_D": tile["BLOCK_D"], "WHOLE": True}
    return tile


def indexed_contrast(arch: int, padded_D: int) -> dict[str, int]:
    return _indexed(choose(INDEXED_CONTRAST, arch), padded_D, 64)


def indexed_contrast_backward(arch: int, padded_D: int) -> dict[str, int]:
    # Few queries name the same row.
    return _indexed(choose(INDEXED_CONTRAST_BACKWARD, arch), padded_D, 16)


def _indexed(tile: IndexedTile, padded_D: int, most_rows: int) -> dict[str, int]:
    rows = max(1, min(most_rows, tile.ELEMENTS // padded_D))
    num_warps = max(tile.num_warps, padded_D // 512)  # query and summed rows fit their registers
    return {"BLOCK_M": rows, "BLOCK_D": padded_D, "num_warps": num_warps}


def bank_update(padded_D: int) -> dict[str, int]:
    return {"BLOCK_D": padded_D, "num_warps": 4 if padded_D <= 1024 else 16}


def unit_rows(padded_D: int) -> dict[str, int]:
    """Whole rows, 32 elements a thread."""
    BLOCK_N = max(1, 1024 // padded_D)
    return {
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": padded_D,
        "num_warps": max(1, BLOCK_N * padded_D // 1024),
    }


def _key(dtype: torch.dtype) -> Any:
    return HALF if dtype in (torch.bfloat16, torch.float16) else dtype


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for sm_90, and for Triton's interpreter, which takes whatever Triton has."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(table: dict[int, Row], arch: int) -> Row:
    """The table's row for an architecture."""
    return table[max(first for first in table if first <= arch)]
