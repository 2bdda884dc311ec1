"""CODIR_FAST_AUTOTUNE=1: the fastest of a table's tile and its neighbours, on the GPU at hand."""

import itertools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from codir_fast.kernels.tiles import Tile
from triton.runtime.errors import OutOfResources, PTXASError

Result = TypeVar("Result")
_FOUND: dict[tuple[Any, ...], Tile] = {}  # by CODIR_FAST_AUTOTUNE=1, in this process


def run_best(
    key: tuple[Any, ...], tile: Tile, run: Callable[[Tile], Result], device: torch.device
) -> Result:
    """run(tile), with the table's tile; with CODIR_FAST_AUTOTUNE=1 on a GPU, with the fastest of it
    and its neighbours, which are timed at the first call with this key. What it finds is logged.
    """
    if os.environ.get("CODIR_FAST_AUTOTUNE") != "1" or device.type != "cuda":
        return run(tile)
    if key not in _FOUND:
        times = [(_milliseconds(run, other), n, other) for n, other in enumerate(neighbours(tile))]
        best, _, _FOUND[key] = min(times)
        text = "%s: the table's tile takes %.4f ms, the fastest of %d %.4f ms: %s"
        _LOG.info(text, key, times[0][0], len(times), best, _FOUND[key])
    return run(_FOUND[key])


_LOG = logging.getLogger("codir_fast.autotune")
_CHANGES: dict[str, tuple[Callable[[int], int], ...]] = {
    "BLOCK_K": (lambda n: n, lambda n: n // 2, lambda n: 2 * n),
    "BLOCK_B": (lambda n: n, lambda n: n // 2, lambda n: 2 * n),
    "BLOCK_T": (lambda n: n, lambda n: n // 2, lambda n: 2 * n),
    "num_warps": (lambda n: n, lambda n: 12 - n),  # 4 or 8
    "num_stages": (lambda n: n, lambda n: n - 1, lambda n: n + 1),
}


def neighbours(tile: Tile) -> list[Tile]:
    """The tile, then those that differ by a step in some of its sizes."""
    sizes = [name for name in _CHANGES if name in tile]
    changed = (
        {**tile, **{name: change(tile[name]) for name, change in zip(sizes, changes, strict=True)}}
        for changes in itertools.product(*(_CHANGES[name] for name in sizes))
    )
    # A matrix instruction takes 16 rows; a loop has a stage.
    return [
        t
        for t in changed
        if t.get("BLOCK_K", 16) >= 16 <= t.get("BLOCK_B", 16)
        and t.get("num_stages", 1) >= 1
        and t.get("BLOCK_T", 1) >= 1
    ]


def _milliseconds(run: Callable[[Tile], Any], tile: Tile) -> float:
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(tile), return_mode="median"))
    except (OutOfResources, PTXASError):  # more than the hardware has
        return float("inf")
