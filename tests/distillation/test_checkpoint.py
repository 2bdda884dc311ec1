"""Checkpoints: whole or not there, without pickle, and enough to go on bit-equal to the unbroken
run.
"""

import json
import pickle
import random
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_trainer import assert_same_state, make_trainer
from tiny import make_tokenizer, tiny_config
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.optimization import Adafactor

from codir_fast.cli import main
from codir_fast.distillation.arguments import training_defaults
from codir_fast.distillation.checkpoint import (
    checkpoints,
    last_whole_checkpoint,
    replaced_files,
    rotate,
    written_checkpoint,
)
from codir_fast.distillation.manifest import DamagedFolder, verify
from codir_fast.distillation.sampling import ResumableTrainer
from codir_fast.distillation.training_state import (
    load_optimizer,
    load_tree,
    random_state,
    save_tree,
    set_random_state,
)
from codir_fast.errors import SaveError, UsageError


def write(directory, **files):
    for name, text in files.items():
        (directory / name).write_text(text)


def make_checkpoint(output, step, text="a"):
    with written_checkpoint(output / f"checkpoint-{step}") as directory:
        write(directory, file=text)
    return output / f"checkpoint-{step}"


# Folders


def test_folder_has_its_name_only_when_it_is_whole(tmp_path):
    final = tmp_path / "run" / "checkpoint-3"
    with written_checkpoint(final) as directory:
        write(directory, one="1")
        assert not final.exists()
    verify(final)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ZeroDivisionError(), KeyError()])
def test_nothing_is_left_of_a_folder_whose_writing_failed(tmp_path, error):
    earlier = make_checkpoint(tmp_path, 3)
    expected = SaveError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised, written_checkpoint(earlier) as directory:
        write(directory, file="other")
        raise error
    verify(earlier)
    assert (earlier / "file").read_text() == "a"
    assert list(tmp_path.iterdir()) == [earlier]
    if expected is SaveError:
        assert "checkpoint-3 can't be written: [Errno 28] No space left" in str(raised.value)
        assert "checkpoint-3 is there, --resume_from_checkpoint True" in str(raised.value)


def test_leftovers_of_a_crash_are_removed_at_the_next_save(tmp_path):
    for name in (".checkpoint-2.unfinished", ".checkpoint-1.discarded", ".files.unfinished"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, half="x")
    (tmp_path / ".mine").mkdir()
    make_checkpoint(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", ".mine"}


def test_checkpoint_takes_the_place_of_one_with_its_name(tmp_path):
    make_checkpoint(tmp_path, 3, "old")
    final = make_checkpoint(tmp_path, 3, "new")
    verify(final)
    assert (final / "file").read_text() == "new" and list(tmp_path.iterdir()) == [final]


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    write(tmp_path, model="old", other="stays")
    with pytest.raises(SaveError, match="can't be written"), replaced_files(tmp_path) as directory:
        write(directory, model="half")
        raise OSError("no")
    assert (tmp_path / "model").read_text() == "old"
    with replaced_files(tmp_path) as directory:
        write(directory, model="new")
        (directory / "below").mkdir()
        write(directory / "below", deep="d")
        assert (tmp_path / "model").read_text() == "old"
    assert (tmp_path / "model").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other", "below"}


def test_last_checkpoint_is_the_one_written_last(tmp_path):
    """Not the one with the largest number: it may be of a run before."""
    for step in (100, 8, 16):
        make_checkpoint(tmp_path, step)
    assert [path.name for _, path in checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-8",
        "checkpoint-16",
    ]
    assert last_whole_checkpoint(tmp_path, print).name == "checkpoint-16"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()

    def left():
        return {int(path.name[11:]) for path in tmp_path.iterdir()}

    rotate(tmp_path, None, None)
    assert left() == {1, 2, 3, 4, 5}
    rotate(tmp_path, 3, str(tmp_path / "x" / ".." / "checkpoint-1"))
    assert left() == {1, 3, 5}
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-1"))
    assert left() == {1, 5}
    rotate(tmp_path, 1, None)
    assert left() == {5}


def test_two_checkpoints_are_kept_unless_a_user_says_otherwise():
    assert training_defaults([])["save_total_limit"] >= 2


# The state of training


def test_tree_comes_back_in_every_bit_and_type(tmp_path):
    shared = torch.randn(3)
    tree = {
        "numbers": [1, -0.0, 0.1 + 0.2, float("inf"), 2**70, True, None, "text"],
        "tuple": (1, (2.5, [])),
        0: {"tensor": torch.randn(2, 3).to(torch.bfloat16), 7: torch.tensor(3)},
        "shared": [shared, shared[:2], nn.Parameter(shared)],
        "strided": torch.randn(3, 4).t(),
    }
    save_tree(tree, tmp_path / "tree.safetensors")
    loaded = load_tree(tmp_path / "tree.safetensors")
    assert_same_tree(tree, loaded)


def assert_same_tree(one, other, name=""):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, dict):
        assert list(one) == list(other), name
        for key, value in one.items():
            assert_same_tree(value, other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert type(one) is type(other) and len(one) == len(other), name
        for key, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_tree(a, b, f"{name}.{key}")
    else:
        assert type(one) is type(other) and repr(one) == repr(other), name


@pytest.mark.parametrize("value", [object(), np.int64(3), b"bytes", {(1, 2): 3}, torch.nn.Linear])
def test_tree_holds_nothing_that_needs_code(tmp_path, value):
    with pytest.raises(TypeError, match="a.b.0 is a .*, which a checkpoint can't hold"):
        save_tree({"a": {"b": [value]}}, tmp_path / "tree.safetensors")


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()

    draw()  # the second value of a Gaussian pair waits in the state
    save_tree(random_state(torch.device("cpu")), tmp_path / "r.safetensors")
    expected = [draw(), draw()]
    set_random_state(load_tree(tmp_path / "r.safetensors"), torch.device("cpu"))
    assert [draw(), draw()] == expected


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "adafactor": lambda p: Adafactor(p, lr=0.1, scale_parameter=False, relative_step=False),
    "torch's adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "first moment": lambda p: Adafactor(p, lr=None, beta1=0.9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_goes_on_bit_equal(tmp_path, kind, dtype):
    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    start = [torch.randn(3, 4, dtype=dtype), torch.randn(5, dtype=dtype)]
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = OPTIMIZERS[kind](parameters)
    for seed in range(3):
        step(parameters, optimizer, seed)
    save_tree(optimizer.state_dict(), tmp_path / "o.safetensors")

    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = OPTIMIZERS[kind](others)
    load_optimizer(resumed, load_tree(tmp_path / "o.safetensors"))
    for seed in range(3, 6):
        step(parameters, optimizer, seed)
        step(others, resumed, seed)
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)
    assert_same_tree(optimizer.state_dict(), resumed.state_dict())


