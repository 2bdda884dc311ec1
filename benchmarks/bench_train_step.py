"""A training step without and with CoDIR's term: `pytest benchmarks/bench_train_step.py`.

`codir-fast bench --train_step SECONDS` times the same steps in interleaved rounds and says what the
term adds; pytest-benchmark compares with earlier runs.
"""

import pytest
from codir_fast.benchmarks.train_step import ARMS


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_train_step(benchmark, arm):
    benchmark.group = "training step"
    benchmark.pedantic(arm.make_step(), rounds=10, warmup_rounds=2)
