"""`codir-fast bench`: the kernels beside their peers on this machine, loss and gradient, equality
with float64 before any timing.

Everything is timed in interleaved rounds, with the ceilings of the machine (a product of matrices
of 2048 x 2048, a copy of 256 MiB) in the same run.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from codir_fast.benchmarks import measure, report
from codir_fast.benchmarks.peers import PEERS, Inputs, Peer, error_of, make_inputs, truth
from codir_fast.benchmarks.shapes import SHAPES, Shape, bank, find_shape

from codir_fast.errors import UsageError

# Of float32 results, relative to the largest element of the truth.
TOLERANCE = 1e-4
_SLOW = 3.0  # seconds; what takes longer is timed once
SWEEPS = {
    "K": [bank("K", 256, 1 << n, 128) for n in range(10, 23, 2)],
    "B": [bank("B", B, 65536, 128) for B in (1, 2, 4, 6, 8, 12, 16, 24, 32, 33, 40, 48, 56, 64)],
}
SWEEP_PEERS = {
    "K": ("codir_fast", "chunked", "eager", "compile"),
    "B": ("codir_fast", "two-products", "chunked"),
}

Advance = Callable[[], None]


def run(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.list:
        print(_listing())
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = None if options.out is None else _folder(options.out)
    every = options.shape in (None, ["all"])
    shapes = list(SHAPES) if every else [find_shape(text) for text in options.shape]
    sweeps = options.sweep or []
    results = {"machine": measure.stamp(), "ceilings": {}, "shapes": [], "sweeps": {}}
    if options.shape or not sweeps:
        _run_shapes(shapes, options.peers, options.budget, results)
        print(report.as_table(results["shapes"], results["ceilings"]))
    for letter in sweeps:
        results["sweeps"][letter] = _run_sweep(letter, options.peers, options.budget)
        print(_sweep_table(results["sweeps"][letter], letter))
    if out is not None:
        _write(out, results)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="codir-fast bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    names = ", ".join(shape.name for shape in SHAPES)
    parser.add_argument(
        "--shape", nargs="+", help=f"{names}, or B,K,D; default: all, unless --sweep is given"
    )
    parser.add_argument("--peers", nargs="+", help="names from --list; default: all that can run")
    parser.add_argument(
        "--sweep", nargs="+", help="curves over K (1,024 to 4 M rows) or B (1 to 64)"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as it is")
    parser.add_argument(
        "--budget", type=float, default=0.5, help="seconds for each peer at a shape; default 0.5"
    )
    parser.add_argument("--out", help="folder for table.md, results.json and the pictures")
    parser.add_argument("--list", action="store_true", help="list shapes and peers and stop")
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"bench: {error}") from None
    if unknown:
        raise UsageError(f"bench has no flag {unknown[0]}; bench --help lists them")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"`threads` must be at least 1, got {options.threads}")
    if not 0 < options.budget < math.inf:
        raise UsageError(f"`budget` must be positive seconds, got {options.budget}")
    known = {peer.name for peer in PEERS}
    for name in options.peers or []:
        if name not in known:
            raise UsageError(f"`peers` must be of {', '.join(sorted(known))}, got {name!r}")
    for letter in options.sweep or []:
        if letter not in SWEEPS:
            raise UsageError(f"`sweep` must be of {', '.join(SWEEPS)}, got {letter!r}")
    return options


def _folder(text: str) -> Path:
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`out` {text} can't be made: {error.strerror}") from None
    return folder


def _listing() -> str:
    lines = ["shapes"]
    lines += [f"  {shape.name:<15}{shape.operator}: {shape.why}" for shape in SHAPES]
    lines.append("peers")
    for peer in PEERS:
        missing = peer.refusal(SHAPES[0], 1 << 62)
        lines.append(f"  {peer.name:<25}{peer.what}{f' ({missing})' if missing else ''}")
    return "\n".join(dict.fromkeys(lines))


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="peer", dynamic_ncols=True)


def _chosen(operator: str, names: Sequence[str] | None) -> list[Peer]:
    """Of this operator; ours is always among them, since all is measured against it."""
    of_operator = [peer for peer in PEERS if peer.operator == operator]
    return [p for p in of_operator if names is None or p.name in names or p.name == report.OURS]


def _run_shapes(
    shapes: list[Shape], names: Sequence[str] | None, budget: float, results: dict[str, Any]
) -> None:
    ceilings: dict[str, list[float]] = {}
    with _bar(sum(len(_chosen(shape.operator, names)) for shape in shapes)) as bar:
        for shape in shapes:
            bar.set_description(shape.name)
            rows, found = measure_shape(shape, _chosen(shape.operator, names), budget, bar.update)
            results["shapes"] += rows
            for key, value in found.items():
                ceilings.setdefault(key, []).append(value)
    results["ceilings"] = {key: max(values) for key, values in ceilings.items()}


def measure_shape(
    shape: Shape, peers: Sequence[Peer], budget: float, advance: Advance = lambda: None
) -> tuple[list[report.Row], dict[str, float]]:
    """A row for each peer, and the ceilings of this run. Ours is the first peer."""
    common: report.Row = {"shape": shape.name, "operator": shape.operator, "sizes": shape.sizes}
    inputs = make_inputs(shape)
    rows: list[report.Row] = []
    quick: list[tuple[report.Row, Callable[[], Any]]] = []
    for peer in peers:
        row = common | {"peer": peer.name, "what": peer.what}
        rows.append(row)
        run = _prepare(peer, inputs, row)
        if run is not None:
            took = measure.seconds(run)
            is_slow = took > _SLOW
            row["extra_memory"] = measure.peak_memory(run, calls=1 if is_slow else 3)
            if is_slow:
                row["times"] = measure.Times(took, took, took, 1)
            else:
                quick.append((row, run))
        advance()
    tops, read = measure.ceilings()
    runs = [run for _, run in quick] + tops
    times = measure.interleaved(runs, budget * len(runs))
    ceilings = read(times[len(quick) :])
    for (row, _), each in zip(quick, times, strict=False):
        row["times"] = each
    ours = rows[0]["times"].median
    for row in rows:
        if "refused" not in row:
            row |= _figures(shape, row.pop("times"), ours, ceilings)
    return rows, ceilings


def _prepare(peer: Peer, inputs: Inputs, row: report.Row) -> Callable[[], Any] | None:
    """The peer's function once it has run and was right, with its error in the row; or the reason
    why it is not timed.
    """
    row["refused"] = peer.refusal(inputs.shape, measure.available_memory())
    if row["refused"] is None:
        run = peer.prepare(inputs)
        results = run()
        row["error"] = None if peer.is_floor else error_of(results, _truth(peer, inputs))
        if peer.is_floor or row["error"] <= TOLERANCE:
            del row["refused"]
            return run
        row["refused"] = f"wrong: error {row['error']:.1e}, allowed {TOLERANCE:.0e}"
    if peer.name == report.OURS:
        raise RuntimeError(f"{peer.name} at {inputs.shape} {row['refused']}")
    return None


def check(peer: Peer, run: Callable[[], Any], inputs: Inputs) -> float:
    """The error of a peer, which must be right."""
    error = error_of(run(), _truth(peer, inputs))
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"{peer.name} is wrong at {inputs.shape}: error {error:.1e}, allowed {TOLERANCE:.0e}"
        )
    return error


def _truth(peer: Peer, inputs: Inputs) -> Any:
    return truth(inputs, peer.others_count, peer.normalizes)


def _figures(
    shape: Shape, times: measure.Times, ours: float, ceilings: dict[str, float]
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
            "share_of_ceiling": rate / ceilings["sgemm_flops"],
        }
    rate = shape.bytes / times.median
    # A copy moves each byte twice, in and out.
    return row | {
        "gigabytes_per_second": rate / 1e9,
        "share_of_ceiling": rate / ceilings["copy_bytes_per_second"],
    }


def _run_sweep(letter: str, names: Sequence[str] | None, budget: float) -> list[report.Row]:
    wanted = SWEEP_PEERS[letter] if names is None else names
    peers = _chosen("bank_contrast", wanted)
    rows = []
    with _bar(len(SWEEPS[letter]) * len(peers)) as bar:
        for shape in SWEEPS[letter]:
            size = shape.sizes[letter]
            bar.set_description(f"{letter}={size}")
            named = replace(shape, name=f"{letter}={size}")
            rows += measure_shape(named, peers, budget, bar.update)[0]
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
    stamp = ", ".join(
        (
            f"{machine['cpu']}",
            f"{machine['threads']} threads",
            machine["instruction_set"],
            f"torch {machine['torch']}",
            f"codir_fast {machine['codir_fast']}",
            machine["date"],
        )
    )
    parts = [f"Measured on {stamp}.", ""]
    if results["shapes"]:
        parts.append(report.as_table(results["shapes"], results["ceilings"]))
        report.plot_shapes(results["shapes"], stamp, out / "shapes.png")
    for letter, rows in results["sweeps"].items():
        parts.append(_sweep_table(rows, letter))
        report.plot_sweep(rows, letter, stamp, out / f"over_{letter}.png")
    (out / "table.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    report.write_json(out / "results.json", results)
    print(f"\nwritten to {out}")
