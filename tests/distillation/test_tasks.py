"""Every kind of task, preset, layer mapping and baseline, through the command line."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, make_tokenizer, tiny_config
from transformers import BertForSequenceClassification

from codir_fast.cli import main
from codir_fast.distillation.config import PRESETS

FAST = ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--save_strategy", "no"]
FAST += ["--report_to", "none", "--use_cpu"]
SIZES = {"train": 40, "validation": 12}


def _words(draw):
    return draw.choices(WORDS, k=draw.randint(3, 7))


def _found(words):
    return min(sum(word in WORDS[:8] for word in words), 2)


# Task -> label of the words of one or two texts.
LABELS = {
    "two classes": lambda words, _: ("negative", "positive")[_found(words) > 0],
    "three texts": lambda words, _: ("none", "one", "more")[_found(words)],
    "three numbers": lambda words, _: 10 * _found(words) - 10,
    "pairs": lambda words, other: ("no", "yes")[bool(set(words) & set(other))],
    "regression": lambda words, _: _found(words) / 2 + 0.01 * len(words),
}
CLASSES = {
    "two classes": ["negative", "positive"],
    "three texts": ["more", "none", "one"],
    "three numbers": ["-10", "0", "10"],
    "pairs": ["no", "yes"],
    "regression": ["LABEL_0"],
}


def _write_examples(path, task, count, seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words, other = _words(draw), _words(draw)
        row = {"text": " ".join(words), "label": LABELS[task](words, other)}
        rows.append(row | ({"second": " ".join(other)} if task == "pairs" else {}))
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def tasks(folder, tmp_path_factory):
    """Folder -> task -> train.jsonl, validation.jsonl and a fine-tuned teacher."""
    root = tmp_path_factory.mktemp("tasks")
    for task in LABELS:
        (root / task).mkdir()
        for seed, (name, count) in enumerate(SIZES.items()):
            _write_examples(root / task / f"{name}.jsonl", task, count, seed)
        command = ["finetune", "--model_name_or_path", str(folder / "teacher")]
        output = ["--output_dir", str(root / task / "teacher"), "--num_train_epochs", "1"]
        assert main([*command, *_data(root, task), *output, *FAST]) == 0
    names = {"id2label": dict(enumerate("abcd")), "problem_type": "multi_label_classification"}
    torch.manual_seed(0)
    narrow = tiny_config(hidden_size=8, num_hidden_layers=2, **names)
    BertForSequenceClassification(narrow).save_pretrained(root / "narrow")
    make_tokenizer().save_pretrained(root / "narrow")
    return root


def _data(root, task):
    files = [f"--{name}_file={root / task / name}.jsonl" for name in SIZES]
    return [*files, *(["--text_pair_column", "second"] if task == "pairs" else [])]


def _distill(root, task, output, *flags, student=("--student_layers", "2")):
    """Runs two epochs, checks what every run must give; returns the logged steps."""
    command = ["distill", "--teacher", str(root / task / "teacher"), *student]
    flags = [*_data(root, task), *FAST, "--num_train_epochs", "2", *flags]
    assert main([*command, *flags, "--output_dir", str(output)]) == 0
    config = json.loads((output / "config.json").read_text())
    assert [config["id2label"][str(n)] for n in range(len(config["id2label"]))] == CLASSES[task]
    metrics = json.loads((output / "metrics.json").read_text())
    names = ("mse", "pearson", "spearman") if task == "regression" else ("accuracy",)
    assert all(-1 <= metrics[f"eval_{name}"] < 10 for name in names)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [row for row in history if "loss" in row]
    assert len(steps) == 6
    settings = json.loads((output / "distillation.json").read_text())
    terms = ("ce", "kd", "codir", "pkd")
    for row in steps:
        total = sum(settings[f"{name}_weight"] * row.get(name, 0) for name in terms)
        assert row["loss"] == pytest.approx(total, rel=1e-3, abs=1e-5)
    return steps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("task", LABELS)
def test_presets(task, preset, tasks, tmp_path, capsys):
    steps = _distill(tasks, task, tmp_path / "out", "--preset", preset)
    assert all(row[name] > 0 for row in steps[3:] for name in ("ce", "kd", "codir"))
    settings = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert {name: settings[name] for name in PRESETS[preset]} == PRESETS[preset]
    capsys.readouterr()
    command = ["evaluate", "--model_name_or_path", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--teacher", str(tasks / task / "teacher")]
    columns = ["--text_pair_column", "second"] if task == "pairs" else []
    test_file = str(tasks / task / "validation.jsonl")
    assert main([*command, "--test_file", test_file, *columns]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    name = "mse" if task == "regression" else "accuracy"
    assert result[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-4)
    assert result["n"] == SIZES["validation"]


@pytest.mark.parametrize("task", ["three texts", "regression"])
@pytest.mark.parametrize(
    ("mapping", "layers"),
    [
        ("uniform", 2),
        ("official", 2),
        ("last", 1),
        ("2:3", 1),
        ("1:1,2:4", 2),
        ("1:1,1:2,2:3,2:4", 4),
    ],
)
def test_layer_mappings(mapping, layers, task, tasks, tmp_path):
    flags = ["--layer_mapping", mapping, "--projection_dim", "4", "--pkd_weight", "0.5"]
    steps = _distill(tasks, task, tmp_path / "out", *flags)
    assert all(row["codir"] > 0 and row["pkd"] > 0 for row in steps[3:])
    state = load_file(tmp_path / "out" / "distillation_state.safetensors")
    for side in ("student", "teacher"):
        assert state[f"contrast.{side}_projection.linear.weight"].shape == (4, layers * 16)


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "paper"],
        ["--preset", "official"],
        ["--standardize_features", "True", "--layer_mapping", "1:2,2:4", "--negatives", "all"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("task", ["two classes", "three numbers", "regression"])
def test_student_of_another_width(task, flags, tasks, tmp_path):
    """It comes with a task and four classes of its own, which give way to the teacher's."""
    student = ("--student", str(tasks / "narrow"))
    steps = _distill(tasks, task, tmp_path / "out", *flags, student=student)
    assert all(row["codir"] > 0 for row in steps[3:])
    weight = load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"]
    assert weight.shape == (len(CLASSES[task]), 8)


BASELINES = {
    "CE": ({"ce_weight": 1, "kd_weight": 0, "codir_weight": 0}, {"ce"}),
    "CE, KD": ({"codir_weight": 0}, {"ce", "kd"}),
    "CE, KD, PKD": ({"codir_weight": 0, "pkd_weight": 10}, {"ce", "kd", "pkd"}),
    "CE, KD, CoDIR": ({}, {"ce", "kd", "codir"}),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("task", ["three texts", "regression"])
def test_baselines(task, name, tasks, tmp_path):
    weights, terms = BASELINES[name]
    flags = [f"--{weight}={value}" for weight, value in weights.items()]
    steps = _distill(tasks, task, tmp_path / "out", *flags)
    for row in steps:
        assert row.keys() & {"ce", "kd", "codir", "pkd"} == terms
    state = load_file(tmp_path / "out" / "distillation_state.safetensors")
    assert bool(state) == ("codir" in terms)
