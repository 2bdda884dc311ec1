"""Runs of codir-fast on several processes, forked from one that has everything imported."""

import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from codir_fast.cli import main

SECONDS = 120  # for a run; what hangs is ended


class Ranks:
    """Starts runs; each writes what it prints into a file of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "codir_fast.distillation.distill",
                "codir_fast.distillation.pretrain",
                "torch._dynamo",
                "transformers.models.bert.modeling_bert",
            ]
        )

    def run(self, arguments: list[str], ranks: int, ended: tuple[int, int, str] | None = None):
        """Exit code and output of each rank.

        Args:
            ended: a rank, the signal that it gives itself, and the name of the file whose
                appearance tells it when. It is killed once the others have ended.
        """
        self.count += 1
        port = free_port()
        reports = [self.path / f"output-{self.count}-{rank}" for rank in range(ranks)]
        processes = []
        for rank, report in enumerate(reports):
            moment = ended[1:] if ended and ended[0] == rank else None
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
            environment = environment if ranks > 1 else {}
            target = (environment, [str(text) for text in arguments], str(report), moment)
            processes.append(self.context.Process(target=_run, args=target))
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        for rank, process in enumerate(processes):
            if not ended or rank != ended[0]:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        return [(p.exitcode, r.read_text()) for p, r in zip(processes, reports, strict=True)]

    def run_well(self, arguments: list[str], ranks: int) -> list[str]:
        """The outputs of a run that must end well on all ranks."""
        results = self.run(arguments, ranks)
        assert all(code == 0 for code, _ in results), "\n".join(text for _, text in results)
        return [text for _, text in results]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _run(
    environment: dict[str, str], arguments: list[str], report: str, moment: tuple[int, str] | None
):
    os.environ.update(environment, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    with open(report, "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        if moment:
            threading.Thread(target=_end_at, args=moment, daemon=True).start()
        try:
            code = main(arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
    os._exit(code)


def _end_at(with_signal: int, moment: str) -> None:
    while not os.path.exists(moment):
        time.sleep(0.001)
    time.sleep(0.1)  # in the middle of some step
    os.kill(os.getpid(), with_signal)
