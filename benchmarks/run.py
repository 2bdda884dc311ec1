"""`codir-fast bench`: the kernels beside their peers on this machine, loss and gradient, equality
with float64 before any timing.

Everything is timed in interleaved rounds, with the ceilings of the machine (a product of matrices
of 2048 x 2048, a copy of 256 MiB; 8192 x 8192 and 1 GiB on a GPU) in the same run.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from codir_fast.benchmarks import measure, report
from codir_fast.benchmarks.options import Where, folder, parse, where
from codir_fast.benchmarks.peers import PEERS, Inputs, Peer, error_of, make_inputs, truth
from codir_fast.benchmarks.shapes import SHAPES, SWEEPS, Shape, find_shape

# Of results, relative to the largest element of the truth.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_SLOW = 3.0  # seconds; what takes longer is timed once
SWEEP_PEERS = {
    "K": ("codir_fast", "chunked", "eager", "compile"),
    "B": ("codir_fast", "two-products", "chunked"),
}

Advance = Callable[[], None]


def run(arguments: list[str]) -> int:
    options = parse(arguments, __doc__ or "")
    if options.list:
        print(_listing())
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = None if options.out is None else folder(options.out)
    place = where(options)
    every = options.shape in (None, ["all"])
    fitting = [shape for shape in SHAPES if place.device.type != "cpu" or not shape.gpu_only]
    shapes = fitting if every else [find_shape(text) for text in options.shape]
    sweeps, seconds = options.sweep or [], options.train_step
    machine = measure.stamp(place.device, place.dtype)
    results = {"machine": machine, "ceilings": {}, "shapes": [], "sweeps": {}}
    if options.shape or not (sweeps or seconds):
        _run_shapes(shapes, place, options, results)
        print(report.as_table(results["shapes"], results["ceilings"]))
    for letter in sweeps:
        results["sweeps"][letter] = _run_sweep(letter, place, options)
        print(_sweep_table(results["sweeps"][letter], letter))
    if seconds is not None:
        from codir_fast.benchmarks.train_step import measure_train_step  # needs transformers

        results["train_step"] = measure_train_step(seconds)
        print(report.train_step_table(results["train_step"]))
    if out is not None:
        _write(out, results)
    return 0


def _listing() -> str:
    lines = ["shapes"]
    lines += [f"  {shape.name:<20}{shape.operator}: {shape.why}" for shape in SHAPES]
    lines.append("peers")
    for peer in PEERS:
        missing = peer.refusal(SHAPES[0], 1 << 62)
        lines.append(f"  {peer.name:<25}{peer.what}{f' ({missing})' if missing else ''}")
    return "\n".join(dict.fromkeys(lines))


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="peer", dynamic_ncols=True)


def _chosen(operator: str, names: Sequence[str] | None, device: torch.device) -> list[Peer]:
    """Of this operator; ours is always among them, since all is measured against it."""
    of_operator = [peer for peer in PEERS if peer.operator == operator]
    if device.type == "cpu":
        of_operator = [peer for peer in of_operator if not peer.gpu_only]
    return [p for p in of_operator if names is None or p.name in names or p.name == report.OURS]


def _run_shapes(
    shapes: list[Shape], where: Where, options: argparse.Namespace, results: dict[str, Any]
) -> None:
    ceilings: dict[str, list[float]] = {}
    peers = [_chosen(shape.operator, options.peers, where.device) for shape in shapes]
    with _bar(sum(len(chosen) for chosen in peers)) as bar:
        for shape, chosen in zip(shapes, peers, strict=True):
            bar.set_description(shape.name)
            rows, found = measure_shape(shape, chosen, options.budget, bar.update, where)
            results["shapes"] += rows
            for key, value in found.items():
                ceilings.setdefault(key, []).append(value)
    results["ceilings"] = {key: max(values) for key, values in ceilings.items()}


def measure_shape(
    shape: Shape,
    peers: Sequence[Peer],
    budget: float,
    advance: Advance = lambda: None,
    where: Where = Where(),  # noqa: B008 (immutable)
) -> tuple[list[report.Row], dict[str, float]]:
    """A row for each peer, and the ceilings of this run. Ours is the first peer."""
    common: report.Row = {"shape": shape.name, "operator": shape.operator, "sizes": shape.sizes}
    inputs = make_inputs(shape, where.device, where.dtype)
    rows: list[report.Row] = []
    quick: list[tuple[report.Row, Callable[[], Any]]] = []
    for peer in peers:
        row = common | {"peer": peer.name, "what": peer.what}
        rows.append(row)
        run = _prepare(peer, inputs, row, where)
        if run is not None:
            took = measure.seconds(run, 1, where.device)
            is_slow = took > _SLOW
            calls = 1 if is_slow else 3
            row["extra_memory"] = measure.peak_memory(run, calls, where.device)
            if is_slow:
                row["times"] = measure.Times(took, took, took, 1)
            else:
                quick.append((row, run))
        advance()
    tops, read = measure.ceilings(where.device, where.dtype)
    runs = [run for _, run in quick] + tops
    times = measure.interleaved(runs, budget * len(runs), where.device)
    ceilings = read(times[len(quick) :])
    for (row, _), each in zip(quick, times, strict=False):
        row["times"] = each
    ours = rows[0]["times"].median
    for row in rows:
        if "refused" not in row:
            row |= _figures(shape, row.pop("times"), ours, ceilings, where.dtype.itemsize)
    return rows, ceilings


def _prepare(peer: Peer, inputs: Inputs, row: report.Row, where: Where) -> Callable[[], Any] | None:
    """The peer's function once it has run and was right, with its error in the row; or the reason
    why it is not timed.
    """
    row["refused"] = peer.refusal(inputs.shape, measure.available_memory(where.device))
    if row["refused"] is None:
        try:
            with torch.device(where.device):
                run = peer.prepare(inputs)
            results = run()
        except Exception as error:
            if peer.name == report.OURS:
                raise
            # Somebody else's code, on a machine that it may not know.
            row["refused"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            return None
        row["error"] = None if peer.is_floor else error_of(results, _truth(peer, inputs))
        tolerance = TOLERANCE[where.dtype]
        if peer.is_floor or row["error"] <= tolerance:
            del row["refused"]
            return run
        row["refused"] = f"wrong: error {row['error']:.1e}, allowed {tolerance:.0e}"
    if peer.name == report.OURS:
        raise RuntimeError(f"{peer.name} at {inputs.shape} {row['refused']}")
    return None


def check(peer: Peer, run: Callable[[], Any], inputs: Inputs) -> float:
    """The error of a peer, which must be right."""
    error, tolerance = error_of(run(), _truth(peer, inputs)), TOLERANCE[torch.float32]
    if not error <= tolerance:
        raise RuntimeError(
            f"{peer.name} is wrong at {inputs.shape}: error {error:.1e}, allowed {tolerance:.0e}"
        )
    return error


def _truth(peer: Peer, inputs: Inputs) -> Any:
    return truth(inputs, peer.others_count, peer.normalizes)


def _figures(
    shape: Shape, times: measure.Times, ours: float, ceilings: dict[str, float], itemsize: int
) -> report.Row:
    row: report.Row = {
        "median": times.median,
        "lowest": times.lowest,
        "highest": times.highest,
        "rounds": times.rounds,
        "ratio": times.median / ours,
    }
    if shape.flop:
        rate = shape.flop / times.median
        return row | {
            "gflops": rate / 1e9,
            "share_of_ceiling": rate / ceilings["product_flops"],
            # What bounds few queries: the bank is read once; a copy moves each byte twice.
            "share_of_copy": shape.bytes(itemsize)
            / times.median
            / ceilings["copy_bytes_per_second"],
        }
    rate = shape.bytes(itemsize) / times.median
    # A copy moves each byte twice, in and out.
    return row | {
        "gigabytes_per_second": rate / 1e9,
        "share_of_ceiling": rate / ceilings["copy_bytes_per_second"],
    }


def _run_sweep(letter: str, where: Where, options: argparse.Namespace) -> list[report.Row]:
    wanted = SWEEP_PEERS[letter] if options.peers is None else options.peers
    peers = _chosen("bank_contrast", wanted, where.device)
    rows = []
    with _bar(len(SWEEPS[letter]) * len(peers)) as bar:
        for shape in SWEEPS[letter]:
            size = shape.sizes[letter]
            bar.set_description(f"{letter}={size}")
            named = replace(shape, name=f"{letter}={size}")
            rows += measure_shape(named, peers, options.budget, bar.update, where)[0]
    return rows


def _sweep_table(rows: list[report.Row], letter: str) -> str:
    lines = [
        "",
        f"| {letter} | peer | ms | times codir_fast | extra memory (MiB) |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        size = row["sizes"][letter]
        if "refused" in row:
            lines.append(f"| {size} | {row['peer']} | {row['refused']} | | |")
            continue
        memory = "?" if row["extra_memory"] is None else f"{row['extra_memory'] / 2**20:.1f}"
        figures = f"{row['median'] * 1e3:.4g} | {row['ratio']:.2f} | {memory}"
        lines.append(f"| {size} | {row['peer']} | {figures} |")
    return "\n".join(lines)


def _write(out: Path, results: dict[str, Any]) -> None:
    machine = results["machine"]
    on_cpu = (machine["cpu"], f"{machine['threads']} threads", machine["instruction_set"])
    stamp = ", ".join(
        (
            *((machine["gpu"],) if "gpu" in machine else on_cpu),
            machine["dtype"],
            f"torch {machine['torch']}",
            f"codir_fast {machine['codir_fast']}",
            machine["date"],
        )
    )
    parts = [f"Measured on {stamp}.", ""]
    if results["shapes"]:
        parts.append(report.as_table(results["shapes"], results["ceilings"]))
        report.plot_shapes(results["shapes"], stamp, out / "shapes.png")
    if "train_step" in results:
        parts += ["", report.train_step_table(results["train_step"])]
    for letter, rows in results["sweeps"].items():
        parts.append(_sweep_table(rows, letter))
        report.plot_sweep(rows, letter, stamp, out / f"over_{letter}.png")
    (out / "table.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    report.write_json(out / "results.json", results)
    print(f"\nwritten to {out}")
