"""python -m codir_fast.benchmarks.backends: its grid, what it refuses, what it says of times; the
whole of it but the graphs on the CPU.
"""

import itertools
import json
import math
import os
import random
import sys

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks need it")

from codir_fast.benchmarks import backends
from codir_fast.benchmarks.backends import DTYPES, FORMS, RESULTS, WIDTHS, Case
from codir_fast.benchmarks.measure import CPU

NAMES = ("cpu", "torch")
TINY = [Case(dtype, 24, 5, 300, form) for dtype in DTYPES for form in FORMS]


def row(ratio=None, *, D=128, B=32, dtype="bfloat16", form="plain"):
    made = {"dtype": dtype, "D": D, "B": B, "K": 1024, "form": form, "backends": ["cuda", "triton"]}
    if ratio is None:
        return made | {"errors": {}, "refused": "cuda failed: ValueError: no room"}
    found = {"cuda": dict.fromkeys(RESULTS, 1e-3), "triton": dict.fromkeys(RESULTS, 2e-3)}
    times = {"cuda": {"median": 1e-4}, "triton": {"median": ratio * 1e-4}}
    return made | {"errors": found, "times": times, "ratio": ratio}


def last_cells(table):
    return [line.split(" | ")[-1].removesuffix(" |") for line in table.splitlines()[2:]]


def test_the_grid_has_each_dtype_width_and_form():
    cases = backends.grid()
    assert 100 <= len(cases) <= 150 and len(set(cases)) == len(cases)
    every = set(itertools.product(DTYPES, (*WIDTHS, backends.ODD_D), FORMS))
    assert {(case.dtype, case.D, case.form) for case in cases} == every
    queries = set(backends.FEW + backends.MANY)
    for form in FORMS:
        assert {case.B for case in cases if case.form == form} == queries
    for dtype, D in itertools.product(DTYPES, WIDTHS):
        own = [case for case in cases if (case.dtype, case.D) == (dtype, D)]
        assert {case.B for case in own if case.form == "plain"} == queries
        for form in FORMS:
            sizes = {case.B for case in own if case.form == form}
            assert sizes & set(backends.FEW) and sizes & set(backends.MANY)
    for case in cases:
        gflop = 4e-9 * case.B * case.K * case.D
        assert case.K % 256 == 0 and 1 << 14 <= case.K <= 1 << 20
        assert 20 <= gflop <= 70 or case.K in ((1 << 20,) if gflop < 20 else (1 << 14,))
    assert set(FORMS) == {case.form for case in cases[::5]}


@pytest.mark.parametrize(
    ("ratios", "taken"),
    [
        ({32: 1.2, 64: 1.0, 256: 3.0}, "cuda"),
        ({32: 0.981, 256: 1.0}, "cuda"),  # a tie
        ({32: 0.979, 256: 0.5}, "triton"),
        ({32: 0.9, 64: 1.1, 256: 1.2}, "cuda at B = 64, 256; triton at B = 32"),
        ({32: None, 64: 1.1}, "cuda at B = 64; failed at B = 32"),
        ({32: None, 64: None}, "failed"),
        ({32: math.nan}, "triton"),
    ],
)
def test_what_to_take(ratios, taken):
    rows = [row(ratio, B=B) for B, ratio in ratios.items()]
    assert last_cells(backends.summary(rows)) == [taken]


def test_a_width_between_counts_with_the_one_it_is_padded_to():
    rows = [row(1.5, D=128), row(0.5, D=104, B=256)]
    assert last_cells(backends.summary(rows)) == ["cuda at B = 32; triton at B = 256 (D=104)"]
    assert "| bfloat16 | 128 | plain | 0.50 | 1.00 |" in backends.summary(rows)


def test_a_summary_has_each_group_once_whatever_the_rows():
    draw = random.Random(0)
    rows = []
    for _ in range(300):
        place = {"D": draw.choice(WIDTHS), "B": draw.choice(backends.MANY)}
        place |= {"dtype": draw.choice(["bfloat16", "float16"]), "form": draw.choice(FORMS)}
        rows.append(row(draw.choice([None, draw.uniform(0.3, 3)]), **place))
    groups = {(row["dtype"], row["D"], row["form"]) for row in rows}
    assert len(last_cells(backends.summary(rows))) == len(groups)
    lines = backends.as_table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {11}


