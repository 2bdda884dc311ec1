"""`codir-fast bench`: the kernels beside their peers on this machine, loss and gradient, equality
with float64 before any timing.

On a GPU, several processes compile what is timed first (--warm). Everything is timed in interleaved
rounds, with the ceilings of the machine (a product of matrices of 2048 x 2048, a copy of 256 MiB;
8192 x 8192 and 1 GiB on a GPU) in the same run. What fails or is wrong is listed with the reason,
and the others are timed; the files of --out are written anew after each shape, and hold what is
done wherever the run ends.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from codir_fast.benchmarks import comparison, measure, report, warm
from codir_fast.benchmarks.isolated import Isolated
from codir_fast.benchmarks.options import GPU_LIMIT, Where, folder, parse, where
from codir_fast.benchmarks.peers import PEERS, Peer
from codir_fast.benchmarks.shapes import SHAPES, SWEEPS, Shape, find_shape

SWEEP_PEERS = {
    "K": ("codir_fast", "chunked", "eager", "compile"),
    "B": ("codir_fast", "two-products", "chunked"),
}

Compare = Callable[..., tuple[comparison.Rows, dict[str, float]]]
Write = Callable[[], None]
Timed = list[tuple[Shape, list[Peer]]]


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
    seconds = options.train_step
    named: Timed = []
    if options.shape or not (options.sweep or seconds):
        named = [(s, _chosen(s.operator, options.peers, place.device)) for s in shapes]
    sweeps = {letter: _sweep(letter, options.peers, place.device) for letter in options.sweep or []}
    machine = measure.stamp(place.device, place.dtype)
    results = {"machine": machine, "ceilings": {}, "shapes": [], "sweeps": {}}
    write = (lambda: None) if out is None else partial(_write, out, results)
    if options.warm:
        _warm(sum(sweeps.values(), named), place, options, results)
    with _comparing(place, options.limit) as compare:
        if named:
            _run_shapes(named, options.budget, results, compare, write)
            print(report.as_table(results["shapes"], results["ceilings"]))
        for letter, sweep in sweeps.items():
            _run_sweep(letter, sweep, options.budget, results, compare, write)
            print(_sweep_table(results["sweeps"][letter], letter))
    if seconds is not None:
        from codir_fast.benchmarks.train_step import measure_train_step  # needs transformers

        results["train_step"] = measure_train_step(seconds)
        print(report.train_step_table(results["train_step"]))
        write()
    if out is not None:
        _draw(out, results)
        print(f"\nwritten to {out}")
    return _exit_code(results)


@contextmanager
def _comparing(where: Where, limit: float | None) -> Iterator[Compare]:
    """comparison.measure_shape at a place: here, or isolated where there is a limit."""
    if limit is None:
        yield partial(comparison.measure_shape, where=where)
        return
    isolated = Isolated(where, limit)
    try:
        yield isolated.measure_shape
    finally:
        isolated.close()


def _exit_code(results: dict[str, Any]) -> int:
    """1 where ours was not timed, with a line for each such place."""
    rows = [*results["shapes"], *(row for rows in results["sweeps"].values() for row in rows)]
    ours = [row for row in rows if row["peer"] == report.OURS and "refused" in row]
    for row in ours:
        line = f"{report.OURS} at {row['shape']} ({row['operator']}) {row['refused']}"
        print(f"codir-fast: error: {line}", file=sys.stderr)
    return 1 if ours else 0


def _listing() -> str:
    lines = ["shapes"]
    lines += [f"  {shape.name:<20}{shape.operator}: {shape.why}" for shape in SHAPES]
    lines.append("peers")
    for peer in PEERS:
        missing = peer.refusal(SHAPES[0], 1 << 62)
        lines.append(f"  {peer.name:<25}{peer.what}{f' ({missing})' if missing else ''}")
    return "\n".join(dict.fromkeys(lines))


def _bar(total: int, unit: str = "peer", what: str | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(desc=what, total=total, unit=unit, dynamic_ncols=True)


def _chosen(operator: str, names: Sequence[str] | None, device: torch.device) -> list[Peer]:
    """Of this operator; ours is always among them, since all is measured against it."""
    of_operator = [peer for peer in PEERS if peer.operator == operator]
    if device.type == "cpu":
        of_operator = [peer for peer in of_operator if not peer.gpu_only]
    return [p for p in of_operator if names is None or p.name in names or p.name == report.OURS]


def _sweep(letter: str, names: Sequence[str] | None, device: torch.device) -> Timed:
    peers = _chosen("bank_contrast", SWEEP_PEERS[letter] if names is None else names, device)
    shapes = SWEEPS[letter]
    return [(replace(s, name=f"{letter}={s.sizes[letter]}"), peers) for s in shapes]


def _warm(timed: Timed, where: Where, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Compiles what is timed, and puts how that went into the results."""
    memory = warm.memory_of(where.device)
    cases = warm.plan(timed, where.dtype, memory)
    processes = warm.num_processes(options.warm, cases, memory)
    if not processes:
        return
    # Compiling beside others takes longer than running.
    limit = max(GPU_LIMIT, options.limit or 0.0)
    start = time.perf_counter()
    with _bar(len(cases), "step", "compiling") as bar:
        refused = warm.warm(cases, where, limit, processes, memory, lambda case: bar.update())
    results["compiled"] = {
        "steps": len(cases),
        "processes": processes,
        "seconds": time.perf_counter() - start,
        "refused": refused,
    }


