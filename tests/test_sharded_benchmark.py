"""python -m codir_fast.benchmarks.sharded: what it writes, and what a step sends."""

import json
import sys

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks need it")

from codir_fast.benchmarks import sharded

B, D, ROWS, RANKS = 8, 12, (64, 130), 2


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sharded", *map(str, flags)])
    sharded.main()


def test_bytes_are_those_of_the_cost_model_whatever_the_rows(monkeypatch, tmp_path, capsys):
    sizes = ("--queries", B, "--dim", D, "--rounds", 2)
    run(monkeypatch, "--ranks", RANKS, "--rows", *ROWS, *sizes, "--out", tmp_path)
    rows = json.loads((tmp_path / "sharded.json").read_text())["rows"]
    assert [(row["R"], row["K"]) for row in rows] == [(RANKS, K) for K in ROWS]
    others = (RANKS - 1) / RANKS
    sent = others * B * (2 * D * 4 + 4 * (D + 2)) + 32 * (RANKS - 1)  # docs/scaling.md
    for row in rows:
        assert row["step_sent"] == sent
        assert 0 < row["enqueue_sent"] <= B / RANKS * (D * 4 + 8) + 40 * (RANKS - 1)
        assert min(row[name] for name in ("step", "scan", "rest", "enqueue")) > 0
    table = (tmp_path / "sharded.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert table.count("\n") == 2 + len(ROWS)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--ranks", 0), "--ranks must be at least 1, got [0]"),
        (("--ranks", 3, "--queries", 4), "--queries must be divisible by [3], got 4"),
    ],
)
def test_sizes_of_no_sense_are_refused(monkeypatch, capsys, flags, told):
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags)
    assert told in capsys.readouterr().err