def test_a_line_has_times_ratio_and_errors_or_the_reason():
    lines = backends.as_table([row(1.25, B=1024), row()]).splitlines()
    assert lines[2] == (
        "| bfloat16 | plain | 128 | 1,024 | 1,024 | 100.0 | 125.0 | 1.25 | 1.0e-03 | 2.0e-03 |"
    )
    assert "| cuda failed: ValueError: no room |  |  |  |  |" in lines[3]


def test_two_backends_of_the_cpu_from_inputs_to_files(tmp_path):
    known = {TINY[1]: {"refused": "compiling triton failed: OSError: disk"}}
    rows = backends.measure_cases(TINY, known, 0.01, CPU, tmp_path, NAMES)
    assert rows[1]["refused"] == known[TINY[1]]["refused"]
    for case, found in zip(TINY, rows, strict=True):
        if case not in known:
            assert found["ratio"] > 0 and set(found["times"]) == set(NAMES), found
            for name in NAMES:
                assert set(found["errors"][name]) == set(RESULTS)
                assert max(found["errors"][name].values()) < 2e-3, found
                assert found["times"][name]["rounds"] >= 3
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["rows"] == rows and results["machine"]["dtype"] == "bfloat16, float16"
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert backends.as_table(rows) in table and table.strip().endswith(backends.summary(rows))


@pytest.mark.parametrize(
    ("part", "spoil"),
    [(part, 1.1) for part in range(5) if part != 1] + [(0, math.nan), (2, math.nan)],
)
def test_a_wrong_result_is_refused_and_not_timed(monkeypatch, part, spoil):
    make_call = backends.make_call

    def spoilt(name, given):
        call = make_call(name, given)

        def run():
            outputs = list(call())
            factor = torch.ones(len(outputs[part]))
            factor[7 if math.isnan(spoil) else slice(None)] = spoil  # of 200, 7 isn't compared
            outputs[part] = torch.einsum("b...,b->b...", outputs[part], factor)
            return outputs

        return run if name == "torch" else call

    monkeypatch.setattr(backends, "make_call", spoilt)
    case = Case(torch.bfloat16, 16, 200, 300, "plain")
    found = backends.measure_case(case, 0.01, CPU, NAMES)
    name = [name for n, name in enumerate(("loss", "lse", *RESULTS[1:])) if n == part][0]
    assert found["refused"].startswith(f"torch wrong: {name} ") and "times" not in found
    assert last_cells(backends.summary([found])) == ["failed"]


def test_a_backend_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    make_call = backends.make_call

    def broken(name, given):
        if name == "torch" and given["normalize"]:
            raise ValueError("no | room")
        return make_call(name, given)

    monkeypatch.setattr(backends, "make_call", broken)
    rows = backends.measure_cases(TINY[3:6], {}, 0.01, CPU, tmp_path, NAMES)
    assert [found.get("refused") for found in rows] == [
        None,
        "torch failed: ValueError: no / room",
        None,
    ]
    assert "in broken" in rows[1]["traceback"]


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def work(case):
    """In another process; B says what happens."""
    if case.B < 2:
        raise Unsendable("no", "room")
    if case.B == 2:
        os._exit(7)


def test_what_fails_beforehand_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    places = (("plain", 3), ("plain", 0), ("plain", 1), ("labels", 4), ("labels", 2), ("labels", 5))
    cases = [Case(torch.float16, 64, B, 256, form) for form, B in places]
    failed = {case.B: row["refused"] for case, row in backends.compile_first(cases, work).items()}
    # What fails after another in its process is tried once more, in its turn.
    assert failed.keys() == {0, 2}
    assert failed[0] == "compiling triton failed: Unsendable: no room"
    assert failed[2].startswith("compiling triton failed: BrokenProcessPool: ")


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["backends", *map(str, flags)])
    return backends.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--out", tmp_path / "made") == 2
    said = capsys.readouterr()
    assert said.err == (
        "codir-fast: error: backends of bank_contrast are compared on a GPU: "
        "torch sees no CUDA GPU\n"
    )
    assert not said.out and not (tmp_path / "made").exists()


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
def test_a_budget_of_no_sense_is_refused(monkeypatch, tmp_path, capsys, budget):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", tmp_path, "--budget", budget)
    assert "--budget must be positive seconds, got " in capsys.readouterr().err
