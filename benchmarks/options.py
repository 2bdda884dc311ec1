"""The flags of `codir-fast bench`, checked."""

import argparse
import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from codir_fast.benchmarks import measure
from codir_fast.benchmarks.peers import PEERS
from codir_fast.benchmarks.shapes import SHAPES, SWEEPS

from codir_fast.errors import UsageError

GPU_LIMIT = 60.0  # seconds; a kernel is compiled at its first call
_MOST_WARM = 16  # processes that share a GPU, unless more are asked for


@dataclass(frozen=True)
class Where:
    """Device and dtype of all inputs, and the threads of PyTorch, None as they are."""

    device: torch.device = measure.CPU
    dtype: torch.dtype = torch.float32
    threads: int | None = None


def parse(arguments: list[str], description: str) -> argparse.Namespace:
    try:
        options, unknown = _parser(description).parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"bench: {error}") from None
    if unknown:
        raise UsageError(f"bench has no flag {unknown[0]}; bench --help lists them")
    _check(options)
    return options


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="codir-fast bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    names = ", ".join(shape.name for shape in SHAPES)
    parser.add_argument(
        "--shape",
        nargs="+",
        help=f"{names}, or B,K,D; default: all, unless --sweep or --train_step is given",
    )
    parser.add_argument("--peers", nargs="+", help="names from --list; default: all that can run")
    parser.add_argument(
        "--sweep", nargs="+", help="curves over K (1,024 to 4 M rows) or B (1 to 64)"
    )
    parser.add_argument(
        "--train_step",
        type=float,
        metavar="SECONDS",
        help="a distillation's training step without and with CoDIR's term, for so many seconds",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype",
        help="of the inputs: float32 on a CPU; bfloat16 (default), float16, float32",
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as it is")
    parser.add_argument(
        "--budget", type=float, default=0.5, help="seconds for each peer at a shape; default 0.5"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="peers run in a process of their own, which is ended when one takes longer for one "
        "thing; default: 60 on a GPU, on a CPU neither",
    )
    parser.add_argument(
        "--warm",
        type=int,
        metavar="PROCESSES",
        help="so many run each step that compiles kernels once, side by side, before anything is "
        "timed; what is timed then loads them from the caches of Triton and torch.compile; "
        f"default: on a GPU one for each core, {_MOST_WARM} at most, on a CPU 0: none",
    )
    parser.add_argument("--out", help="folder for table.md, results.json and the pictures")
    parser.add_argument("--list", action="store_true", help="list shapes and peers and stop")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"`threads` must be at least 1, got {options.threads}")
    if options.limit is None and options.device == "cuda":
        options.limit = GPU_LIMIT
    if options.warm is None:
        options.warm = min(_MOST_WARM, _num_cores()) if options.device == "cuda" else 0
    if options.warm < 0:
        raise UsageError(f"`warm` must not be negative, got {options.warm}")
    for name in ("budget", "train_step", "limit"):
        seconds = getattr(options, name)
        if seconds is not None and not 0 < seconds < math.inf:
            raise UsageError(f"`{name}` must be positive seconds, got {seconds}")
    _check_train_step(options)
    known = {peer.name for peer in PEERS}
    for name in options.peers or []:
        if name not in known:
            raise UsageError(f"`peers` must be of {', '.join(sorted(known))}, got {name!r}")
    for letter in options.sweep or []:
        if letter not in SWEEPS:
            raise UsageError(f"`sweep` must be of {', '.join(SWEEPS)}, got {letter!r}")


def _num_cores() -> int:
    """That this process may run on, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() or 1 if affinity is None else len(affinity(0))


def _check_train_step(options: argparse.Namespace) -> None:
    if options.train_step is None:
        return
    if options.device != "cpu":
        raise UsageError(f"`train_step` is timed on the CPU, got `device` {options.device}")
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("`train_step` needs transformers: pip install '.[train]' in the sources")


def where(options: argparse.Namespace) -> Where:
    if options.device not in ("cpu", "cuda"):
        raise UsageError(f"`device` must be cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device` is cuda, but torch sees no CUDA GPU")
    device = torch.device(options.device)
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    names = ("float32",) if device.type == "cpu" else ("float32", "bfloat16", "float16")
    if name not in names:
        raise UsageError(f"`dtype` must be of {', '.join(names)} on {device}, got {name}")
    return Where(device, getattr(torch, name), options.threads)


def folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`out` {text} can't be made: {error.strerror}") from None
    return path
