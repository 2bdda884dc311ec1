"""SIGKILL at any moment: a run of either stage goes on from its checkpoints, and ends bit-equal to
the unbroken one: weights, heads, bank or queue, optimizer, schedule, random numbers, log.
CODIR_FAST_ALL_KILL_POINTS=1 tries 50 moments of each instead of a few.
"""

import json
import multiprocessing
import os
import random
import signal
import time

import killed
import pytest
import torch
from safetensors.torch import load_file

from codir_fast.distillation.checkpoint import checkpoints
from codir_fast.distillation.manifest import verify
from codir_fast.distillation.training_state import load_tree, tree_bytes

POINTS = 50 if os.environ.get("CODIR_FAST_ALL_KILL_POINTS") == "1" else 4
NEVER = 10**9
STEPS = 8
LAST = f"checkpoint-{STEPS}"
FILES = ("model.safetensors", "distillation_state.safetensors")
STATES = ("training_state.safetensors", "random_state_0.safetensors")
SPEED = ("runtime", "per_second")
COMMON = [
    *("--student_layers", "2", "--use_cpu", "--projection_dim", "8"),
    *("--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "2"),
    *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "2"),
    *("--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1"),
    *("--load_best_model_at_end", "True", "--metric_for_best_model", "loss"),
    *("--learning_rate", "0.01", "--disable_tqdm", "True", "--seed", "3"),
]


def commands(folder, corpus):
    """Those of both stages, less their output folder."""
    examples = ["--train_file", str(folder / "train.csv")]
    examples += ["--validation_file", str(folder / "validation.csv")]
    texts = ["--train_file", str(corpus / "texts.txt"), "--validation_split", "0.2"]
    return {
        "distill": ["distill", "--teacher", str(folder / "teacher"), *examples, *COMMON],
        "pretrain": [
            *("pretrain", "--teacher", str(corpus / "mlm"), "--queue_size", "24", *texts, *COMMON),
        ],
    }


class Runner:
    """Starts runs of one command as forked processes; knows how the unbroken one went."""

    def __init__(self, command, path):
        self.command, self.path, self.count = command, path, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                *("codir_fast.distillation.distill", "codir_fast.distillation.pretrain"),
                "transformers.models.bert.modeling_bert",
            ]
        )
        self.output = path / "unbroken"
        self.run_to_end(self.output)  # datasets keeps its files from now on
        self.output = path / "again"
        start = time.monotonic()
        self.changes = self.run_to_end(self.output)
        self.seconds = time.monotonic() - start

    def start(self, output, last=NEVER):
        """A run into `output`, from the last checkpoint where there is one."""
        self.count += 1
        report = self.path / f"report-{self.count}"
        arguments = [*self.command, "--output_dir", str(output)]
        if checkpoints(output):
            arguments += ["--resume_from_checkpoint", "True"]
        process = self.context.Process(
            target=killed.run, args=(arguments, str(output), last, str(report))
        )
        process.start()
        return process, report

    def run_to_end(self, output):
        """Returns the number of changes of files."""
        process, report = self.start(output)
        process.join()
        text = report.read_text()
        assert process.exitcode == 0, text
        return int(text.rpartition("changes ")[2])


@pytest.fixture(scope="module", params=["distill", "pretrain"])
def runner(request, folder, corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("kill")
    with pytest.MonkeyPatch.context() as patch:
        # One thread: a process that forks must have no other.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(path / "cache"))
        yield Runner(commands(folder, corpus)[request.param], path)


def assert_whole(output):
    for _, path in checkpoints(output):
        verify(path)


def assert_same_end(output, runner):
    for name in FILES:
        one, other = load_file(output / name), load_file(runner.output / name)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), f"{name} {key}"
    for name in STATES:
        one, other = (tree_bytes(load_tree(at / LAST / name)) for at in (output, runner.output))
        assert one == other, name
    assert log_of(output) == log_of(runner.output)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def log_of(output):
    """What the last checkpoint's log has, less how fast it was."""
    rows = json.loads((output / LAST / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in row.items() if not name.endswith(SPEED)} for row in rows
    ]


def test_two_unbroken_runs_end_bit_equal(runner):
    assert_same_end(runner.path / "unbroken", runner)


@pytest.mark.parametrize("point", range(POINTS // 2))
def test_run_killed_at_a_change_of_files(runner, tmp_path, point):
    """While checkpoints are written, renamed and removed, and the model at the end."""
    last = 1 + int((point + random.Random(point).random()) * runner.changes / (POINTS // 2))
    output = tmp_path / "run"
    process, _ = runner.start(output, last)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_whole(output)
    runner.run_to_end(output)
    assert_whole(output)
    assert_same_end(output, runner)


@pytest.mark.parametrize("point", range(POINTS - POINTS // 2))
def test_run_killed_at_any_time(runner, tmp_path, point):
    """Killed again and again, each time a little later, until it ends by itself."""
    output, draw = tmp_path / "run", random.Random(point)
    seconds = draw.random() * runner.seconds
    for _ in range(20):
        process, report = runner.start(output)
        process.join(seconds)
        process.kill()
        process.join()
        assert_whole(output)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, report.read_text()
        seconds += draw.random() * runner.seconds
    assert process.exitcode == 0
    assert_same_end(output, runner)


@pytest.mark.parametrize("last", [2, 5, 9])
def test_run_killed_before_its_first_checkpoint_starts_anew(runner, tmp_path, last):
    """Without a flag: settings and unfinished files are no work that could be lost."""
    output = tmp_path / "run"
    process, _ = runner.start(output, last)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not checkpoints(output)
    runner.run_to_end(output)
    assert_same_end(output, runner)
