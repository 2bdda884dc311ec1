"""Runs of a study in processes of their own, several at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from typing import TypeVar

import torch

from codir_fast.errors import LostProcess

T = TypeVar("T")
Running = dict[Future[T], tuple[str, ProcessPoolExecutor]]


def in_processes(calls: Sequence[tuple[str, Callable[[], T]]], jobs: int) -> Iterator[T]:
    """What calls give, as they are done, `jobs` at a time, which share the cores. Once one has
    failed no other is started, and those beside it are finished.

    Args:
        calls: what a line about its failure begins with, and the call, which can be pickled.

    Raises:
        LostProcess: a process has ended before its call was done; otherwise what a call raises.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawned: a fork after torch has started its threads may hang.
    context = get_context("spawn")
    waiting, failure = iter(calls), None
    running: Running[T] = {}
    with ExitStack() as stack:
        # A pool for each process: if one of a pool dies, the others are ended, and none is named.
        free = [
            stack.enter_context(ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)))
            for _ in range(min(jobs, len(calls)))
        ]
        while free or running:
            for pool, (name, call) in zip(free, waiting, strict=False):
                running[pool.submit(call)] = name, pool
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            free = []
            for future in done:
                name, pool = running.pop(future)
                error = _error_of(future, name)
                if error is None:
                    yield future.result()
                failure = failure or error
                free.append(pool)
            if failure is not None:
                free = []
    if failure is not None:
        raise failure


def _error_of(future: Future[T], name: str) -> BaseException | None:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return LostProcess(
            f"{name}: its process ended before the run was done, as one does that is killed where "
            "memory runs out; runs that are done are kept, the next call goes on"
        )
    return error
