"""A shape's peers side by side: equality with float64, memory, then times in interleaved rounds
with the ceilings of the machine.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from codir_fast.benchmarks import measure, report
from codir_fast.benchmarks.options import Where
from codir_fast.benchmarks.peers import Inputs, Peer, error_of, make_inputs, truth
from codir_fast.benchmarks.shapes import Shape

# Of results, relative to the largest element of the truth.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CEILINGS = "ceilings"
_SLOW = 3.0  # seconds; what takes longer is timed once
_TRACEBACK = 4000  # characters of it that are kept

Run = Callable[[], Any]
Begin = Callable[[str], None]
Rows = list[report.Row]


def measure_shape(
    shape: Shape,
    peers: Sequence[Peer],
    budget: float,
    begin: Begin = lambda name: None,
    where: Where = Where(),  # noqa: B008 (immutable)
) -> tuple[Rows, dict[str, float]]:
    """A row for each peer, and the ceilings of this run. A peer that fails or is wrong has the
    reason in its row, and all of them where there is no memory for the inputs. `begin` is told
    which peer (or CEILINGS) is up, before it runs.

    Raises:
        RuntimeError: the GPU takes no more work, after what the peer that is up did.
    """
    try:
        inputs = make_inputs(shape, where.device, where.dtype)
    except (RuntimeError, MemoryError) as error:
        measure.wait(where.device)
        return [empty_row(shape, peer) | failure(error) for peer in peers], {}
    rows: Rows = []
    quick: list[tuple[report.Row, Run]] = []
    for peer in peers:
        row = empty_row(shape, peer)
        rows.append(row)
        begin(peer.name)
        run = _try(peer, inputs, row, where)
        measure.wait(where.device)
        if run is not None and "times" not in row:
            quick.append((row, run))
    ceilings = _time(quick, budget, begin, where)
    figures(shape, rows, ceilings, where.dtype.itemsize)
    return rows, ceilings


def empty_row(shape: Shape, peer: Peer) -> report.Row:
    common = {"shape": shape.name, "operator": shape.operator, "sizes": shape.sizes}
    return common | {"peer": peer.name, "what": peer.what}


def _try(peer: Peer, inputs: Inputs, row: report.Row, where: Where) -> Run | None:
    """The peer's function once it was right, with its error and memory in the row, and its time if
    it is slow; or the reason why it is not timed.
    """
    try:
        run = _right(peer, inputs, row, where)
        if run is not None:
            took = measure.seconds(run, 1, where.device)
            is_slow = took > _SLOW
            row["extra_memory"] = measure.peak_memory(run, 1 if is_slow else 3, where.device)
            if is_slow:
                row["times"] = measure.Times(took, took, took, 1)
        return run
    except Exception as error:  # on a machine that it may not know
        row |= failure(error)
        return None


def failure(error: Exception) -> report.Row:
    """What a row says of a peer that failed, with the end of the traceback."""
    first = (str(error).splitlines() or [""])[0][:120]
    text = "".join(traceback.format_exception(error))
    folders = {os.path.abspath(path) for path in sys.path} | {str(Path(__file__).parents[1])}
    for folder in sorted(folders, key=len, reverse=True):  # results are read on other machines
        text = text.replace(f'"{folder}{os.sep}', '"')
    refused = f"failed: {type(error).__name__}: {first}"
    return {"refused": refused, "traceback": text[-_TRACEBACK:]}


def _right(peer: Peer, inputs: Inputs, row: report.Row, where: Where) -> Run | None:
    refusal = peer.refusal(inputs.shape, measure.available_memory(where.device))
    if refusal is not None:
        row["refused"] = refusal
        return None
    with torch.device(where.device):
        run = peer.prepare(inputs)
    results = run()
    row["error"] = None if peer.is_floor else error_of(results, _truth(peer, inputs))
    tolerance = TOLERANCE[where.dtype]
    if peer.is_floor or row["error"] <= tolerance:
        return run
    row["refused"] = f"wrong: error {row['error']:.1e}, allowed {tolerance:.0e}"
    return None


def check(peer: Peer, run: Run, inputs: Inputs) -> float:
    """The error of a peer, which must be right."""
    error, tolerance = error_of(run(), _truth(peer, inputs)), TOLERANCE[torch.float32]
    if not error <= tolerance:
        raise RuntimeError(
            f"{peer.name} is wrong at {inputs.shape}: error {error:.1e}, allowed {tolerance:.0e}"
        )
    return error


def _truth(peer: Peer, inputs: Inputs) -> Any:
    return truth(inputs, peer.others_count, peer.normalizes)


def _time(
    quick: list[tuple[report.Row, Run]], budget: float, begin: Begin, where: Where
) -> dict[str, float]:
    """The ceilings, once each row has its times."""
    begin(CEILINGS)
    tops, read = measure.ceilings(where.device, where.dtype)
    runs = [run for _, run in quick] + tops
    names = [row["peer"] for row, _ in quick] + [CEILINGS] * len(tops)
    times = measure.interleaved(runs, budget * len(runs), where.device, lambda n: begin(names[n]))
    for (row, _), each in zip(quick, times, strict=False):
        row["times"] = each
    return read(times[len(quick) :])


def figures(shape: Shape, rows: Rows, ceilings: dict[str, float], itemsize: int) -> None:
    """Puts the figures that follow from the times into the rows. `ratio` is the time relative to
    ours, None where ours was not timed.
    """
    ours = [row["times"].median for row in rows if row["peer"] == report.OURS and "times" in row]
    for row in rows:
        if "times" in row:
            times = row.pop("times")
            row |= vars(times) | {"ratio": times.median / ours[0] if ours else None}
            row |= _rates(shape, times.median, ceilings, itemsize)


def _rates(
    shape: Shape, median: float, ceilings: dict[str, float], itemsize: int
) -> dict[str, float]:
    bandwidth = shape.bytes(itemsize) / median
    # A copy moves each byte twice, in and out.
    share_of_copy = bandwidth / ceilings["copy_bytes_per_second"]
    if not shape.flop:
        return {"gigabytes_per_second": bandwidth / 1e9, "share_of_ceiling": share_of_copy}
    rate = shape.flop / median
    return {
        "gflops": rate / 1e9,
        "share_of_ceiling": rate / ceilings["product_flops"],
        # What bounds few queries: the bank is read once.
        "share_of_copy": share_of_copy,
    }
