"""Training on several processes: what one process with their batches makes; checkpoints that go on
with another number of them; a process that dies.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from tempfile import NamedTemporaryFile

import pytest
import torch
from ranks import Ranks, free_port
from safetensors.torch import load_file
from tiny import (
    MASKED_VOCABULARY,
    make_masking_tokenizer,
    make_tokenizer,
    tiny_config,
    write_examples,
    write_texts,
)
from transformers import BertForMaskedLM, BertForSequenceClassification, TrainingArguments

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.distillation import output_folder
from codir_fast.distillation.checkpoint import checkpoints
from codir_fast.distillation.output_folder import OutputArguments
from codir_fast.distillation.processes import telling_of_loss
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.trainer import check_arguments, check_banks
from codir_fast.distillation.training_state import load_tree
from codir_fast.errors import LostProcess

STATE = "distillation_state.safetensors"
FILES = ("model.safetensors", STATE)
STEPS = 20
BATCH = 8  # of all processes
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Models without dropout, whose random numbers each process has of its own."""
    path = tmp_path_factory.mktemp("exact")
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_config(**NO_DROPOUT)).save_pretrained(path / "teacher")
    make_tokenizer().save_pretrained(path / "teacher")
    config = tiny_config(vocab_size=MASKED_VOCABULARY, **NO_DROPOUT)
    BertForMaskedLM(config).save_pretrained(path / "mlm")
    make_masking_tokenizer().save_pretrained(path / "mlm")
    write_examples(path / "train.csv", 48, seed=1)
    write_examples(path / "many.csv", 900, seed=1)  # more than are sorted by length at once
    write_examples(path / "validation.csv", 21, seed=2)
    write_texts(path / "texts.txt", 48, seed=1)
    lines = (path / "train.csv").read_text().splitlines()
    numbers = [f"{line.split(',')[0]},{len(line) / 7:.3f}" for line in lines[1:]]
    (path / "numbers.csv").write_text("\n".join(["text,label", *numbers]) + "\n")
    torch.manual_seed(1)
    regression = tiny_config(num_labels=1, problem_type="regression", **NO_DROPOUT)
    BertForSequenceClassification(regression).save_pretrained(path / "regression")
    make_tokenizer().save_pretrained(path / "regression")
    return path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory.mktemp("ranks"))


