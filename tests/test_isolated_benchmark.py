"""Peers in a process of their own: one that hangs, crashes or fails late costs only its own row."""

import os
import time

import pytest
import torch

pytest.importorskip("tqdm", reason="codir-fast bench needs it")

from codir_fast.benchmarks import isolated, peers
from codir_fast.benchmarks.isolated import Isolated
from codir_fast.benchmarks.options import Where
from codir_fast.benchmarks.shapes import Shape

TINY = Shape("tiny", "bank_contrast", {"B": 5, "K": 300, "D": 24})
OTHER = Shape("other", "bank_contrast", {"B": 3, "K": 200, "D": 16})
OURS, EAGER = (
    next(p for p in peers.PEERS if p.operator == "bank_contrast" and p.name == name)
    for name in ("codir_fast", "eager")
)
ALONE = 4  # calls of a peer before it takes turns with the others: one is checked, three measured


def bad(name, what, good_calls=0):
    """A peer that is right for some calls, then does `what`."""

    def prepare(inputs):
        run, calls = OURS.prepare(inputs), []

        def call():
            calls.append(1)
            if len(calls) > good_calls:
                what()
            return run()

        return call

    return peers.Peer(name, "bank_contrast", prepare, "")


def fail():
    raise ValueError("no room")


BAD = (
    bad("crashes", lambda: os._exit(7)),
    bad("fails", fail),
    bad("hangs-in-its-turn", lambda: time.sleep(1000), ALONE + 2),
    bad("fails-in-its-turn", fail, ALONE + 2),
)


def check_threads():
    assert torch.get_num_threads() == 1


ONE_THREAD = bad("one-thread", check_threads)


def serve(link, where):
    """With the peers above; `target` of the other process."""
    isolated.PEERS = (*peers.PEERS, *BAD, ONE_THREAD)
    isolated.serve(link, where)


@pytest.fixture
def isolation():
    made = Isolated(Where(), 15, serve)
    yield made
    made.close()


def test_a_bad_peer_costs_its_own_row_alone(isolation):
    begun = []
    rows, ceilings = isolation.measure_shape(TINY, [OURS, *BAD, EAGER], 0.01, begun.append)
    found = {row["peer"]: row.get("refused", "timed") for row in rows}
    assert list(found.items()) == [
        ("codir_fast", "timed"),
        ("crashes", "ended its process, exit code 7"),
        ("fails", "failed: ValueError: no room"),
        ("hangs-in-its-turn", "stopped after 15 s"),
        ("fails-in-its-turn", "failed: ValueError: no room"),
        ("eager", "timed"),
    ]
    assert rows[0]["ratio"] == 1 and rows[5]["ratio"] > 0 and ceilings["product_flops"] > 0
    assert begun[0] == "codir_fast" and begun.count("crashes") == 1

    isolation._stops["eager"] = 2
    rows, _ = isolation.measure_shape(OTHER, [OURS, EAGER], 0.01)
    assert rows[0]["median"] > 0
    assert rows[1]["refused"] == "not tried: stopped 2 times before"


def test_threads_are_those_that_are_asked_for():
    isolation = Isolated(Where(threads=1), 15, serve)
    try:
        rows, _ = isolation.measure_shape(TINY, [ONE_THREAD], 0.01)
    finally:
        isolation.close()
    assert rows[0].get("refused") is None


def test_a_process_that_cannot_be_started_is_told(isolation, monkeypatch):
    """As where a system has as many as it takes; the next shape tries again."""
    from multiprocessing import popen_spawn_posix

    def no_room(*_):
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(popen_spawn_posix.Popen, "__init__", no_room)
        (row,), _ = isolation.measure_shape(TINY, [EAGER], 0.01)
    assert row["refused"].startswith("no process could be started: [Errno 11]")
    (row,), _ = isolation.measure_shape(TINY, [EAGER], 0.01)
    assert row["median"] > 0
