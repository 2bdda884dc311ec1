"""Peers in a process of their own, since a kernel may hang or leave its GPU unusable: the peer that
was up is then listed with what happened, and a new process measures the others.
"""

import faulthandler
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from codir_fast.benchmarks import report
from codir_fast.benchmarks.comparison import Begin, Rows, empty_row, failure, measure_shape
from codir_fast.benchmarks.options import Where
from codir_fast.benchmarks.peers import PEERS, Peer
from codir_fast.benchmarks.shapes import Shape

_START = 120.0  # seconds that a process may take until its first peer is up
_END = 5.0  # seconds that a process without work may take to end by itself
_MOST_STOPS = 2  # of one peer, after which it is not tried at other shapes
Measure = Callable[[Shape, Sequence[Peer], float, Begin, Where], tuple[Rows, dict[str, float]]]


def serve(link: Connection, where: Where, measure: Measure = measure_shape) -> None:
    """Measures what it is sent, until nothing comes or something harms the process."""
    faulthandler.enable()
    if where.threads is not None:
        torch.set_num_threads(where.threads)
    while True:
        try:
            shape, names, budget = link.recv()
        except EOFError:
            return
        peers = [p for p in PEERS if p.operator == shape.operator and p.name in names]
        try:
            found = measure(shape, peers, budget, lambda name: link.send(("begin", name)), where)
        except Exception as error:
            link.send(("failed", failure(error)))
            return
        link.send(("done", found))


Serve = Callable[[Connection, Where], None]


class Isolated:
    """`measure_shape` in another process, with `limit` seconds for each thing that a peer does."""

    def __init__(self, where: Where, limit: float, serve: Serve = serve) -> None:
        self._where, self._limit, self._serve = where, limit, serve
        self._process: Any = None
        self._stops: dict[str, int] = {}

    def measure_shape(
        self, shape: Shape, peers: Sequence[Peer], budget: float, begin: Begin = lambda name: None
    ) -> tuple[Rows, dict[str, float]]:
        """As comparison.measure_shape; a peer that stopped the process has why in its row."""
        lost: dict[str, report.Row] = {
            peer.name: {"refused": f"not tried: stopped {self._stops[peer.name]} times before"}
            for peer in peers
            if self._stops.get(peer.name, 0) >= _MOST_STOPS
        }
        rows: dict[str, report.Row] = {}
        ceilings: dict[str, float] = {}
        while len(lost) < len(peers) and not rows:
            names = [peer.name for peer in peers if peer.name not in lost]
            up, answer = self._ask(shape, names, budget, begin)
            if isinstance(answer, tuple):
                rows, ceilings = {row["peer"]: row for row in answer[0]}, answer[1]
            elif up in names:
                self._stops[up] = self._stops.get(up, 0) + 1
                lost[up] = answer
            else:  # none of them is to blame
                lost |= dict.fromkeys(names, answer)
        return [rows.get(p.name) or empty_row(shape, p) | lost[p.name] for p in peers], ceilings

    def close(self, patience: float = _END) -> None:
        """Ends the process, whatever it is at, after so many seconds for an end of its own."""
        if self._process is not None:
            self._link.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join()
            self._process = None

    def _ask(
        self, shape: Shape, names: list[str], budget: float, begin: Begin
    ) -> tuple[str, tuple[Rows, dict[str, float]] | report.Row]:
        """What came of it: rows and ceilings, or the reason why there are none; and who was up."""
        up = ""
        try:
            if self._process is None:
                self._start()
            self._link.send((shape, names, budget))
            while True:
                if not self._link.poll(self._limit if up else _START):
                    raise TimeoutError
                kind, value = self._link.recv()
                if kind == "done":
                    return up, value
                if kind == "failed":
                    self.close()
                    return up, value
                up = value
                begin(up)
        except TimeoutError:
            self.close(0)
            return up, {"refused": f"stopped after {self._limit if up else _START:.0f} s"}
        except (EOFError, OSError) as error:
            if self._process is None:
                return up, {"refused": f"no process could be started: {error}"}
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            return up, {"refused": f"ended its process, exit code {code}"}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        process = context.Process(target=self._serve, args=(theirs, self._where))
        try:
            process.start()
        except OSError:  # the system has no room for one more
            self._link.close()
            raise
        finally:
            theirs.close()
        self._process = process
