"""The demo's own steps, on a data set made here."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    with path.open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_split_is_shuffled_disjoint_and_repeatable(demo, tmp_path):
    source = tmp_path / "all.csv"
    with source.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows((f'text "{n}",\nmore', n // 30, "rotten_tomatoes") for n in range(60))
        writer.writerow(["other", 1, "imdb"])
    demo.split_reviews(source, tmp_path / "one", None, {"validation": 0.1})
    train, validation = (read(tmp_path / "one" / f"{name}.csv") for name in ("train", "validation"))
    assert (len(train), len(validation)) == (54, 6)
    assert len(set(train) | set(validation)) == 60
    labels = [label for _, label in train]
    assert labels != sorted(labels)
    demo.split_reviews(source, tmp_path / "two", None, {"validation": 0.1})
    assert read(tmp_path / "two" / "train.csv") == train
    demo.split_reviews(source, tmp_path / "small", 20, {"validation": 0.1, "test": 0.2})
    parts = [read(tmp_path / "small" / f"{name}.csv") for name in ("validation", "test", "train")]
    assert [len(part) for part in parts] == [2, 4, 14]
    assert len(set().union(*parts)) == 20


def test_finished_step_is_kept_and_a_changed_one_is_done_again(demo, tmp_path, monkeypatch):
    runs = []

    def run(command, *arguments):
        output = Path(arguments[-1])
        output.mkdir(parents=True)
        (output / "model.safetensors").write_text(str(len(runs)))
        runs.append(arguments)

    monkeypatch.setattr(demo, "codir_fast", run)
    source = tmp_path / "train.csv"
    source.write_text("a")
    output = tmp_path / "teacher"
    first = demo.train(output, "finetune", [source], ["--seed", "1"])
    assert demo.train(output, "finetune", [source], ["--seed", "1"]) == first and len(runs) == 1
    demo.train(output, "finetune", [source], ["--seed", "2"])
    source.write_text("b")
    demo.train(output, "finetune", [source], ["--seed", "2"])
    assert len(runs) == 3
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "model.safetensors"]
    assert not output.with_suffix(".partial").exists()


def test_failed_step_leaves_the_earlier_one(demo, tmp_path, monkeypatch):
    output = tmp_path / "teacher"
    output.mkdir()
    (output / "model.safetensors").write_text("good")

    def run(command, *arguments):
        partial = Path(arguments[-1])
        partial.mkdir()
        (partial / "model.safetensors").write_text("half")
        raise SystemExit("demo: codir-fast finetune ended with exit code 1")

    monkeypatch.setattr(demo, "codir_fast", run)
    with pytest.raises(SystemExit):
        demo.train(output, "finetune", [], [])
    assert (output / "model.safetensors").read_text() == "good"


def test_evaluation_is_kept_for_the_same_examples(demo, tmp_path, monkeypatch):
    asked = []

    def run(command, *arguments):
        asked.append(arguments)
        return json.dumps({"accuracy": len(asked) / 10})

    monkeypatch.setattr(demo, "codir_fast", run)
    examples = tmp_path / "validation.csv"
    examples.write_text("a")
    assert [demo.evaluate(tmp_path, examples)["accuracy"] for _ in range(2)] == [0.1, 0.1]
    examples.write_text("b")
    assert demo.evaluate(tmp_path, examples)["accuracy"] == 0.2


def test_report_has_table_and_pictures(demo, tmp_path):
    results = {}
    for name in demo.RUNS:
        (tmp_path / name).mkdir()
        history = [{"step": n, "loss": 1 / n, "ce": 2 / n, "kd": 3 / n} for n in range(1, 9)]
        state = json.dumps({"log_history": [*history, {"step": 8, "eval_loss": 1.0}]})
        (tmp_path / name / "trainer_state.json").write_text(state)
        results[name] = {
            "accuracy": 0.8,
            "n": 100,
            "loss": 0.5,
            "milliseconds_per_sentence": 1.5,
            "parameters": 2_000_000,
            "training_seconds": 3.0,
        }
    summary = {
        "results": results,
        "examples": {"train": 900, "validation": 100},
        "seed": 1,
        "quick": False,
        "machine": "here",
        "versions": {"torch": "2"},
    }
    demo.write_report(tmp_path, summary)
    report = (tmp_path / "report.md").read_text()
    assert "| student, CoDIR | 0.800 | 2.0 | 1.50 | 3 |" in report
    assert "one standard error is 4.0 points" in report
    for picture in ("loss_terms.png", "accuracy_latency.png"):
        assert f"({picture})" in report
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "Quick run" not in report
    demo.write_report(tmp_path, summary | {"quick": True})
    assert "Quick run" in (tmp_path / "report.md").read_text()
