"""The teacher's outputs on disk: as the live teacher gives them, keyed by what changes them,
made again where they are damaged.
"""

import json

import pytest
import torch
from test_checkpoint import files_up_to
from tiny import make_tokenizer, tiny_config, write_examples
from transformers import BertForSequenceClassification

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.cli import main
from codir_fast.distillation.arguments import DataArguments
from codir_fast.distillation.config import PRESETS
from codir_fast.distillation.data import load_examples, tokenize
from codir_fast.distillation.labels import read_labels
from codir_fast.distillation.manifest import MANIFEST, write_manifest
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.teacher_cache import (
    COLUMNS,
    MADE_FROM,
    OUTPUTS,
    TeacherCollator,
    with_teacher_outputs,
)

BATCH = 4


def make_teacher(**changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_config(**changes)).eval()


def make_tokens(path, teacher, max_length=16, seed=1):
    write_examples(path, 21, seed=seed)
    examples, _ = load_examples(DataArguments(train_file=str(path)), seed=0)
    labels = read_labels(examples, "train_file", teacher.config)
    return tokenize(examples, make_tokenizer(), labels, max_length)


def make_model(teacher, config=None):
    return DistillationModel(
        student_from_teacher(teacher, 2),
        teacher,
        config or DistillationConfig(projection_dim=8),
        torch.arange(21) % 2,
    )


def cached(model, tokens, directory, **changes):
    options = {"directory": directory, "batch_size": BATCH, "device": torch.device("cpu")}
    collator = TeacherCollator(make_tokenizer())
    return with_teacher_outputs(model, tokens, collator, **(options | changes))


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def tokens(tmp_path):
    return make_tokens(tmp_path / "train.csv", make_teacher())


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("weights", [{}, {"codir_weight": 0.0}], ids=["layers", "logits"])
def test_columns_are_what_the_teacher_gives(tokens, tmp_path, pooling, weights):
    model = make_model(make_teacher(), DistillationConfig(pooling=pooling, **weights))
    found = cached(model, tokens, tmp_path / "cache")
    collator = TeacherCollator(make_tokenizer())
    for start in (0, 17):
        batch = collator([found[n] for n in range(start, start + BATCH)])
        inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
        for name, expected in zip(COLUMNS, model.teacher_outputs(**inputs), strict=True):
            assert (expected is None) == (name not in batch)
            if expected is not None:
                torch.testing.assert_close(batch[name], expected, rtol=1e-5, atol=1e-6)
        assert batch["index"].tolist() == list(range(start, start + BATCH))


def test_a_cache_that_fits_is_used_without_the_teacher(tokens, tmp_path, monkeypatch):
    model = make_model(make_teacher())
    first = cached(model, tokens, tmp_path / "cache")

    def fail(**inputs):
        raise AssertionError("the teacher was run")

    monkeypatch.setattr(model, "teacher_outputs", fail)
    again = cached(model, tokens, tmp_path / "cache")
    for name in COLUMNS:
        assert torch.equal(first[name][:], again[name][:])


def test_a_teacher_that_is_changed_in_place_makes_another_cache(tokens, tmp_path):
    model = make_model(make_teacher())
    before = cached(model, tokens, tmp_path / "cache")["teacher_logits"][:]
    with torch.no_grad():
        model.teacher.classifier.bias += 1
    after = cached(model, tokens, tmp_path / "cache")["teacher_logits"][:]
    torch.testing.assert_close(after, before + 1)


