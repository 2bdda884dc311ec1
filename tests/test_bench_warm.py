"""What is timed is compiled before, side by side: what is planned, what runs at a time, and that a
process that dies or hangs costs its own step alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="codir-fast bench needs it")

from codir_fast.benchmarks import isolated, peers, warm
from codir_fast.benchmarks.options import Where
from codir_fast.benchmarks.shapes import SHAPES, SWEEPS, Shape, bank

from codir_fast.cli import main

GIB = 1 << 30
MOCO = next(shape for shape in SHAPES if shape.name == "moco")
OF_BANK = [peer for peer in peers.PEERS if peer.operator == "bank_contrast"]
OURS, EAGER, COMPILED = (
    next(p for p in OF_BANK if p.name == name) for name in ("codir_fast", "eager", "compile")
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def test_a_plan_has_each_step_that_compiles_once_the_largest_first():
    missing = replace(OURS, name="missing", packages=("no_such",))
    chosen = [OURS, EAGER, COMPILED, missing]
    named = [(shape, chosen) for shape in SHAPES if shape.operator == "bank_contrast"]
    sweep = [(replace(shape, name=f"K={shape.sizes['K']}"), chosen) for shape in SWEEPS["K"]]
    cases = warm.plan([*named, *sweep], torch.bfloat16, 200 * GIB)
    assert {case.peer.name for case in cases} == {"codir_fast", "compile"}
    assert len(cases) == 2 * (len(named) + len(sweep) - 1)  # K=65536 is moco
    assert sum(case.shape.sizes == MOCO.sizes for case in cases) == 2
    needs = [case.need for case in cases]
    assert needs == sorted(needs, reverse=True) and needs[-1] > 0
    assert str(cases[0]) == "compile at clip (bank_contrast)" and 48 < needs[0] / GIB < 49

    # Refused where it is timed, too: it would take more than half of the memory.
    small = [str(case) for case in warm.plan(named, torch.bfloat16, 80 * GIB)]
    assert str(cases[0]) not in small and len(small) == 2 * len(named) - 1


def test_pools_are_planned_too():
    timed = [(s, [p for p in peers.PEERS if p.operator == s.operator]) for s in SHAPES[-4:]]
    cases = warm.plan(timed, torch.bfloat16, 80 * GIB)
    assert {case.shape.name for case in cases} == {s.name for s in SHAPES[-4:]}
    assert cases[0].need == 2 * 2 * 12 * 32 * 128 * 768


@pytest.mark.parametrize(
    ("wanted", "steps", "memory", "processes"),
    [(16, 100, 80, 16), (16, 5, 80, 5), (16, 100, 24, 6), (4, 100, 2, 1), (16, 1, 80, 0)],
)
def test_processes_are_no_more_than_there_is_work_and_memory_for(wanted, steps, memory, processes):
    cases = [warm.Case(MOCO, OURS, 1)] * steps
    assert warm.num_processes(wanted, cases, memory * GIB) == processes


def test_what_runs_at_a_time_fits_and_what_is_larger_runs_alone():
    ten, six, five, two = (warm.Case(MOCO, OURS, need) for need in (10, 6, 5, 2))
    waiting = warm.Waiting([ten, six, five, two], memory=8)
    assert waiting.take() is ten
    blocked, taken = _take_later(waiting)
    assert blocked.is_alive() and not taken
    waiting.give_back(ten)
    blocked.join(5)
    assert taken == [six] and waiting.take() is two
    blocked, taken = _take_later(waiting)
    assert blocked.is_alive() and not taken
    waiting.give_back(six)
    blocked.join(5)
    assert taken == [five] and waiting.take() is None


def test_those_that_wait_end_when_it_stops():
    waiting = warm.Waiting([warm.Case(MOCO, OURS, need) for need in (5, 5)], memory=8)
    waiting.take()
    blocked, taken = _take_later(waiting)
    assert blocked.is_alive()
    waiting.stop()
    blocked.join(5)
    assert taken == [None]


def _take_later(waiting):
    taken = []
    thread = threading.Thread(target=lambda: taken.append(waiting.take()), daemon=True)
    thread.start()
    thread.join(0.2)
    return thread, taken


def _made(name, call):
    return peers.Peer(name, "bank_contrast", lambda inputs: lambda: call(inputs), "")


def _leave_a_mark(inputs):
    mark = Path(os.environ["CODIR_FAST_TEST_MARKS"], inputs.shape.name)
    mark.write_text(str(os.getpid()), encoding="utf-8")


def _fail(inputs):
    raise ValueError("no room")


MADE = (
    _made("killed", lambda inputs: os.kill(os.getpid(), signal.SIGKILL)),
    _made("hangs", lambda inputs: time.sleep(1000)),
    _made("fails", _fail),
    _made("marks", _leave_a_mark),
)


def serve(link, where):
    """With the peers above; `target` of the other processes."""
    isolated.PEERS = (*peers.PEERS, *MADE)
    warm.serve(link, where)


def test_a_process_that_dies_or_hangs_costs_its_step_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CODIR_FAST_TEST_MARKS", str(tmp_path))
    *bad, marks = MADE
    shapes = [bank(f"mark{n}", 2, 30 + n, 8) for n in range(4)]
    cases = [warm.Case(shapes[0], peer, 1 << 20) for peer in bad]
    cases += [warm.Case(shape, marks, 1 << 20) for shape in shapes]
    done = []
    refused = warm.warm(cases, Where(), 5, 2, GIB, done.append, serve)
    assert refused == {
        "killed at mark0 (bank_contrast)": "ended its process, exit code -9",
        "hangs at mark0 (bank_contrast)": "stopped after 5 s",
        "fails at mark0 (bank_contrast)": "failed: ValueError: no room",
    }
    pids = {(tmp_path / shape.name).read_text(encoding="utf-8") for shape in shapes}
    assert str(os.getpid()) not in pids and len(done) == len(cases)


def test_a_step_runs_forward_and_backward_and_its_inputs_are_given_back():
    shape, begun = Shape("tiny", "masked_pool_backward", {"L": 2, "B": 4, "T": 9, "H": 12}), []
    of_shape = [peer for peer in peers.PEERS if peer.operator == shape.operator]
    chosen = [peer for peer in of_shape if not peer.gpu_only]
    rows, ceilings = warm.run_once(shape, chosen, 0.0, begun.append, Where())
    assert begun == [row["peer"] for row in rows] == [peer.name for peer in chosen]
    assert not any("refused" in row for row in rows) and ceilings == {}


LOAD = """
from codir_fast.benchmarks.peers import PEERS, make_inputs
from codir_fast.benchmarks.shapes import bank
from torch._dynamo.utils import counters
peer = next(p for p in PEERS if p.name == "compile")
peer.prepare(make_inputs(bank("tiny", 2, 30, 8)))()
print(dict(counters["inductor"]))
"""


def test_another_process_loads_what_was_compiled(monkeypatch):
    # Plain code without prepared headers is what a C++ compiler is fastest with.
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    cases = [warm.Case(bank("tiny", 2, 30, 8), COMPILED, 1 << 20)]
    assert warm.warm(cases, Where(), 120, 1, GIB) == {}
    loaded = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert "'fxgraph_cache_hit': 2" in loaded.stdout, loaded.stderr[-2000:]
    assert "fxgraph_cache_miss" not in loaded.stdout


def test_triton_keeps_its_cache_where_it_is_before_torch_compile_moves_it(monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    usual = knobs.cache.dir
    warm.share_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == usual
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    warm.share_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_a_benchmark_compiles_its_shapes_and_its_sweeps_first(tmp_path, monkeypatch, capsys):
    points = [bank(f"K={K}", 2, K, 8) for K in (16, 64)]
    monkeypatch.setattr("codir_fast.benchmarks.run.SWEEPS", {"K": points})
    flags = ["--shape", "4,200,16", "--sweep", "K", "--peers", "codir_fast-normalize", "eager"]
    more = ["--warm", "2", "--budget", "0.01", "--out", str(tmp_path)]
    assert main(["bench", *flags, *more]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = results["compiled"]
    assert (found["steps"], found["processes"], found["refused"]) == (6, 2, {})
    assert found["seconds"] > 0 and len(results["shapes"]) == 3
    printed = capsys.readouterr()
    assert "| 64 | eager |" in printed.out and "compiling: 100%" in printed.err
