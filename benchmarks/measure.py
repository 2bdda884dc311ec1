"""Times of several functions in one interleaved run, beside the machine's ceilings in that run, and
the memory that they take."""

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from codir_fast import _C, __version__

_MIN_ROUNDS, _MAX_ROUNDS = 3, 200
_TURN = 0.02  # seconds that a function's turn in a round lasts at least
# Of the matrix product and the copy that are the ceilings, by type of device.
_SIDE = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
CPU = torch.device("cpu")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Times:
    """Seconds a call."""

    median: float
    lowest: float
    highest: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class Added:
    """What a function takes beyond another in the same rounds, as a share of the other's time: the
    median, its 95% interval by ranks (low, high), and the quartiles (lower, upper).
    """

    median: float
    low: float
    high: float
    lower: float
    upper: float

    @classmethod
    def over(cls, base: Sequence[float], seconds: Sequence[float]) -> "Added":
        shares = sorted(more / less - 1 for less, more in zip(base, seconds, strict=True))
        n = len(shares)
        rank = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
        lower, median, upper = statistics.quantiles(shares, n=4, method="inclusive")
        return cls(median, shares[rank], shares[n - 1 - rank], lower, upper)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], number: int = 1, device: torch.device = CPU) -> float:
    """A call takes, by so many in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(number):
        run()
    wait(device)
    return (time.perf_counter() - start) / number


def interleaved(
    runs: Sequence[Callable[[], Any]],
    budget: float,
    device: torch.device = CPU,
    begin: Callable[[int], None] = lambda n: None,
) -> list[Times]:
    """Times of each function in `rounds`."""
    return [Times.of(taken) for taken in rounds(runs, budget, device, begin)]


def rounds(
    runs: Sequence[Callable[[], Any]],
    budget: float,
    device: torch.device = CPU,
    begin: Callable[[int], None] = lambda n: None,
) -> list[list[float]]:
    """Seconds a call of each function in each round: each once a round (a short one several times
    in a row), after a round that does not count, until the budget (seconds) is spent: what slows
    the machine down meanwhile hits all alike. The order changes from round to round, since each
    finds the caches as the one before left them. `begin` is told which function's turn it is.
    """
    numbers = []
    for n, run in enumerate(runs):
        begin(n)
        run()
        numbers.append(max(1, round(_TURN / max(seconds(run, 1, device), 1e-6))))
    taken: list[list[float]] = [[] for _ in runs]
    order, shuffle = list(range(len(runs))), random.Random(0).shuffle
    end = time.perf_counter() + budget
    done = 0
    while done < _MIN_ROUNDS or (time.perf_counter() < end and done < _MAX_ROUNDS):
        shuffle(order)
        for n in order:
            begin(n)
            taken[n].append(seconds(runs[n], numbers[n], device))
        done += 1
    return taken


def fastest(runs: Sequence[Callable[[], Any]], device: torch.device = CPU) -> int:
    """Position of the function whose best of three calls is the shortest."""
    for run in runs:
        run()
    best = [min(seconds(run, 1, device) for _ in range(3)) for run in runs]
    return best.index(min(best))


def ceilings(
    device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> tuple[list[Callable[[], Any]], Callable[[Sequence[Times]], dict[str, float]]]:
    """Functions to time beside the others, and what their times say: FLOP/s of a product of
    matrices of random numbers, 2048 x 2048 (8192 x 8192 on a GPU), bytes/s (read and written) of a
    copy of 256 MiB (1 GiB).
    """
    side, num_bytes = _SIDE[device.type], _COPY_BYTES[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    source, target = (torch.zeros(num_bytes // 4, device=device) for _ in range(2))

    def read(times: Sequence[Times]) -> dict[str, float]:
        product, copy = times
        return {
            "product_flops": 2 * side**3 / product.median,
            "copy_bytes_per_second": 2 * num_bytes / copy.median,
        }

    return [lambda: torch.mm(a, b, out=out), lambda: target.copy_(source)], read


def peak_memory(run: Callable[[], Any], calls: int = 3, device: torch.device = CPU) -> int | None:
    """Bytes that a call needs beyond what is held before it, after one that has warmed up; None
    where the system does not tell (it does on Linux, and for a GPU). The least of some calls.
    """
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - start
    if not _CLEAR.exists() or not os.access(_CLEAR, os.W_OK):
        return None
    return min(_peak_above(run) for _ in range(calls))


def _peak_above(run: Callable[[], Any]) -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what glibc keeps of earlier calls would not be seen to be taken again
        trim(0)
    _CLEAR.write_text("5")  # the peak starts over at what is held now
    start = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return max(peak - start, 0)


def _status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def available_memory(device: torch.device = CPU) -> int:
    """Bytes that this machine, or its GPU, can still give."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of earlier peers is free for the next
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def stamp(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the figures belong to."""
    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }
    return gpu | {
        "dtype": str(dtype).removeprefix("torch."),
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.cpu_isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "codir_fast": __version__,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    name = named.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in named:  # virtual machines often hide the name
        name += f" (family {named['cpu family']}, model {named['model']})"
    return name


def _commit() -> str | None:
    """Of the checkout that this file is in, or that `make bench-gpu` built it from, if known."""
    here = Path(__file__).resolve().parent
    if (here.parent / ".git").exists():
        return _output("git", "-C", str(here), "describe", "--always", "--dirty")
    noted = here / "commit"
    return noted.read_text().strip() or None if noted.is_file() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