CHANGES = {
    "weights": lambda path: {"teacher": make_teacher(initializer_range=0.1)},
    "config": lambda path: {"teacher": make_teacher(hidden_act="relu")},
    "texts": lambda path: {"tokens": make_tokens(path, make_teacher(), seed=2)},
    "length": lambda path: {"tokens": make_tokens(path, make_teacher(), max_length=5)},
    "pooling": lambda path: {"config": DistillationConfig(pooling="max")},
    "layers": lambda path: {"config": DistillationConfig(layer_mapping="last")},
    "terms": lambda path: {"config": DistillationConfig(codir_weight=0.0)},
    "precision": lambda path: {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_outputs_makes_another_cache(tokens, tmp_path, change):
    directory = tmp_path / "cache"
    cached(make_model(make_teacher()), tokens, directory)
    changed = CHANGES[change](tmp_path / "other.csv")
    teacher = changed.pop("teacher", None) or make_teacher()
    model = make_model(teacher, changed.pop("config", None))
    found = cached(model, changed.pop("tokens", tokens), directory, **changed)
    assert len(folders(directory)) == 2
    exact = cached(model, tokens, tmp_path / "fresh", **changed)
    if change not in ("texts", "length"):
        assert torch.equal(found["teacher_logits"][:], exact["teacher_logits"][:])


def damage_flip(folder):
    content = bytearray((folder / OUTPUTS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / OUTPUTS).write_bytes(content)


def swap(folder):
    """A whole cache of another teacher, under this one's name."""
    parts = json.loads((folder / MADE_FROM).read_text()) | {"teacher": "0"}
    (folder / MADE_FROM).write_text(json.dumps(parts))
    (folder / MANIFEST).unlink()
    write_manifest(folder, 0)


DAMAGES = {
    "flipped bit": damage_flip,
    "truncated": lambda folder: (folder / OUTPUTS).write_bytes(
        (folder / OUTPUTS).read_bytes()[:-100]
    ),
    "empty": lambda folder: (folder / OUTPUTS).write_bytes(b""),
    "no outputs": lambda folder: (folder / OUTPUTS).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "garbled manifest": lambda folder: (folder / MANIFEST).write_bytes(b"\xff{"),
    "manifest is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "of another teacher": swap,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_made_again(tokens, tmp_path, capsys, name):
    model, directory = make_model(make_teacher()), tmp_path / "cache"
    expected = cached(model, tokens, directory)["teacher_logits"][:]
    assert "teacher cache" not in capsys.readouterr().err
    (folder,) = directory.iterdir()
    DAMAGES[name](folder)
    found = cached(model, tokens, directory)["teacher_logits"][:]
    assert torch.equal(found, expected)
    assert f"teacher cache {folder}" in capsys.readouterr().err
    assert folders(directory) == [folder.name]


def test_what_another_run_made_meanwhile_stays(tokens, tmp_path, monkeypatch):
    """Two runs begin without a cache; the second one ends while the first one reads its own."""
    directory, model = tmp_path / "cache", make_model(make_teacher())
    live, inodes = model.teacher_outputs, []

    def slow(**inputs):
        if not inodes:
            inodes.append(0)
            cached(model, tokens, directory)  # the other run, from start to end
            (made,) = (path for path in directory.iterdir() if not path.name.startswith("partial"))
            inodes[0] = (made / OUTPUTS).stat().st_ino
        return live(**inputs)

    monkeypatch.setattr(model, "teacher_outputs", slow)
    both = cached(model, tokens, directory)
    (name,) = folders(directory)
    assert (directory / name / OUTPUTS).stat().st_ino == inodes[0] and len(both) == 21


def test_outputs_that_are_not_finite_are_refused_and_nothing_is_kept(tokens, tmp_path):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[tokens[7]["input_ids"][1]] = torch.nan
    with pytest.raises(ValueError, match="`teacher` must give finite outputs"):
        cached(make_model(teacher), tokens, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


@pytest.mark.parametrize("preset", [*PRESETS, "pkd"])
def test_losses_are_those_of_the_live_teacher(folder, tmp_path, preset):
    """Through the command line, each term at each step, with the teacher gone."""
    settings = ["--pkd_weight", "1"] if preset == "pkd" else ["--preset", preset]
    histories = []
    for name, flags in (("live", []), ("cached", ["--cache_teacher", "True"])):
        if flags:
            flags += ["--teacher_cache_dir", str(tmp_path / "cache")]
        command = ["distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"]
        command += ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / name)]
        command += ["--max_steps", "6", "--per_device_train_batch_size", "8", "--use_cpu"]
        command += ["--logging_steps", "1", *settings, *flags]
        assert main(command) == 0
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        histories.append([row for row in state["log_history"] if "loss" in row])
    for live, cached_row in zip(*histories, strict=True):
        for term in {"loss", "ce", "kd", "codir", "pkd"} & live.keys():
            assert cached_row[term] == pytest.approx(live[term], abs=1e-6, rel=1e-6), term


def test_evaluation_runs_beside_a_cache(folder, tmp_path):
    command = ["distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"]
    command += ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / "out")]
    command += ["--validation_file", str(folder / "validation.csv"), "--use_cpu"]
    command += ["--cache_teacher", "True", "--teacher_cache_dir", str(tmp_path / "cache")]
    assert main(command) == 0
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "metrics.json").read_text())


# Two ways in which datasets fails: its file can't be written, and can't be closed.
@pytest.mark.parametrize("size", [1_000, 3_800])
def test_full_disk_leaves_no_half_of_a_cache(folder, tmp_path, capsys, monkeypatch, size):
    def limited(*args, **kwargs):
        with files_up_to(size):
            return with_teacher_outputs(*args, **kwargs)

    command = ["distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"]
    command += ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / "out")]
    command += ["--cache_teacher", "True", "--teacher_cache_dir", str(tmp_path / "cache")]
    command += ["--use_cpu", "--max_steps", "1", "--save_strategy", "no"]
    monkeypatch.setattr("codir_fast.distillation.distill.with_teacher_outputs", limited)
    assert main(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"codir-fast: error: `teacher_cache_dir` {tmp_path / 'cache'} can't be written" in error
    assert "File too large" in error
    assert folders(tmp_path / "cache") == [] and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(command) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_cache_dir", "x"], "`teacher_cache_dir` needs `cache_teacher`"),
        (
            ["--cache_teacher", "True", "--teacher_cache_dir", "FILE/x"],
            "`teacher_cache_dir` FILE/x can't be written",
        ),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, capsys, flags, message):
    file = str(folder / "train.csv")
    command = ["distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"]
    command += ["--train_file", file, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main(command + [flag.replace("FILE", file) for flag in flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.replace("FILE", file) in error and error.startswith("codir-fast: error: ")