def _run_shapes(
    timed: Timed, budget: float, results: dict[str, Any], compare: Compare, write: Write
) -> None:
    with _bar(sum(len(peers) for _, peers in timed)) as bar:
        for shape, peers in timed:
            bar.set_description(shape.name)
            rows, found = compare(shape, peers, budget)
            bar.update(len(peers))
            results["shapes"] += rows
            best = results["ceilings"]
            best |= {key: max(value, best.get(key, 0.0)) for key, value in found.items()}
            write()


def _run_sweep(
    letter: str,
    timed: Timed,
    budget: float,
    results: dict[str, Any],
    compare: Compare,
    write: Write,
) -> None:
    results["sweeps"][letter] = rows = []
    with _bar(sum(len(peers) for _, peers in timed)) as bar:
        for shape, peers in timed:
            bar.set_description(shape.name)
            rows += compare(shape, peers, budget)[0]
            bar.update(len(peers))
            write()


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
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        figures = f"{row['median'] * 1e3:.4g} | {ratio} | {memory}"
        lines.append(f"| {size} | {row['peer']} | {figures} |")
    return "\n".join(lines)


def _stamp(machine: dict[str, Any]) -> str:
    on_cpu = (machine["cpu"], f"{machine['threads']} threads", machine["instruction_set"])
    return ", ".join(
        (
            *((machine["gpu"],) if "gpu" in machine else on_cpu),
            machine["dtype"],
            f"torch {machine['torch']}",
            f"codir_fast {machine['codir_fast']}",
            machine["date"],
        )
    )


def _write(out: Path, results: dict[str, Any]) -> None:
    parts = [f"Measured on {_stamp(results['machine'])}.", ""]
    if results["shapes"]:
        parts.append(report.as_table(results["shapes"], results["ceilings"]))
    if "train_step" in results:
        parts += ["", report.train_step_table(results["train_step"])]
    parts += [_sweep_table(rows, letter) for letter, rows in results["sweeps"].items()]
    report.write(out / "table.md", "\n".join(parts))
    report.write(out / "results.json", json.dumps(results, indent=1))


def _draw(out: Path, results: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return
    stamp = _stamp(results["machine"])
    if results["shapes"]:
        report.plot_shapes(results["shapes"], stamp, out / "shapes.png")
    for letter, rows in results["sweeps"].items():
        report.plot_sweep(rows, letter, stamp, out / f"over_{letter}.png")