def flags(**given):
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def distill(exact, output, processes, *, teacher="teacher", train="train.csv", **given):
    defaults = {
        "teacher": exact / teacher,
        "student_layers": 2,
        "train_file": exact / train,
        "output_dir": output,
        "per_device_train_batch_size": BATCH // processes,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "projection_dim": 8,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    chosen = {name: value for name, value in (defaults | given).items() if value is not None}
    return ["distill", *flags(**chosen)]


def pretrain(exact, output, processes, **given):
    arguments = distill(exact, output, processes, teacher="mlm", train="texts.txt", **given)
    return ["pretrain", *arguments[1:]]


def assert_alike(one, other, tolerance=1e-5):
    for name in FILES:
        states = load_file(one / name), load_file(other / name)
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.allclose(
                value.double(), states[1][key].double(), rtol=0, atol=tolerance
            ), f"{name}, {key}: {(value.double() - states[1][key].double()).abs().max()}"


SETTINGS = {
    "paper": {},
    "fidelity": {"preset": "fidelity"},
    "features of a ragged set": {"preset": "fidelity", "max_train_samples": 45, "max_steps": 5},
    "cached teacher": {"preset": "fidelity", "cache_teacher": True},
    "groups of like lengths": {"train": "many.csv", "per_device_train_batch_size": 2},
    "random order": {"train_sampling_strategy": "random"},
    "both sides, positives of the bank": {
        "both_sides": True,
        "positive": "bank",
        "objective": "nce",
        "bank_init": "random",
    },
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "no search for unused parameters": {"ddp_find_unused_parameters": False},
    "PKD alone": {"codir_weight": 0, "pkd_weight": 5, "projection_dim": None},
    "regression": {"teacher": "regression", "train": "numbers.csv"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one_does(exact, ranks, tmp_path, name):
    given = dict(SETTINGS[name])
    if "cache_teacher" in given:
        given["teacher_cache_dir"] = tmp_path / "cache"
    one = {flag: value for flag, value in given.items() if not flag.startswith("ddp_")}
    if "per_device_train_batch_size" in given:
        one["per_device_train_batch_size"] = 2 * given["per_device_train_batch_size"]
    ranks.run_well(distill(exact, tmp_path / "one", 1, **one), 1)
    ranks.run_well(distill(exact, tmp_path / "two", 2, **given), 2)
    assert_alike(tmp_path / "one", tmp_path / "two")


def test_processes_share_a_teacher_cache(exact, ranks, tmp_path):
    given = {"cache_teacher": True, "teacher_cache_dir": tmp_path / "cache", "max_steps": 2}
    ranks.run_well(distill(exact, tmp_path / "two", 2, **given), 2)
    (made,) = (tmp_path / "cache").iterdir()
    written = [path.stat().st_mtime_ns for path in sorted(made.iterdir())]
    ranks.run_well(distill(exact, tmp_path / "one", 1, **given), 1)
    assert [path.stat().st_mtime_ns for path in sorted(made.iterdir())] == written
    assert list((tmp_path / "cache").iterdir()) == [made]


DRAWN = {
    "official": {"preset": "official"},
    "of other labels": {"num_negatives": 7},
    "of all rows": {"num_negatives": 7, "negatives": "all"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_processes_draw_negatives_from_the_whole_bank(exact, ranks, tmp_path, name):
    """The terms go down as they do on one process, whose draws are others."""
    given = {**DRAWN[name], "learning_rate": 5e-3, "logging_steps": STEPS}
    losses = []
    for count in (1, 2):
        output = tmp_path / str(count)
        ranks.run_well(distill(exact, output, count, **given), count)
        losses.append(history(output)[0]["codir"])
        state = load_file(output / STATE)
        assert state["contrast.bank.valid"].all() and len(state["contrast.bank.rows"]) == 48
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_terms_and_scores_are_those_of_all_processes(exact, ranks, tmp_path):
    given = {"validation_file": exact / "validation.csv", "logging_steps": 1, "max_steps": 6}
    logs = []
    for count in (1, 2):
        ranks.run_well(distill(exact, tmp_path / str(count), count, **given), count)
        logs.append(history(tmp_path / str(count)))
    names = ("loss", "ce", "kd", "codir", "eval_loss", "eval_accuracy")
    for one, two in zip(*logs, strict=True):
        for name in names:
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-5), name
    assert {name for line in logs[0] for name in names if name in line} == set(names)


def test_a_run_goes_on_with_another_number_of_processes(exact, ranks, tmp_path):
    """1 -> 2 -> 4 -> 1, in the middle of epochs; no row of the bank is lost."""
    given = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    ranks.run_well(distill(exact, tmp_path / "unbroken", 1, **given), 1)
    given |= {"save_strategy": "steps", "save_steps": 4}
    for processes, last in ((1, 4), (2, 8), (4, 16), (1, STEPS)):
        resume = {"resume_from_checkpoint": True} if last > 4 else {}
        stages = given | resume | {"max_steps": last}
        said = ranks.run_well(distill(exact, tmp_path / "run", processes, **stages), processes)
        if resume:
            assert f"resumed on {processes} processes instead of" in said[0]
            assert not any("resumed" in text or "%|" in text for text in said[1:])
    assert_alike(tmp_path / "unbroken", tmp_path / "run")
    assert load_file(tmp_path / "run" / STATE)["contrast.bank.valid"].all()


def test_with_as_many_processes_a_run_goes_on_bit_equal(folder, ranks, tmp_path):
    """With dropout: each process goes on with its own random numbers."""
    given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "preset": "fidelity"}
    ranks.run_well(distill(folder, tmp_path / "unbroken", 2, **given), 2)
    states = (tmp_path / "unbroken/checkpoint-8").glob("random_state_*.safetensors")
    drawn = [load_tree(path)["python"] for path in states]  # by nothing: as they were seeded
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "unbroken/checkpoint-8", tmp_path / "again/checkpoint-8")
    given["resume_from_checkpoint"] = True
    ranks.run_well(distill(folder, tmp_path / "again", 2, **given), 2)
    assert_alike(tmp_path / "unbroken", tmp_path / "again", tolerance=0)


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_ends_or_hangs_ends_the_others(folder, ranks, tmp_path, with_signal):
    given = {"save_strategy": "steps", "save_steps": 4, "max_steps": 400, "ddp_timeout": 5}
    output = tmp_path / "run"
    moment = str(output / "checkpoint-8")
    start = time.monotonic()
    ended = (1, with_signal, moment)
    results = ranks.run(distill(folder, output, 2, **given), 2, ended=ended)
    assert time.monotonic() - start < 60
    assert results[1][0] == -signal.SIGKILL  # the one that hung, by the test itself
    assert results[0][0] == 1
    said = results[0][1].splitlines()[-1]
    assert "process 0 of 2 could not talk to all others" in said
    assert "--resume_from_checkpoint True goes on from it" in said
    last = max(checkpoints(output))[1]
    step = int(last.name.split("-")[1])
    shutil.copytree(last, tmp_path / "other" / last.name)
    given |= {"max_steps": step + 5, "resume_from_checkpoint": True}
    for name in ("run", "other"):
        ranks.run_well(distill(folder, tmp_path / name, 2, **given), 2)
    assert_alike(output, tmp_path / "other", tolerance=0)


@pytest.mark.parametrize(
    ("processes", "error", "as_lost"),
    [
        (2, "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer", True),
        # Of a collective under way beside the one that ran out of time.
        (2, "Application timeout caused pair closure", True),
        (2, "mat1 and mat2 shapes cannot be multiplied", False),
        (1, "Application timeout caused pair closure", False),
    ],
)
def test_errors_of_connections_are_known(tmp_path, processes, error, as_lost):
    training = argparse.Namespace(
        world_size=processes, process_index=0, ddp_timeout=5, output_dir=str(tmp_path)
    )
    with pytest.raises(RuntimeError, match=re.escape(error)) as raised, telling_of_loss(training):
        raise RuntimeError(error)
    assert isinstance(raised.value, LostProcess) == as_lost


def test_no_process_writes_before_all_have_looked(tmp_path, monkeypatch):
    """One that lists the folder while another makes and removes it would fail."""
    output, seen = tmp_path / "two", []

    def wait(training):
        seen.append(output.stat().st_mtime_ns if output.exists() else None)

    monkeypatch.setattr(output_folder, "wait_for_all", wait)
    training = TrainingArguments(str(output), use_cpu=True)
    output_folder.check_output(training, OutputArguments())
    output.mkdir()
    before = output.stat().st_mtime_ns
    monkeypatch.setattr(output_folder, "TemporaryFile", NamedTemporaryFile)
    output_folder.check_output(training, OutputArguments())
    assert seen[:3] == [None, None, before]
    assert seen[3] > before  # the file that was written there, and removed
    assert not list(output.iterdir())


def test_pretraining_fills_one_queue(exact, ranks, tmp_path):
    given = {"queue_size": 24, "max_steps": 5, "validation_file": exact / "texts.txt"}
    given |= {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 2}
    ranks.run_well(pretrain(exact, tmp_path / "two", 2, **given), 2)
    state = load_file(tmp_path / "two" / STATE)
    assert int(state["contrast.bank.position"]) == (5 * BATCH) % 24
    assert state["contrast.bank.valid"].all()
    given |= {"max_steps": 7, "eval_steps": 7, "resume_from_checkpoint": True}
    ranks.run_well(pretrain(exact, tmp_path / "two", 1, **given), 1)
    state = load_file(tmp_path / "two" / STATE)
    assert int(state["contrast.bank.position"]) == (7 * BATCH) % 24


def test_a_stream_is_read_by_all_processes(exact, ranks, tmp_path):
    given = {"streaming": True, "queue_size": 24, "max_steps": 5}
    ranks.run_well(pretrain(exact, tmp_path / "two", 2, **given), 2)
    assert load_file(tmp_path / "two" / STATE)["contrast.bank.valid"].all()


def test_finetuning_on_two_processes_is_that_of_one(exact, ranks, tmp_path):
    for count in (1, 2):
        given = flags(model_name_or_path=exact / "teacher")
        given += distill(exact, tmp_path / str(count), count)[5:]
        at = given.index("--projection_dim")
        ranks.run_well(["finetune", *given[:at], *given[at + 2 :]], count)
    one, two = (load_file(tmp_path / str(count) / FILES[0]) for count in (1, 2))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"train": "missing.csv"}, "`train_file` must be an existing file"),
        ({"fsdp": "full_shard"}, "`fsdp` needs several processes, torchrun, with a GPU each"),
    ],
)
def test_what_is_refused_is_refused_by_all(exact, ranks, tmp_path, given, told):
    for code, text in ranks.run(distill(exact, tmp_path / "out", 2, **given), 2):
        assert code == 2
        assert told in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_other_ways_to_spread_a_model_are_refused(tmp_path, name):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    setattr(args, name, True)
    with pytest.raises(NotImplementedError, match=f"`{name}` is not built for distillation"):
        check_arguments(args)


def test_a_bank_of_one_process_is_refused_where_several_train():
    teacher = BertForSequenceClassification(tiny_config())
    model = DistillationModel(
        student_from_teacher(teacher, 2), teacher, DistillationConfig(), torch.tensor([0, 1])
    )
    with pytest.raises(ValueError, match=r"`model` must have contrast.bank over all 4 processes"):
        check_banks(model, 4)


def test_torchrun_starts_it(exact, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "codir_fast"]
    command += distill(exact, tmp_path / "two", 2, max_steps=3)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("saved in") == 1  # the first process speaks for all
    settings = json.loads((tmp_path / "two/run.json").read_text())
    assert settings
    assert load_file(tmp_path / "two" / STATE)["contrast.bank.valid"].sum() == 3 * BATCH
