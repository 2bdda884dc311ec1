"""Damaged and malicious checkpoints and models: refused in one line, or the checkpoint before is
used; no code of theirs is run.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import BertForSequenceClassification

from codir_fast.cli import main
from codir_fast.distillation.checkpoint import last_whole_checkpoint
from codir_fast.distillation.manifest import MANIFEST, read_manifest, verify, write_manifest
from codir_fast.distillation.training_state import load_tree, save_tree

MODEL, HEADS = "model.safetensors", "distillation_state.safetensors"
STATE, RANDOM = "training_state.safetensors", "random_state_0.safetensors"
INDEX = "model.safetensors.index.json"


class Payload:
    """Unpickled, it makes the file OWNED."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["OWNED"]),)


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path, monkeypatch):
    owned = tmp_path / "owned"
    monkeypatch.setenv("OWNED", str(owned))
    pickle.loads(pickle.dumps(Payload()))
    assert owned.exists()  # the payload works
    owned.unlink()
    yield
    assert not owned.exists()


def command(folder, output):
    return [
        *("distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"),
        *("--train_file", str(folder / "train.csv"), "--output_dir", str(output), "--use_cpu"),
        *("--save_strategy", "steps", "--save_steps", "2", "--projection_dim", "8"),
        *("--per_device_train_batch_size", "8", "--bank_init", "random"),
    ]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run with checkpoint-2 and checkpoint-4; nothing may be written here."""
    output = tmp_path_factory.mktemp("run") / "output"
    assert main([*command(folder, output), "--max_steps", "4"]) == 0
    return output


@pytest.fixture
def output(run, tmp_path):
    shutil.copytree(run, tmp_path / "output")
    return tmp_path / "output"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def swap(path):
    shutil.copy(path.parent.with_name("checkpoint-2") / path.name, path)


def link(path):
    """To the very same bytes, outside."""
    outside = path.parent.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def pickled(path):
    path.write_bytes(pickle.dumps(Payload()))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def text(value):
    return lambda path: path.write_text(value)


def manifest(change):
    def apply(path):
        content = json.loads(path.read_text())
        change(content["files"])
        path.write_text(json.dumps(content))

    return apply


def renamed(name):
    return manifest(lambda files: files.update({name: files.pop(MODEL)}))


# File of the newest checkpoint, what happens to it, what is said.
DAMAGE = {
    "weights cut short": (MODEL, cut, "bytes"),
    "a bit of the weights": (MODEL, flip, "not as it was written"),
    "weights missing": (MODEL, Path.unlink, "is missing"),
    "weights empty": (MODEL, empty, "has 0 bytes"),
    "weights of another checkpoint": (MODEL, swap, "not as it was written"),
    "weights a link": (MODEL, link, "is a link"),
    "weights a pickle": (MODEL, pickled, "bytes"),
    "weights a pipe": (MODEL, fifo, "is no file"),
    "optimizer cut short": (STATE, cut, "bytes"),
    "a bit of the optimizer": (STATE, flip, "not as it was written"),
    "optimizer missing": (STATE, Path.unlink, "is missing"),
    "optimizer of another checkpoint": (STATE, swap, ""),
    "random numbers missing": (RANDOM, Path.unlink, "is missing"),
    "a bit of the random numbers": (RANDOM, flip, "not as it was written"),
    "a bit of the bank": (HEADS, flip, "not as it was written"),
    "bank empty": (HEADS, empty, "has 0 bytes"),
    "bank of another checkpoint": (HEADS, swap, "not as it was written"),
    "trainer's state no JSON": ("trainer_state.json", text("{"), "has 1 bytes"),
    "trainer's state of another checkpoint": ("trainer_state.json", swap, ""),
    "settings changed": ("distillation.json", flip, "not as it was written"),
    "manifest missing": (MANIFEST, Path.unlink, f"has no {MANIFEST}"),
    "manifest empty": (MANIFEST, empty, "is no JSON"),
    "manifest cut short": (MANIFEST, cut, "is no JSON"),
    "manifest no text": (MANIFEST, lambda path: path.write_bytes(b"\xff\xfe{"), "is no JSON"),
    "manifest too deep": (MANIFEST, text("[" * 100_000), "is no JSON"),
    "manifest a list": (MANIFEST, text("[1]"), "holds no order and files"),
    "manifest without files": (MANIFEST, text('{"order": 1, "files": 3}'), "holds no order"),
    "manifest of another checkpoint": (MANIFEST, swap, ""),
    "manifest a link": (MANIFEST, link, f"has no {MANIFEST}"),
    "manifest names a file above": (MANIFEST, renamed("../outside"), "outside of the folder"),
    "manifest names a file anywhere": (MANIFEST, renamed("/etc/passwd"), "outside of the folder"),
    "manifest without a hash": (
        MANIFEST,
        manifest(lambda files: files[MODEL].pop("sha256")),
        "holds no order and files",
    ),
    "manifest with a number for a hash": (
        MANIFEST,
        manifest(lambda files: files[MODEL].update(sha256=3)),
        "holds no size and SHA-256",
    ),
    "an index beside the weights": (INDEX, text("{}"), f"is not in its {MANIFEST}"),
    "a pickled optimizer beside": ("optimizer.pt", pickled, f"is not in its {MANIFEST}"),
    "a pickled model beside": ("pytorch_model.bin", pickled, f"is not in its {MANIFEST}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen(folder, output, capsys, name):
    file, change, message = DAMAGE[name]
    newest = output / "checkpoint-4"
    change(newest / file)

    said = []
    assert last_whole_checkpoint(output, said.append) == output / "checkpoint-2"
    assert len(said) == 1 and said[0].startswith("checkpoint-4 is damaged: ")
    assert message in said[0] and said[0].endswith("; resuming from checkpoint-2")

    arguments = [*command(folder, output), "--max_steps", "6"]
    assert main([*arguments, "--resume_from_checkpoint", str(newest)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: `resume_from_checkpoint` must be the folder of a")
    assert error.count("\n") == 1 and message in error and str(newest) in error


def test_a_link_in_place_of_a_checkpoint_is_seen(output):
    shutil.move(output / "checkpoint-4", output.parent / "elsewhere")
    (output / "checkpoint-4").symlink_to(output.parent / "elsewhere")
    said = []
    assert last_whole_checkpoint(output, said.append) == output / "checkpoint-2"
    assert "checkpoint-4 is damaged: it is a link" in said[0]


def test_the_checkpoint_before_is_used_and_the_damaged_one_replaced(folder, output, run, capsys):
    flip(output / "checkpoint-4" / MODEL)
    arguments = [*command(folder, output), "--max_steps", "4"]
    assert main([*arguments, "--resume_from_checkpoint", "True"]) == 0
    assert "checkpoint-4 is damaged: model.safetensors is not as" in capsys.readouterr().err
    verify(output / "checkpoint-4")
    for name in (MODEL, HEADS):
        for checkpoint in ("", "checkpoint-4"):
            one, other = (load_file(path / checkpoint / name) for path in (output, run))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), name


def test_with_all_checkpoints_damaged_there_is_none(folder, output, capsys):
    flip(output / "checkpoint-4" / MODEL)
    empty(output / "checkpoint-2" / STATE)
    before = sorted(output.rglob("*"))
    arguments = [*command(folder, output), "--resume_from_checkpoint", "True"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "found no checkpoint in" in error
    assert "checkpoint-4 is damaged: model" in error and "checkpoint-2 is damaged: train" in error
    assert sorted(output.rglob("*")) == before


# Checkpoints that were changed by someone who can write a manifest.


def tensors(name, change):
    def apply(directory):
        content = load_file(directory / name)
        change(content)
        save_file({key: value.clone() for key, value in content.items()}, directory / name)

    return apply


def bank(change):
    return tensors(HEADS, lambda content: change(content["contrast.bank.rows"]))


def tree(name, change):
    def apply(directory):
        content = load_tree(directory / name)
        change(content)
        save_tree(content, directory / name)

    return apply


def trainer_state(**changes):
    def apply(directory):
        path = directory / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def to_file(name, change):
    return lambda directory: change(directory / name)


def index_of(target):
    def apply(directory):
        names = load_file(directory / MODEL)
        shutil.move(directory / MODEL, directory.parent / "outside.safetensors")
        target_name = target.replace("PARENT", str(directory.parent))
        weight_map = {name: target_name for name in names}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def deeper_student(directory):
    BertForSequenceClassification(tiny_config(num_hidden_layers=3)).save_pretrained(directory)


CHANGES = {
    "NaN in the bank": (bank(lambda rows: rows[3].fill_(torch.nan)), "must be finite"),
    "infinity in the bank": (bank(lambda rows: rows[3, 0].fill_(torch.inf)), "must be finite"),
    "a longer row": (bank(lambda rows: rows[3].mul_(2)), "must have length 1, got 2"),
    "another label": (
        tensors(HEADS, lambda content: content["contrast.bank.row_labels"][5].add_(1)),
        "the labels in contrast.bank are not those",
    ),
    "fewer rows": (
        tensors(
            HEADS,
            lambda content: content.update(
                {"contrast.bank.rows": content["contrast.bank.rows"][:5]}
            ),
        ),
        "contrast.bank.rows must have shape",
    ),
    "no bank": (
        tensors(HEADS, lambda content: content.pop("contrast.bank.rows")),
        "of another kind of run",
    ),
    "a pickle for weights": (to_file(MODEL, pickled), "does not fit this run"),
    "a pickle for the bank": (to_file(HEADS, pickled), "does not fit this run"),
    "a pickle for the optimizer": (to_file(STATE, pickled), "does not fit this run"),
    "an index of a file above": (index_of("../outside.safetensors"), "outside of the folder"),
    "an index of a file anywhere": (
        index_of("PARENT/outside.safetensors"),
        "outside of the folder",
    ),
    "weights missing": (
        tensors(MODEL, lambda content: content.pop("classifier.weight")),
        "missing keys: classifier.weight",
    ),
    "weights of another student": (deeper_student, "does not fit this run"),
    "no JSON for a configuration": (to_file("config.json", text("{")), "does not fit this run"),
    "no trainer's state": (to_file("trainer_state.json", Path.unlink), "does not fit this run"),
    "trainer's state no JSON": (
        to_file("trainer_state.json", text("[[")),
        "does not fit this run",
    ),
    "trainer's state of unknown fields": (trainer_state(exec="x"), "does not fit this run"),
    "a step in words": (trainer_state(global_step="../4"), "global_step in trainer_state.json"),
    "optimizer of another model": (
        tree(STATE, lambda content: content["parameters"].reverse()),
        "optimizer is that of another model",
    ),
    "optimizer of another kind": (
        tree(STATE, lambda content: content["optimizer"]["param_groups"][0].pop("eps")),
        "optimizer is of another kind",
    ),
    "a moment of another shape": (
        tree(
            STATE,
            lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.zeros(2, 2)),
        ),
        "exp_avg of the optimizer has shape (2, 2)",
    ),
    "a moment missing": (
        tree(STATE, lambda content: content["optimizer"]["state"][0].pop("exp_avg")),
        "its optimizer keeps ['exp_avg_sq', 'step'] of a parameter, expected ['exp_avg', ",
    ),
    "a moment of no parameter": (
        tree(STATE, lambda content: content["optimizer"]["state"].update({1000: {}})),
        "its optimizer keeps something of parameters that there are none of",
    ),
    "a moment that is a number": (
        tree(STATE, lambda content: content["optimizer"]["state"][0].update(exp_avg=1.0)),
        "exp_avg of the optimizer is no tensor, that of this run has shape (",
    ),
    "no state of the optimizer": (
        tree(STATE, lambda content: content.pop("optimizer")),
        "KeyError('optimizer')",
    ),
    "another schedule": (
        tree(STATE, lambda content: content["scheduler"].update(step="print")),
        "follow another schedule",
    ),
    "an optimizer that is no tree": (
        lambda directory: save_file({"a": torch.ones(1)}, directory / STATE),
        "has no tree in its header",
    ),
    "a tree of unknown kinds": (
        lambda directory: save_file(
            {"a": torch.ones(1)}, directory / STATE, {"tree": '{"eval": "print()"}'}
        ),
        "eval is no kind of value",
    ),
    "random numbers that are none": (
        tree(RANDOM, lambda content: content.update(cpu=torch.zeros(3))),
        "does not fit this run",
    ),
    "no random numbers": (to_file(RANDOM, Path.unlink), "does not fit this run"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_checkpoint_is_refused(folder, output, capsys, name):
    change, message = CHANGES[name]
    newest = output / "checkpoint-4"
    order = read_manifest(newest)["order"]
    change(newest)
    (newest / MANIFEST).unlink()
    write_manifest(newest, order)
    verify(newest)
    saved = (output / MODEL).read_bytes()
    arguments = [*command(folder, output), "--max_steps", "6", "--disable_tqdm", "True"]
    assert main([*arguments, "--resume_from_checkpoint", "True"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codir-fast: error: ") and message in error
    assert "`resume_from_checkpoint`" in error
    assert (output / MODEL).read_bytes() == saved
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_pickles_that_transformers_would_read_are_not_read(folder, output):
    newest = output / "checkpoint-4"
    names = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin")
    for name in (*names, "pytorch_model.bin"):
        pickled(newest / name)
    (newest / MANIFEST).unlink()
    write_manifest(newest, 1)
    arguments = [*command(folder, output), "--max_steps", "5"]
    assert main([*arguments, "--resume_from_checkpoint", str(newest)]) == 0


# Models

HOSTILE = {
    "a pickle for weights": (to_file(MODEL, pickled), "can't be loaded"),
    "weights as a pickle only": (
        lambda directory: (
            (directory / MODEL).unlink(),
            pickled(directory / "pytorch_model.bin"),
        ),
        "can't be loaded",
    ),
    "an index of a file above": (index_of("../outside.safetensors"), "outside of the folder"),
    "an index of a file anywhere": (
        index_of("PARENT/outside.safetensors"),
        "outside of the folder",
    ),
    "an index that is none": (
        lambda directory: (
            (directory / MODEL).unlink(),
            (directory / INDEX).write_text('{"weight_map": 3}'),
        ),
        "holds no weight_map",
    ),
    "weights empty": (to_file(MODEL, empty), "can't be loaded"),
    "weights cut short": (to_file(MODEL, cut), "can't be loaded"),
}


@pytest.mark.parametrize("flag", ["teacher", "student", "model_name_or_path"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_model_is_refused(folder, tmp_path, capsys, name, flag):
    change, message = HOSTILE[name]
    model = tmp_path / "model"
    shutil.copytree(folder / "teacher", model)
    change(model)
    arguments = {
        "teacher": ["distill", "--teacher", str(model), "--student_layers", "2"],
        "student": ["distill", "--teacher", str(folder / "teacher"), "--student", str(model)],
        "model_name_or_path": ["finetune", "--model_name_or_path", str(model)],
    }[flag]
    output = ["--output_dir", str(tmp_path / "out"), "--train_file", str(folder / "train.csv")]
    assert main([*arguments, *output, "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: ") and error.count("\n") == 1
    assert f"`{flag}` can't be loaded from {model}: " in error and message in error
    assert not (tmp_path / "out").exists()


def test_code_of_a_model_is_not_run(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "teacher", model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {
            "AutoConfig": "code.Mine",
            "AutoModelForSequenceClassification": "code.Mine",
        },
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text("import os, pathlib\npathlib.Path(os.environ['OWNED']).touch()")
    arguments = ["distill", "--teacher", str(model), "--student_layers", "2", "--use_cpu"]
    output = ["--output_dir", str(tmp_path / "out"), "--train_file", str(folder / "train.csv")]
    assert main([*arguments, *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: `teacher` can't be loaded from")
    assert error.count("\n") == 1
