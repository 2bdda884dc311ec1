"""The kernels of in_batch_contrast as they are launched: see variants.py."""

import itertools
from collections.abc import Iterator

import torch
from codir_fast.kernels import in_batch_ends, in_batch_passes, problem, tiles
from codir_fast.kernels.ahead_of_time import descriptor, pointer
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

_FORMS = (False, True)


def in_batch(arch: int) -> Iterator[Variant]:
    for D in (64, 128, 256, 512, 1024):
        for B, has_labels in itertools.product((16, 32, 64, 1024), _FORMS):
            yield from passes(arch, HALF, B, D, has_labels)
        yield from passes(arch, torch.float16, 64, D, False)
        for has_labels in _FORMS:
            yield from passes(arch, FLOAT, 64, D, has_labels)
    for D, dtype in itertools.product((64, 512, 4096), (HALF, FLOAT)):
        yield from ends(arch, dtype, D)


def passes(arch: int, dtype: torch.dtype, B: int, D: int, has_labels: bool) -> Iterator[Variant]:
    """Forward, and backward one way and both."""
    given = {
        **dict.fromkeys(
            ("maximum_ptr", "total_ptr", "share_ptr", "sums_ptr", "grad_ptr"), pointer(FLOAT)
        ),
        "lse_ptr": pointer(torch.float64),
        "labels_ptr": pointer(torch.int64) if has_labels else None,
        "inv_temperature": NUMBER,
        **dict.fromkeys(("B", "rows_per_split"), COUNT),
        **dict.fromkeys(("W", "padded_B"), WIDTH),
        "HAS_LABELS": has_labels,
        "T_ON_DEVICE": False,
        "PRECISION": problem.precision(dtype),
        "STRIDE": int(dtype == torch.float16),
    }
    name = name_of(dtype, f"D={D}", f"B={B}", *["labels"] * has_labels)
    tile = tiles.in_batch_contrast(arch, dtype, B, D, has_labels)
    kernel = in_batch_passes.in_batch_sums_kernel
    yield make_variant("in_batch_contrast", name, arch, kernel, given | _of_rows(dtype, tile))
    tile = tiles.in_batch_contrast_backward(arch, dtype, B, D)
    kernel = in_batch_passes.in_batch_gradient_sums_kernel
    for symmetric in _FORMS:
        full = name_of(name, "both ways" if symmetric else "one way")
        every = given | {"SYMMETRIC": symmetric} | _of_rows(dtype, tile)
        yield make_variant("in_batch_contrast_backward", full, arch, kernel, every)


def _of_rows(dtype: torch.dtype, tile: tiles.Tile) -> dict[str, object]:
    """The tile, and both sides' rows as it loads them."""
    chunk, described = tile["CHUNK_D"], {}
    for name, block, by_copy_engine in (
        ("queries", "BLOCK_B", tile["TMA"] and not tile["WHOLE"]),
        ("rows", "BLOCK_K", tile["TMA"]),
    ):
        rows = descriptor(dtype, tile[block], chunk) if by_copy_engine else pointer(dtype)
        described[name] = rows
    return tile | described


def ends(arch: int, dtype: torch.dtype, D: int) -> Iterator[Variant]:
    """Before and after the passes."""
    given: dict[str, object] = {
        **dict.fromkeys(("rows_ptr", "query_ptr", "positive_ptr"), pointer(dtype)),
        **dict.fromkeys(("dquery_ptr", "dpositive_ptr"), pointer(dtype)),
        **dict.fromkeys(("loss_ptr", "dinv_temperature_ptr", "grad_ptr"), pointer(FLOAT)),
        **dict.fromkeys(("maximum_ptr", "total_ptr", "share_ptr", "sums_ptr"), pointer(FLOAT)),
        "unit_ptr": None,
        "lse_ptr": pointer(torch.float64),
        **dict.fromkeys(("B", "splits"), COUNT),
        **dict.fromkeys(("D", "W", "padded_B"), WIDTH),
        "STRIDE": 0,
    }
    for NORMALIZE in _FORMS:
        form = {"NORMALIZE": NORMALIZE, "T_ON_DEVICE": NORMALIZE}
        form["inv_temperature"] = pointer(FLOAT) if NORMALIZE else NUMBER
        name = name_of(dtype, f"D={D}", "unit rows" if NORMALIZE else "rows of any length")
        every = given | form | in_batch_passes.rows_tile(D)
        kernel = in_batch_passes.in_batch_rows_kernel
        yield make_variant("in_batch_contrast", f"rows, {name}", arch, kernel, every)
        for both, splits in itertools.product(_FORMS, (1, 8)):
            more = {"WAYS": 1 + both, "SYMMETRIC": both, **in_batch_ends.pair_tile(D, splits)}
            full = name_of(name, "both ways" if both else "one way", f"{splits} splits")
            for what, kernel in (
                ("losses", in_batch_ends.in_batch_losses_kernel),
                ("gradients", in_batch_ends.in_batch_gradients_kernel),
            ):
                every = given | form | more
                yield make_variant("in_batch_contrast", f"{what}, {full}", arch, kernel, every)
