"""Processes of one gloo group that stay for all tests and run the functions that they are named."""

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = (2, 3, 4)  # of the groups: the first so many processes
# Once, for all processes to inherit; DistributedDataParallel too asks for the compiler.
PRELOADED = ["codir_fast", "torch._dynamo", "pytest"]
TIMEOUT = 60.0  # seconds for a function; processes that hang are ended


class Pool:
    """Four processes, started once: torch takes seconds to import."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._processes, self._pipes = [], []
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            arguments = (rank, str(directory / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            assert pipe.poll(TIMEOUT) and pipe.recv() == "ready"

    def run(self, function: Callable[..., Any], ranks: int, **options: Any) -> list[Any]:
        """What `function(group, **options)` returns on each of so many ranks.

        Raises:
            AssertionError: it raised on a rank, or hung; the pool is closed then.
        """
        waiting = dict(zip(self._pipes[:ranks], range(ranks), strict=True))
        for pipe in waiting:
            pipe.send((function, ranks, options))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + TIMEOUT
        while waiting and time.monotonic() < deadline:
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=0.5):
                rank = waiting.pop(pipe)
                error, answers[rank] = _receive(pipe)
                if error:
                    failures.append(f"rank {rank}: {error}")
                    deadline = min(deadline, time.monotonic() + 3)  # others may wait for it
        if waiting:
            failures.append(f"ranks {list(waiting.values())} hung")
        if waiting or not self.is_open:
            self.close()
        assert not failures, "\n".join(failures)
        return [answers[rank] for rank in range(ranks)]

    @property
    def is_open(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _receive(pipe: Any) -> tuple[str | None, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "its process has ended", None


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, max(SIZES)),
        rank=rank,
        world_size=max(SIZES),
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    pipe.send("ready")
    while True:
        try:
            function, ranks, options = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = (None, function(groups[ranks], **options))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
