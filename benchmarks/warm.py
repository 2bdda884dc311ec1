"""What is timed, compiled before by several processes side by side: each step runs once and leaves
what it compiled in the caches on disk of Triton and torch.compile, where the process that measures
finds it. Nothing is timed here, and what fails is no error: measuring it says so.
"""

import gc
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from codir_fast.benchmarks import isolated, measure
from codir_fast.benchmarks.comparison import Begin, Rows, empty_row, failure
from codir_fast.benchmarks.isolated import Isolated, Serve
from codir_fast.benchmarks.options import Where
from codir_fast.benchmarks.peers import Peer, make_inputs
from codir_fast.benchmarks.shapes import Shape

_PROCESS = 1 << 30  # bytes that a process takes before its first step: on a GPU, a CUDA context


@dataclass(frozen=True)
class Case:
    """A peer's step at a shape; `need` is about what it takes, in bytes of the device's memory."""

    shape: Shape
    peer: Peer
    need: int

    def __str__(self) -> str:
        return f"{self.peer.name} at {self.shape.name} ({self.shape.operator})"


def plan(
    timed: Iterable[tuple[Shape, Sequence[Peer]]], dtype: torch.dtype, memory: int
) -> list[Case]:
    """What is worth it, of shapes and peers that are timed with so many bytes of memory: each step
    once that compiles anything and is not refused; the largest first, since they wait for room.
    """
    cases: dict[tuple[object, ...], Case] = {}
    for shape, peers in timed:
        # The inputs, as much again in a bank of the peer's own, and what it holds.
        inputs = 2 * shape.num_elements * dtype.itemsize
        for peer in peers:
            if peer.compiles and peer.refusal(shape, memory) is None:
                key = (shape.operator, *shape.sizes.values(), peer.name)
                cases.setdefault(key, Case(shape, peer, inputs + peer.needs(shape)))
    return sorted(cases.values(), key=lambda case: -case.need)


def memory_of(device: torch.device) -> int:
    """Bytes for all processes. Of a GPU the whole: to ask for what is free would start CUDA in this
    process, which would hold some for as long as another one measures.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return measure.available_memory(device)


def num_processes(wanted: int, cases: Sequence[Case], memory: int) -> int:
    """No more than there is work for, nor than take a quarter of the memory by themselves. One
    step alone is compiled as fast where it is timed.
    """
    return min(wanted, len(cases), max(1, memory // (4 * _PROCESS))) if len(cases) > 1 else 0


class Waiting:
    """Cases for several threads. Those that are taken at a time need no more than `memory` bytes;
    one that needs more than that is taken alone.
    """

    def __init__(self, cases: Sequence[Case], memory: int) -> None:
        self._cases, self._memory, self._in_use = list(cases), memory, 0
        self._changed = threading.Condition()

    def take(self) -> Case | None:
        """The first for which there is room, as soon as there is; None when no more are left."""
        with self._changed:
            while self._cases:
                for case in self._cases:
                    if not self._in_use or self._in_use + case.need <= self._memory:
                        self._cases.remove(case)
                        self._in_use += case.need
                        return case
                self._changed.wait()
            return None

    def give_back(self, case: Case) -> None:
        """Its memory."""
        with self._changed:
            self._in_use -= case.need
            self._changed.notify_all()

    def stop(self) -> None:
        """No more are left."""
        with self._changed:
            self._cases.clear()
            self._changed.notify_all()


def run_once(
    shape: Shape, peers: Sequence[Peer], budget: float, begin: Begin, where: Where
) -> tuple[Rows, dict[str, float]]:
    """As comparison.measure_shape, but each peer's step runs once, and nothing is measured."""
    rows: Rows = []
    for peer in peers:
        begin(peer.name)
        row = empty_row(shape, peer)
        try:
            inputs = make_inputs(shape, where.device, where.dtype)
            with torch.device(where.device):
                run = peer.prepare(inputs)
            run()
            measure.wait(where.device)
        except Exception as error:
            row |= failure(error)
        rows.append(row)
        inputs = run = None
        gc.collect()
        measure.wait(where.device)  # raises, and ends the process, where the GPU takes no more work
        if where.device.type == "cuda":
            torch.cuda.empty_cache()  # other processes want what PyTorch keeps for later
    return rows, {}


def serve(link: Connection, where: Where) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are enough processes
    from torch._inductor import config

    # Forms of its kernels that are timed while others use the GPU say nothing: where they are
    # measured, they are timed again. (Triton's own tuning keeps nothing on disk.)
    config.autotune_local_cache = False
    isolated.serve(link, where, run_once)


def share_triton_cache() -> None:
    """torch.compile's first kernel moves the cache of Triton for the rest of its process, unless it
    is named: then what one process compiled would be looked for elsewhere by another.
    """
    try:
        from triton import knobs
    except ImportError:  # nothing is compiled by it
        return
    os.environ.setdefault("TRITON_CACHE_DIR", str(knobs.cache.dir))


def warm(
    cases: Sequence[Case],
    where: Where,
    limit: float,
    processes: int,
    memory: int,
    done: Callable[[Case], None] = lambda case: None,
    serve: Serve = serve,
) -> dict[str, str]:
    """Runs each case in one of so many processes; those that run at a time need no more than half
    of the memory. A process that hangs (`limit` seconds for a case) or dies costs its case alone.

    Returns:
        Why a case did not run to its end, for each that did not.
    """
    share_triton_cache()
    waiting, telling = Waiting(cases, memory // 2), threading.Lock()
    refused: dict[str, str] = {}

    def work() -> None:
        worker = Isolated(where, limit, serve)
        try:
            while (case := waiting.take()) is not None:
                (row,), _ = worker.measure_shape(case.shape, [case.peer], 0.0)
                waiting.give_back(case)
                with telling:
                    if "refused" in row:
                        refused[str(case)] = row["refused"]
                    done(case)
        finally:
            worker.close()

    with ThreadPoolExecutor(processes) as threads:  # which wait for the processes
        try:
            for each in as_completed([threads.submit(work) for _ in range(processes)]):
                each.result()
        finally:
            waiting.stop()
    return refused
