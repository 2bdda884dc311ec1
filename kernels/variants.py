"""Every kernel of the tables in tiles.py as it is launched, with the types of its arguments: what
`make static-gpu` compiles, and what tests look into.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from codir_fast.kernels import (
    bank_contrast,
    bank_contrast_backward,
    bank_contrast_wide,
    bank_update,
    contrast,
    indexed_contrast,
    indexed_contrast_backward,
    masked_pool,
    masked_pool_backward,
    problem,
    tiles,
    unit_rows,
)
from codir_fast.kernels.ahead_of_time import Type, descriptor, pointer
from codir_fast.kernels.in_batch_variants import in_batch
from codir_fast.kernels.variant import (
    COUNT,
    FLOAT,
    HALF,
    NUMBER,
    WIDTH,
    Variant,
    make_variant,
    name_of,
)

ARCHITECTURES = (80, 89, 90, 100, 120)

# What picks a query's negatives, by the uses that the public interface has.
USES: dict[str, dict[str, bool]] = {
    "all rows": {},
    "all rows, odd K": {"HAS_TAIL": True},
    "own row left out": {"HAS_EXCLUDE": True},
    "bank with labels": {"HAS_LABELS": True, "HAS_EXCLUDE": True},
    "bank not full": dict.fromkeys(("HAS_LABELS", "HAS_EXCLUDE", "HAS_VALID", "HAS_TAIL"), True),
    "rows of any length": {"HAS_SCALE": True, "HAS_TAIL": True},
    "rows of any length, labels": dict.fromkeys(
        ("HAS_SCALE", "HAS_LABELS", "HAS_EXCLUDE", "HAS_TAIL"), True
    ),
    "NCE": {"NCE": True},
    "NCE, bank not full": dict.fromkeys(
        ("NCE", "HAS_LABELS", "HAS_EXCLUDE", "HAS_VALID", "HAS_TAIL"), True
    ),
}
# A float8 bank has a scale for each of its rows.
FLOAT8_USES = ("rows of any length", "rows of any length, labels")
# A bank keeps float32 rows unless it is told otherwise; under autocast queries are bfloat16.
FLOAT32_USES = ("all rows", "bank with labels", "bank not full")
QUERIES = (16, 32, 64, 256, 512, 2048, 4096)  # each tile of a table serves one of these
FLAGS = ("HAS_SCALE", "HAS_LABELS", "HAS_EXCLUDE", "HAS_VALID", "HAS_TAIL", "NCE", "T_ON_DEVICE")


def every(arch: int) -> list[Variant]:
    """All variants for an architecture; of those that are the same the first."""
    different: dict[tuple[Any, ...], Variant] = {}
    for variant in _every(arch):
        key = (variant.kernel, repr(variant.arguments), repr(variant.options))
        different.setdefault(key, variant)
    return list(different.values())


def _every(arch: int) -> Iterator[Variant]:
    yield from pools(arch)
    yield from in_batch(arch)
    for dtype in (HALF, torch.float16, FLOAT):
        for D in (64, 128, 256, 512):
            for B in QUERIES:
                for use in USES:
                    # float16 takes the same tiles as bfloat16, without the fixed shift.
                    if dtype != torch.float16 or use in ("all rows", "bank with labels"):
                        yield from passes(arch, dtype, B, D, use)
    if arch >= 89:  # sm_80 has no float8
        for use in FLOAT8_USES:
            for B in (64, 256):
                yield from two_products(arch, HALF, B, use, torch.float8_e4m3fn)
        for D in (64, 128, 256, 512):
            for B in QUERIES:
                for use in FLOAT8_USES:
                    yield from passes(arch, HALF, B, D, use, torch.float8_e4m3fn)
    for use in FLOAT32_USES:
        for B in (64, 256):
            yield from two_products(arch, HALF, B, use, FLOAT)
        for D in (64, 128, 256):
            for B in QUERIES:
                yield from passes(arch, HALF, B, D, use, FLOAT)
    for dtype in (HALF, FLOAT):
        for use in USES:
            for B in (64, 256):
                yield from two_products(arch, dtype, B, use)
            for D in (64, 128, 1024):
                yield backward(arch, dtype, D, use)
    for D in (64, 128, 512, 4096):
        for use in ("all rows", "bank not full", "rows of any length, labels", "NCE"):
            yield from by_index(arch, D, use)
        yield from others(arch, D)


def _flags(use: str) -> dict[str, bool]:
    return dict.fromkeys(FLAGS, False) | USES[use]


def _masks(flags: dict[str, bool], label_dtype: torch.dtype) -> dict[str, Type | None]:
    types = {
        "scale_ptr": (FLOAT, "HAS_SCALE"),
        "labels_ptr": (label_dtype, "HAS_LABELS"),
        "bank_labels_ptr": (label_dtype, "HAS_LABELS"),
        "exclude_ptr": (torch.int64, "HAS_EXCLUDE"),
        "valid_ptr": (torch.uint8, "HAS_VALID"),
    }
    return {name: pointer(dtype) if flags[flag] else None for name, (dtype, flag) in types.items()}


def _objective(flags: dict[str, bool]) -> dict[str, Type | None]:
    partition = pointer(torch.float64) if flags["NCE"] else None
    numbers = dict.fromkeys(("inv_temperature", "log_noise", "extra"), NUMBER)
    return {**numbers, "log_partition_ptr": partition}


def _sums() -> dict[str, Type]:
    return dict.fromkeys(("maximum_ptr", "total_ptr", "rows_ptr"), pointer(FLOAT))


def _dtypes(dtype: torch.dtype, bank_dtype: torch.dtype | None) -> tuple[Any, ...]:
    return (dtype,) if bank_dtype is None else (dtype, f"{name_of(bank_dtype)} bank")


def passes(
    arch: int,
    dtype: torch.dtype,
    B: int,
    D: int,
    use: str,
    bank_dtype: torch.dtype | None = None,
) -> Iterator[Variant]:
    """The one-pass kernel, where the table has a tile for this width. The bank has the dtype of the
    queries, unless it is given.
    """
    flags = _flags(use)
    tile = tiles.bank_contrast(arch, dtype, B, D, flags, bank_dtype)
    if not tile:
        return
    stored = bank_dtype or dtype
    block = (tile["BLOCK_K"], tile["BLOCK_D"])
    bank = descriptor(stored, *block) if tile["TMA"] else pointer(stored)
    given = {
        **_sums(),
        **_masks(flags, torch.int32),
        **_objective(flags),
        "query_ptr": pointer(dtype),
        "bank": bank,
        **dict.fromkeys(("B", "K", "rows_per_split"), COUNT),
        "D": WIDTH,
        **flags,
        **tile,
        "PRECISION": problem.precision(dtype),
    }
    dtypes = _dtypes(dtype, bank_dtype)
    name = name_of(*dtypes, f"D={D}", f"B={B}", use)
    yield make_variant("bank_contrast", name, arch, bank_contrast.bank_contrast_kernel, given)


def two_products(
    arch: int, dtype: torch.dtype, B: int, use: str, bank_dtype: torch.dtype | None = None
) -> Iterator[Variant]:
    """The kernels for embeddings that are wider than that."""
    flags, stored = _flags(use), bank_dtype or dtype
    dtypes = _dtypes(dtype, bank_dtype)
    first, second = tiles.bank_contrast_wide(arch, dtype, B, flags, bank_dtype)
    block = (first["BLOCK_K"], first["CHUNK_D"])
    queries = (first["BLOCK_B"], first["CHUNK_D"])
    tma = first["TMA"]
    common = {
        **_sums(),
        **_masks(flags, torch.int32),
        **_objective(flags),
        **flags,
        "weights_ptr": pointer(dtype),
        **dict.fromkeys(("tile_maximum_ptr", "tile_total_ptr"), pointer(FLOAT)),
        **dict.fromkeys(("maximum_before_ptr", "total_before_ptr"), pointer(FLOAT)),
        **dict.fromkeys(("B", "K", "chunk_begin", "tiles_in_chunk", "tiles_per_split"), COUNT),
        **dict.fromkeys(("D", "chunk_rows"), WIDTH),
        "PRECISION": problem.precision(dtype),
    }
    given = {
        **common,
        "query_ptr": descriptor(dtype, *queries) if tma else pointer(dtype),
        "bank": descriptor(stored, *block) if tma else pointer(stored),
        **first,
    }
    kernel = bank_contrast_wide.bank_contrast_weights_kernel
    yield make_variant(
        "bank_contrast", name_of("weights", *dtypes, f"B={B}", use), arch, kernel, given
    )
    if bank_dtype is None and use not in ("all rows", "bank not full", "NCE"):
        return  # the second product differs by no more
    block = (first["BLOCK_K"], second["BLOCK_D"])
    bank = descriptor(stored, *block) if tma else pointer(stored)
    for FIRST in (True, False):
        given = {**common, "bank": bank, "TMA": tma, "FIRST": FIRST, "BLOCK_K": first["BLOCK_K"]}
        name = name_of("rows", *dtypes, use, "first chunk" if FIRST else "later chunk")
        kernel = bank_contrast_wide.bank_contrast_rows_kernel
        yield make_variant("bank_contrast", name, arch, kernel, given | second)


def backward(arch: int, dtype: torch.dtype, D: int, use: str) -> Variant:
    flags = _flags(use)
    given = {
        **_masks(flags, torch.int32),
        **flags,
        **dict.fromkeys(("dbank_ptr", "query_ptr", "bank"), pointer(dtype)),
        "grad_ptr": pointer(FLOAT),
        "lse_ptr": pointer(torch.float64),
        "inv_temperature": NUMBER,
        **dict.fromkeys(("B", "K"), COUNT),
        "D": WIDTH,
        "PRECISION": problem.precision(dtype),
        **tiles.bank_contrast_backward(arch, dtype, D),
    }
    kernel = bank_contrast_backward.bank_contrast_backward_kernel
    name = name_of(dtype, f"D={D}", use)
    return make_variant("bank_contrast_backward", name, arch, kernel, given)


def by_index(arch: int, D: int, use: str) -> Iterator[Variant]:
    flags = _flags(use)
    given = {
        **_sums(),
        **_masks(flags, torch.int64),
        **_objective(flags),
        **flags,
        **dict.fromkeys(("query_ptr", "bank_ptr", "dbank_ptr"), pointer(HALF)),
        **dict.fromkeys(("index_ptr", "pair_ptr", "begin_ptr"), pointer(torch.int64)),
        "grad_ptr": pointer(FLOAT),
        "lse_ptr": pointer(torch.float64),
        **dict.fromkeys(("B", "M", "K", "positions_per_split"), COUNT),
        "D": WIDTH,
    }
    name = name_of(f"D={D}", use)
    tile = tiles.indexed_contrast(arch, D)
    kernel = indexed_contrast.indexed_contrast_kernel
    yield make_variant("indexed_contrast", name, arch, kernel, {**given, **tile})
    tile = tiles.indexed_contrast_backward(arch, D)
    kernel = indexed_contrast_backward.indexed_contrast_backward_kernel
    yield make_variant("indexed_contrast_backward", name, arch, kernel, {**given, **tile})


def others(arch: int, D: int) -> Iterator[Variant]:
    """Before and after the passes, and bank_update."""
    ends = ((False, True, False), (True, False, True))
    for (NCE, NORMALIZE, T_ON_DEVICE), splits in itertools.product(ends, (1, 8, 264)):
        given = {
            **_sums(),
            **_objective({"NCE": NCE}),
            **dict.fromkeys(("loss_ptr", "dquery_ptr", "dpositive_ptr"), pointer(FLOAT)),
            **dict.fromkeys(("dinv_temperature_ptr",), pointer(FLOAT)),
            "lse_ptr": pointer(torch.float64),
            **dict.fromkeys(("query_ptr", "positive_ptr"), pointer(HALF)),
            **dict.fromkeys(("B", "splits"), COUNT),
            "D": WIDTH,
            "NCE": NCE,
            "NORMALIZE": NORMALIZE,
            "T_ON_DEVICE": T_ON_DEVICE,
            **problem.combine_tile(D, splits),
        }
        if T_ON_DEVICE:
            given["inv_temperature"] = pointer(FLOAT)
        name = name_of("combine", f"D={D}", "NCE" if NCE else "InfoNCE", f"{splits} splits")
        yield make_variant("bank_contrast", name, arch, contrast.combine_kernel, given)
    for SORTED in (False, True):
        labels = ("labels_ptr", "bank_labels_ptr", "sought_ptr")
        given = {
            **dict.fromkeys(("unit_ptr", "query_ptr"), pointer(HALF)),
            **dict.fromkeys(("numbers_ptr", "bank_numbers_ptr"), pointer(torch.int32)),
            **dict.fromkeys(labels, pointer(torch.int64)),
            **dict.fromkeys(("B", "K", "num_rows", "label_blocks", "halvings"), COUNT),
            "D": WIDTH,
            "HAS_LABELS": True,
            "SORTED": SORTED,
            **problem.prepare_tile(D),
        }
        name = name_of("prepare", f"D={D}", "labels sorted" if SORTED else "labels compared")
        yield make_variant("bank_contrast", name, arch, contrast.prepare_kernel, given)
    for dtype in (HALF, FLOAT):
        given = {
            **dict.fromkeys(("unit_ptr", "drows_ptr", "grad_ptr", "rows_ptr"), pointer(dtype)),
            "norm_ptr": pointer(FLOAT),
            "N": COUNT,
            "D": WIDTH,
            **tiles.unit_rows(D),
        }
        name = name_of(f"D={D}", dtype)
        for kernel in (unit_rows.unit_rows_kernel, unit_rows.unit_rows_backward_kernel):
            yield make_variant(
                kernel.fn.__name__.removesuffix("_kernel"), name, arch, kernel, given
            )
    given = {
        "bank_ptr": pointer(HALF),
        "filled_ptr": pointer(torch.uint8),
        **dict.fromkeys(("row_ptr", "order_ptr"), pointer(torch.int64)),
        "keys_ptr": pointer(FLOAT),
        "momentum": NUMBER,
        **dict.fromkeys(("N", "K"), COUNT),
        "D": WIDTH,
        "HAS_FILLED": True,
        **tiles.bank_update(D),
    }
    yield make_variant("bank_update", f"D={D}", arch, bank_update.bank_update_kernel, given)


def pools(arch: int) -> Iterator[Variant]:
    for dtype in (HALF, torch.float16, FLOAT, torch.float64):
        for mode in masked_pool.MODES:
            for mask in (torch.int64, torch.uint8, None):
                yield from pool(arch, dtype, mode, mask)


def pool(
    arch: int, dtype: torch.dtype, mode: str, mask: torch.dtype | None, L: int = 6
) -> Iterator[Variant]:
    """Forward and backward."""
    tile = tiles.choose(tiles.MASKED_POOL, arch)[dtype]._asdict()
    given = {
        **dict.fromkeys(("pooled_ptr", "grad_ptr"), pointer(dtype)),
        **dict.fromkeys(("layers", "dhidden"), (pointer(dtype),) * L),
        "argmax_ptr": pointer(torch.int64),
        "mask_ptr": None if mask is None else pointer(mask),
        "T": COUNT,
        **dict.fromkeys(("H", "stride_b", "stride_t"), WIDTH),
        "stride_mb": COUNT,
        "stride_mt": 1,
        "MODE": mode,
        "HAS_MASK": mask is not None,
        "ALIGNED": True,
        "L": L,
        **tile,
    }
    name = name_of(mode, dtype, "no mask" if mask is None else mask)
    yield make_variant("masked_pool", name, arch, masked_pool.masked_pool_kernel, given)
    kernel = masked_pool_backward.masked_pool_backward_kernel
    yield make_variant("masked_pool_backward", name, arch, kernel, given)
