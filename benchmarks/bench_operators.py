"""Every operator beside its peers, by shape: `pytest benchmarks/bench_operators.py -k moco`.

`codir-fast bench` times the same in interleaved rounds; pytest-benchmark compares with earlier runs
(--benchmark-autosave, --benchmark-compare). What is timed is compared with float64 first.
"""

import pytest
from codir_fast.benchmarks import measure
from codir_fast.benchmarks.comparison import check
from codir_fast.benchmarks.peers import PEERS, make_inputs
from codir_fast.benchmarks.shapes import SHAPES

CASES = [(shape, peer) for shape in SHAPES for peer in PEERS if peer.operator == shape.operator]


@pytest.mark.parametrize(
    ("shape", "peer"), CASES, ids=[f"{shape.name}-{peer.name}" for shape, peer in CASES]
)
def test_operator(benchmark, shape, peer):
    if refused := peer.refusal(shape, measure.available_memory()):
        pytest.skip(f"{peer.name} {refused}")
    inputs = make_inputs(shape)
    run = peer.prepare(inputs)
    if not peer.is_floor:
        check(peer, run, inputs)
    benchmark.group = str(shape)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
