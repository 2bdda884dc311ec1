"""codir-fast bench: from flags to table, JSON and pictures; nothing is timed that is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="pictures need it")

from codir_fast.benchmarks import comparison, measure, peers
from codir_fast.benchmarks.comparison import check, measure_shape
from codir_fast.benchmarks.shapes import OPERATORS, SHAPES, Shape, find_shape

from codir_fast.cli import main
from codir_fast.errors import UsageError

TINY = Shape("tiny", "bank_contrast", {"B": 5, "K": 300, "D": 24})
TINY_BY_INDEX = Shape("tiny", "indexed_contrast", {"B": 3, "M": 40, "K": 70, "D": 8})
TINY_POOL = {"L": 2, "B": 4, "T": 9, "H": 12}


def chosen(operator, *, compiled=False):
    slow = {"compile", "cut_cross_entropy"}
    of_operator = [p for p in peers.PEERS if p.operator == operator and not p.gpu_only]
    return [peer for peer in of_operator if compiled or peer.name not in slow]


@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        TINY_BY_INDEX,
        Shape("tiny", "in_batch_contrast", {"B": 7, "D": 24}),
        Shape("tiny", "masked_pool", TINY_POOL),
        Shape("tiny", "masked_pool_backward", TINY_POOL),
    ],
    ids=lambda shape: shape.operator,
)
def test_every_peer_is_right(shape):
    inputs = peers.make_inputs(shape)
    for peer in chosen(shape.operator):
        if peer.refusal(shape, 1 << 40) is None and not peer.is_floor:
            assert check(peer, peer.prepare(inputs), inputs) < 1e-5, peer.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_ours_is_the_first_peer_and_no_name_stands_twice(operator):
    names = [peer.name for peer in peers.PEERS if peer.operator == operator]
    assert names[0] == "codir_fast" and len(set(names)) == len(names) > 2


@pytest.mark.parametrize("part", [0, 1], ids=["loss", "gradient"])
def test_a_wrong_peer_is_not_timed(part):
    ours = chosen("bank_contrast")[0]

    def prepare(inputs):
        run = ours.prepare(inputs)
        return lambda: [x * (1.001 if n == part else 1) for n, x in enumerate(run())]

    wrong = peers.Peer("wrong", "bank_contrast", prepare, "1 per mille too large")
    rows, _ = measure_shape(TINY, [ours, wrong], budget=0.01)
    assert rows[1]["refused"].startswith("wrong: error ") and "median" not in rows[1]
    others = [replace(wrong, name="codir_fast"), replace(ours, name="other")]
    rows, _ = measure_shape(TINY, others, budget=0.01)
    assert rows[0]["refused"].startswith("wrong: error ")
    assert rows[1]["median"] > 0 and rows[1]["ratio"] is None
    with pytest.raises(RuntimeError, match="wrong is wrong at tiny"):
        inputs = peers.make_inputs(TINY)
        check(wrong, wrong.prepare(inputs), inputs)


def test_what_does_not_fit_or_is_missing_is_listed_with_the_reason():
    ours = chosen("bank_contrast")[0]
    missing = peers.Peer("missing", "bank_contrast", ours.prepare, "", packages=("no_such",))
    large = peers.Peer("large", "bank_contrast", ours.prepare, "", copies=1e9)
    rows, ceilings = measure_shape(TINY, [ours, missing, large], budget=0.01)
    assert [row.get("refused") for row in rows][:2] == [None, "needs no_such"]
    assert rows[2]["refused"].startswith("needs ") and rows[2]["refused"].endswith("GiB")
    assert rows[0]["ratio"] == 1 and rows[0]["share_of_ceiling"] > 0 and "median" not in rows[1]
    assert ceilings["product_flops"] > 1e8 and ceilings["copy_bytes_per_second"] > 1e8


def test_a_shape_whose_inputs_do_not_fit_leaves_the_others(tmp_path, capsys):
    arguments = ["--shape", "99999999,99999999,999", "2,9,4", "--peers", "eager"]
    assert main(["bench", *arguments, "--budget", "0.01", "--out", str(tmp_path)]) == 1
    assert "codir_fast at 99999999x99999999x999" in capsys.readouterr().err
    large, small = results_of(tmp_path)[:2], results_of(tmp_path)[2:]
    assert all(row["refused"].startswith("failed: RuntimeError: ") for row in large)
    assert all(row["median"] > 0 for row in small)
    here = str(Path(comparison.__file__).parent.parent)
    assert here not in large[0]["traceback"]  # results are read on other machines
    assert "make_inputs" in large[0]["traceback"]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["shapes"]


def test_a_peer_that_fails_is_listed_with_what_it_raised():
    ours = chosen("bank_contrast")[0]
    calls = []

    def prepare(inputs):
        def run():
            calls.append(1)
            if len(calls) > 1:  # right, but not a second time
                raise ValueError("no room")
            return ours.prepare(inputs)()

        return run

    bad = peers.Peer("bad", "bank_contrast", prepare, "")
    rows, _ = measure_shape(TINY, [bad, ours], budget=0.01)
    assert rows[0]["refused"] == "failed: ValueError: no room" and "median" not in rows[0]
    assert "in run" in rows[0]["traceback"] and rows[1]["median"] > 0


def test_what_is_done_is_written_when_the_run_ends_early(tmp_path, monkeypatch):
    def make_inputs(shape, *place):
        if shape.sizes["K"] == 300:
            raise KeyboardInterrupt
        return peers.make_inputs(shape, *place)

    monkeypatch.setattr(comparison, "make_inputs", make_inputs)
    flags = ["--shape", "4,200,16", "4,300,16", "--peers", "eager", "--budget", "0.01"]
    assert main(["bench", *flags, "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(row["shape"], row["peer"]) for row in results["shapes"]] == [
        ("4x200x16", "codir_fast"),
        ("4x200x16", "eager"),
    ]
    assert "| eager |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_named_shapes_come_before_sweeps_and_each_point_is_written(tmp_path, monkeypatch):
    def make_inputs(shape, *place):
        if shape.sizes["K"] == 64:
            raise KeyboardInterrupt
        return peers.make_inputs(shape, *place)

    monkeypatch.setattr(comparison, "make_inputs", make_inputs)
    shapes = [Shape("", "bank_contrast", {"B": 2, "K": K, "D": 8}) for K in (16, 64)]
    monkeypatch.setattr("codir_fast.benchmarks.run.SWEEPS", {"K": shapes})
    flags = ["--sweep", "K", "--shape", "4,200,16", "--peers", "eager", "--budget", "0.01"]
    assert main(["bench", *flags, "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["shape"] for row in results["shapes"]] == ["4x200x16"] * 2
    assert [row["shape"] for row in results["sweeps"]["K"]] == ["K=16"] * 2
    assert "compiled" not in results  # on a CPU only where it is asked for


def test_ours_wrong_is_the_exit_code_and_the_rest_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(comparison.TOLERANCE, torch.float32, 1e-30)
    flags = ["--shape", "4,200,16", "--peers", "two-products", "--budget", "0.01"]
    assert main(["bench", *flags, "--out", str(tmp_path)]) == 1
    assert "codir_fast at 4x200x16 (bank_contrast) wrong: error" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["shapes"][1]["median"] > 0 and not (tmp_path / "shapes.png").exists()


def test_files(tmp_path, capsys):
    out = tmp_path / "made" / "here"
    flags = ["--shape", "4,200,16", "--peers", "eager", "two-products", "--budget", "0.01"]
    assert main(["bench", *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| eager |" in printed and "not the loss" in printed
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {row["peer"] for row in results["shapes"]} == {"codir_fast", "eager", "two-products"}
    assert {"cpu", "threads", "instruction_set", "torch", "date"} <= results["machine"].keys()
    for row in results["shapes"]:
        assert 0 < row["lowest"] <= row["median"] <= row["highest"] and row["rounds"] >= 3
    assert "4x200x16" in (out / "table.md").read_text(encoding="utf-8")
    assert (out / "shapes.png").read_bytes().startswith(b"\x89PNG")


def test_sweep(tmp_path, monkeypatch, capsys):
    shapes = [Shape(f"K={K}", "bank_contrast", {"B": 2, "K": K, "D": 8}) for K in (16, 64)]
    monkeypatch.setattr("codir_fast.benchmarks.run.SWEEPS", {"K": shapes})
    flags = ["--sweep", "K", "--peers", "eager", "--budget", "0.01", "--out", str(tmp_path)]
    assert main(["bench", *flags]) == 0
    assert "| 64 | eager |" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["sizes"]["K"] for row in results["sweeps"]["K"]] == [16, 16, 64, 64]
    assert results["shapes"] == [] and (tmp_path / "over_K.png").is_file()


def test_train_step(tmp_path, monkeypatch, capsys):
    train_step = pytest.importorskip("codir_fast.benchmarks.train_step", reason="transformers")
    monkeypatch.setattr(train_step, "H", 24)
    monkeypatch.setattr(train_step, "T", 8)
    assert main(["bench", "--train_step", "0.01", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = {row["arm"]: row for row in results["train_step"]}
    assert list(rows) == ["ce-kd", "ce-kd-again", "codir-8530", "codir-65536"]
    assert set(rows["ce-kd"]["added"].values()) == {0} and results["shapes"] == []
    added = rows["codir-65536"]["added"]
    assert added["low"] <= added["median"] <= added["high"] and added["median"] != 0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| CE + KD + CoDIR, 8,530 rows |" in table and table.splitlines()[-1] in (
        capsys.readouterr().out
    )


def test_a_training_step_moves_the_student_its_heads_and_the_bank(monkeypatch):
    train_step = pytest.importorskip("codir_fast.benchmarks.train_step", reason="transformers")
    monkeypatch.setattr(train_step, "H", 24)
    arm = train_step.Arm("tiny", "", codir_weight=0.1, num_rows=100)
    model, batch = arm.make_model(), arm.make_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step.training_step(model, [batch])()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    rows = model.contrast.bank.rows
    changed = (rows != before["contrast.bank.rows"]).any(1)
    assert changed.nonzero()[:, 0].tolist() == sorted(batch["index"].tolist())
    assert "contrast.student_projection.linear.weight" in moved
    assert any(name.startswith("student.bert.encoder.layer.0") for name in moved)
    plain = train_step.ARMS[0].make_model()
    assert plain.distillation_config.codir_weight == 0 and not hasattr(plain, "contrast")


def test_what_a_function_adds():
    base = [1.0, 2.0, 4.0, 1.0, 1.0]
    added = measure.Added.over(base, [1.1, 2.4, 4.0, 1.3, 1.4])
    shares = (added.median, added.low, added.high, added.lower, added.upper)
    assert shares == pytest.approx((0.2, 0.0, 0.4, 0.1, 0.3))
    many = measure.Added.over([1.0] * 100, [1 + n / 1000 for n in range(100)])
    assert (many.low, many.high) == pytest.approx((0.040, 0.059))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "nothing"], "`shape` must be one of launch, codir"),
        (["--shape", "4,0,8"], "`shape` must be one of"),
        (["--peers", "nobody"], "`peers` must be of"),
        (["--sweep", "D"], "`sweep` must be of K, B, got 'D'"),
        (["--threads", "0"], "`threads` must be at least 1, got 0"),
        (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
        (["--budget", "nan"], "`budget` must be positive seconds, got nan"),
        (["--warm", "-1"], "`warm` must not be negative, got -1"),
        (["--limit", "0"], "`limit` must be positive seconds, got 0.0"),
        (["--train_step", "0"], "`train_step` must be positive seconds, got 0.0"),
        (["--train_step", "1", "--device", "cuda"], "`train_step` is timed on the CPU, got"),
        (["--out", "/dev/null/x"], "`out` /dev/null/x can't be made"),
        (["--fast"], "bench has no flag --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_list_names_all(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(shape.name in printed for shape in SHAPES)
    assert all(peer.name in printed for peer in peers.PEERS)


def test_shapes_by_name_and_by_sizes():
    assert find_shape("moco").sizes == {"B": 256, "K": 65536, "D": 128}
    assert find_shape("3,5,7").flop == 4 * 3 * 5 * 7
    with pytest.raises(UsageError):
        find_shape("3,5")


@pytest.mark.skipif(measure.peak_memory(lambda: None) is None, reason="reads the peak from /proc")
def test_peak_memory_sees_what_is_held_for_a_moment():
    def run():
        return float((torch.ones(1 << 24) * 2).sum())

    assert 60 < measure.peak_memory(run) / 2**20 < 300


def test_rounds_are_interleaved():
    calls = []
    times = measure.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 0.01)
    assert all(each.lowest <= each.median <= each.highest for each in times)
    assert times[0].rounds == times[1].rounds >= 3
    switches = sum(one != other for one, other in zip(calls, calls[1:], strict=False))
    assert switches >= 3