def test_optimizer_of_another_kind_or_shape_is_refused():
    parameters = [nn.Parameter(torch.randn(3, 4))]
    optimizer = OPTIMIZERS["adamw"](parameters)
    parameters[0].grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(ValueError, match="of another kind"):
        load_optimizer(OPTIMIZERS["sgd"](parameters), optimizer.state_dict())
    wrong = optimizer.state_dict()
    wrong["state"][0]["exp_avg"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"exp_avg of the optimizer has shape \(4, 4\)"):
        load_optimizer(optimizer, wrong)


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "sgd"])
def test_state_that_lacks_something_is_refused(kind):
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    optimizer = OPTIMIZERS[kind](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    for number, values in state["state"].items():
        for name in values:
            less = {key: value for key, value in values.items() if key != name}
            for changed in (less, values | {"more": 1}):
                others = state["state"] | {number: changed}
                with pytest.raises(ValueError, match="optimizer"):
                    load_optimizer(OPTIMIZERS[kind](parameters), state | {"state": others})
    load_optimizer(OPTIMIZERS[kind](parameters), state)


def test_parameter_without_a_gradient_has_no_state():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = OPTIMIZERS["adamw"](parameters)
    parameters[1].grad = torch.ones(3)
    optimizer.step()
    resumed = OPTIMIZERS["adamw"](parameters)
    load_optimizer(resumed, optimizer.state_dict())
    assert list(resumed.state_dict()["state"]) == [1]


@pytest.mark.parametrize(
    "kind",
    [
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"),
        *("reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay", "greedy"),
    ],
)
def test_schedule_comes_back(tmp_path, kind):
    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        own = {
            "cosine_with_min_lr": {"min_lr": 0.01},
            "warmup_stable_decay": {"num_decay_steps": 4},
            "greedy": {"smooth": True, "patience": 0},
        }.get(kind)
        return optimizer, get_scheduler(kind, optimizer, 2, 10, own)

    needs_metric = kind in ("reduce_lr_on_plateau", "greedy")
    optimizer, scheduler = make()
    for _ in range(3):
        optimizer.step()
        scheduler.step(*[1.0] * needs_metric)
    save_tree(scheduler.state_dict(), tmp_path / "s.safetensors")
    _, resumed = make()
    state = load_tree(tmp_path / "s.safetensors")
    assert state.keys() == resumed.state_dict().keys()
    resumed.load_state_dict(state)
    assert_same_tree(scheduler.state_dict(), resumed.state_dict())


# Whole runs


def assert_same_run(one, other):
    assert_same_state(one, other)
    for part in ("optimizer", "lr_scheduler"):
        assert_same_tree(getattr(one, part).state_dict(), getattr(other, part).state_dict(), part)
    evaluations = [
        [(row["step"], row["eval_loss"]) for row in run.state.log_history if "eval_loss" in row]
        for run in (one, other)
    ]
    assert evaluations[0] == evaluations[1]
    for name in ("global_step", "epoch", "best_metric", "best_global_step"):
        assert getattr(one.state, name) == getattr(other.state, name), name


STEPS = {"save_strategy": "steps", "per_device_train_batch_size": 10, "max_steps": 13}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "loss"}
RUNS = {
    "shuffled, in the first epoch": (STEPS | {"save_steps": 3}, 3),
    "shuffled, in the second epoch": (STEPS | {"save_steps": 7}, 7),
    "accumulated": (
        STEPS
        | {"save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 5},
        9,
    ),
    "adafactor, cosine": (
        STEPS | {"save_steps": 7, "optim": "adafactor", "lr_scheduler_type": "cosine"},
        7,
    ),
    "evaluated where an epoch ends": (STEPS | {"save_steps": 5, "eval_strategy": "epoch"}, 5),
    "over, in the middle of an epoch": (STEPS | {"save_steps": 13, "eval_strategy": "epoch"}, 13),
    "best": (STEPS | BEST | {"save_steps": 2, "eval_steps": 2, "learning_rate": 0.3}, 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_bit_equal(folder, tmp_path, name):
    settings, step = RUNS[name]
    unbroken = make_trainer(folder, tmp_path / "unbroken", **settings)
    unbroken.train()
    after = random_state(torch.device("cpu"))
    resumed = make_trainer(folder, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{step}"))
    assert_same_run(unbroken, resumed)
    if step < settings["max_steps"]:
        assert_same_tree(after, random_state(torch.device("cpu")))


def test_best_model_is_found_in_a_folder_that_was_moved(folder, tmp_path):
    """By its step: the path in trainer_state.json is not trusted."""
    settings = STEPS | BEST | {"save_steps": 2, "eval_steps": 2, "save_total_limit": 2}
    settings |= {"max_steps": 4, "learning_rate": 0.02}  # so that it gets worse
    make_trainer(folder, tmp_path / "run", **settings).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    resumed = make_trainer(folder, tmp_path / "moved", **settings)
    resumed.train(resume_from_checkpoint=True)
    best = tmp_path / "moved" / "checkpoint-2"
    assert resumed.state.best_model_checkpoint == str(best)
    saved = BertForSequenceClassification.from_pretrained(best).state_dict()
    for name, value in resumed.model.student.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("step", [4, 6], ids=["before it stops", "after"])
def test_early_stopping_counts_on(folder, tmp_path, step):
    def make(name):
        settings = STEPS | BEST | {"save_steps": 2, "eval_steps": 2, "learning_rate": 0.5}
        trainer = make_trainer(folder, tmp_path / name, **settings)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        return trainer

    unbroken = make("unbroken")
    unbroken.train()
    last = unbroken.state.global_step
    assert last == 6 and unbroken.state.best_global_step == 2  # it got worse twice
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{step}"))
    assert_same_run(unbroken, resumed)


def plain_trainer(output, rows=None, options=None, optimizer=None):
    """Of a model of transformers, with or without an optimizer of its user."""
    set_seed(3)
    tokenizer = make_tokenizer()
    model = BertForSequenceClassification(tiny_config())
    arguments = {"max_steps": 9, "save_steps": 7} | (options or {})
    return ResumableTrainer(
        model,
        TrainingArguments(
            str(output),
            per_device_train_batch_size=8,
            save_strategy="steps",
            report_to="none",
            use_cpu=True,
            **arguments,
        ),
        train_dataset=tokenized_rows() if rows is None else rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer and optimizer(model), None),
    )


def tokenized_rows():
    tokenizer = make_tokenizer()
    return [dict(tokenizer(f"w{n % 7} w{n % 3}"), labels=n % 2) for n in range(40)]


class WithoutLength(torch.utils.data.IterableDataset):
    """One that has __len__, and no length, as wrappers of streams have."""

    def __iter__(self):
        return iter(tokenized_rows())

    def __len__(self):
        raise TypeError("a stream has no length")


def test_settings_that_a_run_does_not_use_may_change(tmp_path):
    def own(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    plain_trainer(tmp_path, optimizer=own).train()
    longer = {"learning_rate": 0.5, "weight_decay": 0.1, "max_steps": 11}
    resumed = plain_trainer(tmp_path, options=longer, optimizer=own)
    assert resumed.train(resume_from_checkpoint=True).global_step == 11
    with pytest.raises(UsageError, match="`seed` was 42, and is 1 now"):
        plain_trainer(tmp_path, options=longer | {"seed": 1}, optimizer=own).train(True)


def test_the_same_examples_in_another_kind_of_data_set_may_be_given(tmp_path):
    plain_trainer(tmp_path, rows=Dataset.from_list(tokenized_rows())).train()
    assert plain_trainer(tmp_path, options={"max_steps": 11}).train(True).global_step == 11
    other = Dataset.from_list(tokenized_rows()[::-1])
    with pytest.raises(UsageError, match="the tokens of the training examples are others"):
        plain_trainer(tmp_path / "anew", rows=other).train(str(tmp_path / "checkpoint-7"))
    assert plain_trainer(tmp_path / "stream", rows=WithoutLength()).train().global_step == 9


def test_model_of_transformers_resumes_bit_equal(folder, tmp_path):
    """What finetune trains."""

    unbroken, resumed = (plain_trainer(tmp_path / name) for name in ("unbroken", "resumed"))
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-7"))
    assert_same_run(unbroken, resumed)


def test_nothing_is_pickled_or_unpickled(folder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    for module, name in ((torch, "save"), (torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    settings = STEPS | {"max_steps": 4, "save_steps": 2}
    trainer = make_trainer(folder, tmp_path / "run", **settings)
    trainer.train()
    trainer.save_model()
    make_trainer(folder, tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    arguments = json.loads((tmp_path / "run" / "training_arguments.json").read_text())
    assert arguments["max_steps"] == 4


# What can't be saved


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_32bit", "galore_adamw"])
def test_optimizer_whose_state_has_no_place_is_refused(folder, tmp_path, optim):
    with pytest.raises(UsageError, match="`optim` must be one of .* need --save_strategy no"):
        make_trainer(folder, tmp_path / "out", **STEPS, optim=optim)
    assert make_trainer(folder, tmp_path / "out", save_strategy="no", optim=optim)


def test_given_optimizer_of_another_library_is_refused(folder, tmp_path):
    class Own(torch.optim.SGD):
        pass

    model = make_trainer(folder, tmp_path).model
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="steps")
    given = Own(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="must be of torch.optim .* got Own"):
        ResumableTrainer(model.student, arguments, optimizers=(given, None))


def test_given_optimizer_of_torch_is_taken(folder, tmp_path):
    model = make_trainer(folder, tmp_path).model
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="steps")
    given = torch.optim.Adafactor(model.parameters(), lr=0.1)
    assert ResumableTrainer(model.student, arguments, optimizers=(given, None)).optimizer is given


def test_checkpoint_of_the_model_alone_is_refused(folder, tmp_path):
    settings = STEPS | {"max_steps": 2, "save_steps": 2, "save_only_model": True}
    make_trainer(folder, tmp_path / "run", **settings).train()
    with pytest.raises(UsageError, match="as with --save_only_model"):
        make_trainer(folder, tmp_path / "run", **settings).train(resume_from_checkpoint=True)


# A full disk


@contextmanager
def files_up_to(size):
    """No file may grow beyond `size` bytes: a write is cut short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def command_of(folder, output, steps):
    return [
        *("distill", "--teacher", str(folder / "teacher"), "--student_layers", "2"),
        *("--train_file", str(folder / "train.csv"), "--output_dir", str(output), "--use_cpu"),
        *("--save_strategy", "steps", "--save_steps", "2", "--max_steps", str(steps)),
    ]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# The sizes that no file may exceed: less than the weights, and than the optimizer's state.
@pytest.mark.parametrize("size", [20_000, 60_000])
def test_full_disk_leaves_the_earlier_checkpoint(folder, tmp_path, capsys, size):
    output = tmp_path / "out"
    assert main(command_of(folder, output, 2)) == 0
    before = contents(output)
    capsys.readouterr()
    with files_up_to(size):
        resume = ["--resume_from_checkpoint", "True"]
        assert main([*command_of(folder, output, 4), *resume]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codir-fast: error: ") and "checkpoint-4 can't be written" in error
    assert "checkpoint-2 is there, --resume_from_checkpoint True goes on from it" in error
    assert "File too large" in error
    after = contents(output)
    assert {path for path in after if after[path] != before.get(path)} <= {output / "run.json"}
    assert after.keys() == before.keys()
    assert main([*command_of(folder, output, 4), "--resume_from_checkpoint", "True"]) == 0
    verify(output / "checkpoint-4")


def test_full_disk_leaves_the_saved_model(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trainer.save_model()
    before = contents(tmp_path)
    with torch.no_grad():
        for parameter in trainer.model.student.parameters():
            parameter.add_(1)
    with files_up_to(20_000), pytest.raises(SaveError, match="File too large"):
        trainer.save_model()
    assert contents(tmp_path) == before


def test_damage_says_what_differs(tmp_path):
    path = make_checkpoint(tmp_path, 1, "text")
    write(path, file="tex")
    with pytest.raises(DamagedFolder, match="file has 3 bytes, 4 were written"):
        verify(path)
    write(path, file="tixt")
    with pytest.raises(DamagedFolder, match="file is not as it was written"):
        verify(path)
