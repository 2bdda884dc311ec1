"""--auto_find_batch_size: a batch that has no room is tried again smaller, and a resumed run goes
on with the size that was found, or says why not.
"""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from codir_fast.cli import main
from codir_fast.distillation.model import DistillationModel

NO_ROOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
STATES = ("model.safetensors", "distillation_state.safetensors", "training_state.safetensors")


class NoRoom(torch.autograd.Function):
    """Has no memory for the backward pass."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(NO_ROOM)


@pytest.fixture
def memory(monkeypatch):
    """`room` examples of a batch have room; `tried` are the sizes of the batches that came."""
    forward = DistillationModel.forward

    class Memory:
        room = 8
        tried: list = []

    @functools.wraps(forward)
    def limited(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        Memory.tried.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > Memory.room:
            outputs["loss"] = NoRoom.apply(outputs["loss"])
        return outputs

    monkeypatch.setattr(DistillationModel, "forward", limited)
    return Memory


def command(folder, output, *flags, auto=True):
    return [
        *("distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"),
        *("--train_file", str(folder / "train.csv"), "--output_dir", str(output), "--use_cpu"),
        *("--per_device_train_batch_size", "16", "--projection_dim", "8"),
        *("--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "1"),
        *(["--auto_find_batch_size", "True"] if auto else []),
        *flags,
    ]


def test_a_resumed_run_goes_on_with_the_size_that_was_found(folder, tmp_path, memory):
    assert main(command(folder, tmp_path / "unbroken", "--max_steps", "6")) == 0
    assert memory.tried == [16, 14, 12, 10, 9, *6 * [8]]
    checkpoint = tmp_path / "resumed" / "checkpoint-3"
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-3", checkpoint)
    memory.tried.clear()
    resume = ["--resume_from_checkpoint", "True", "--max_steps", "6"]
    assert main(command(folder, tmp_path / "resumed", *resume)) == 0
    assert memory.tried == 3 * [8]
    for name in STATES:
        one, other = (
            load_file(tmp_path / run / "checkpoint-6" / name) for run in ("unbroken", "resumed")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_resumed_run_with_another_size_is_refused_in_one_line(folder, tmp_path, memory, capsys):
    assert main(command(folder, tmp_path, "--max_steps", "3")) == 0
    resume = ["--resume_from_checkpoint", "True", "--max_steps", "6"]
    assert main(command(folder, tmp_path, *resume, auto=False)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("the batch size of all processes was 8, and is 16 now")
    # Where there is room for less than before: its place among the examples would be lost.
    memory.room = 7
    assert main(command(folder, tmp_path, *resume)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "codir-fast: error: `resume_from_checkpoint` does not fit this run" in error
    assert error.endswith("the batch size of all processes was 8, and is 7 now")


@pytest.mark.parametrize("layers", ["joint", "each"])
def test_a_batch_without_room_leaves_nothing(folder, tmp_path, memory, layers):
    """Not in the bank, which changes after a step, and not in the terms of the log."""
    flags = ["--max_steps", "1", "--save_steps", "1", "--contrast_layers", layers]
    assert main(command(folder, tmp_path, *flags)) == 0
    state = load_file(tmp_path / "distillation_state.safetensors")
    filled = [int(value.sum()) for name, value in state.items() if name.endswith("bank.valid")]
    assert filled == {"joint": [8], "each": [8, 8]}[layers]
    (row, _) = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    terms = 0.1 * row["ce"] + 0.9 * row["kd"] + 0.1 * row["codir"]
    assert row["loss"] == pytest.approx(terms, rel=1e-5)
