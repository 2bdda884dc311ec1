"""DistillationTrainer: exact repetition and resume, bank updates, checkpoints others load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tokenizer, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from codir_fast import DistillationConfig, DistillationModel, DistillationTrainer
from codir_fast.distillation.arguments import DataArguments
from codir_fast.distillation.checkpoint import written_checkpoint
from codir_fast.distillation.config import PRESETS
from codir_fast.distillation.data import load_examples, tokenize
from codir_fast.distillation.labels import read_labels
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.trainer import STATE_FILE, load_checkpoint

STEPS = 6


def make_trainer(folder, output, *, config=None, dropout=True, **training):
    set_seed(5)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    if not dropout:
        teacher.config.hidden_dropout_prob = teacher.config.attention_probs_dropout_prob = 0.0
    tokenizer = make_tokenizer()
    examples, _ = load_examples(DataArguments(train_file=str(folder / "train.csv")), seed=0)
    labels = read_labels(examples, "train_file", teacher.config)
    model = DistillationModel(
        student_from_teacher(teacher, 2),
        teacher,
        config or DistillationConfig(projection_dim=8),
        torch.tensor(labels),
    )
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
    }
    tokens = tokenize(examples, tokenizer, labels, 16)
    return DistillationTrainer(
        model,
        TrainingArguments(str(output), **(defaults | training)),
        train_dataset=tokens,
        eval_dataset=tokens,
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=16),
        processing_class=tokenizer,
    )


def assert_same_state(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_two_runs_with_one_seed_are_bit_equal(folder, tmp_path):
    runs = []
    for name in ("a", "b"):
        runs.append(make_trainer(folder, tmp_path / name))  # seeds
        runs[-1].train()
    assert_same_state(*runs)
    assert runs[0].model.contrast.bank.valid.all()  # 6 steps of 8 are the 48 examples


@pytest.mark.parametrize(
    "settings",
    [{}, {"codir_weight": 0.0, "pkd_weight": 1.0}, PRESETS["official"], PRESETS["fidelity"]],
    ids=["paper", "pkd", "official", "fidelity"],
)
def test_resumed_run_is_bit_equal_to_the_unbroken_one(folder, tmp_path, settings):
    config = DistillationConfig(projection_dim=8, **settings)
    unbroken = make_trainer(folder, tmp_path / "unbroken", config=config, max_steps=10)
    unbroken.train()
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "config": config}
    broken = make_trainer(folder, tmp_path / "broken", **saving)
    broken.train()
    resumed = make_trainer(folder, tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert resumed.state.global_step == 10
    assert_same_state(unbroken, resumed)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("checkpoint", [4, 8, 12])
def test_run_grouped_by_length_resumes_exactly_in_any_epoch(folder, tmp_path, pieces, checkpoint):
    settings = {
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 10 // pieces,  # 5 steps an epoch, the last one smaller
        "gradient_accumulation_steps": pieces,
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    unbroken = make_trainer(folder, tmp_path / "unbroken", **settings)
    unbroken.train()
    resumed = make_trainer(folder, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{checkpoint}"))
    assert_same_state(unbroken, resumed)


def test_order_grouped_by_length_changes_with_epoch_and_seed(folder, tmp_path):
    def order(epoch, **settings):
        trainer = make_trainer(
            folder, tmp_path, train_sampling_strategy="group_by_length", **settings
        )
        trainer.state.epoch = epoch
        return list(trainer._get_train_sampler())

    first = order(0)
    assert sorted(first) == list(range(48))
    assert order(0) == first == order(0.9)
    assert order(1) != first and order(0, seed=6) != first and order(0, data_seed=6) != first


def test_accumulated_batches_update_the_bank_as_the_large_batch(folder, tmp_path):
    runs = [
        make_trainer(
            folder,
            tmp_path / name,
            dropout=False,
            max_steps=3,
            per_device_train_batch_size=8 // pieces,
            gradient_accumulation_steps=pieces,
        )
        for name, pieces in (("large", 1), ("accumulated", 2))
    ]
    for run in runs:
        run.train()
    large, accumulated = (run.model.contrast.bank for run in runs)
    assert torch.equal(large.valid, accumulated.valid)
    torch.testing.assert_close(large.rows, accumulated.rows, rtol=1e-3, atol=1e-4)


def test_log_has_every_term(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS // 2
    for row in rows:
        weighted = 0.1 * row["ce"] + 0.9 * row["kd"] + 0.1 * row["codir"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-3)


def test_saved_student_loads_without_codir_fast(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path / "run")
    trainer.train()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", STATE_FILE} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    program = """
import sys
sys.modules["codir_fast"] = None  # importing it would fail
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, report = AutoModelForSequenceClassification.from_pretrained(
    sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 w3", return_tensors="pt")
print(model(**tokens).logits.tolist())
"""
    loaded = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    tokens = make_tokenizer()("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        logits = trainer.model.student.eval()(**tokens).logits
    assert loaded.stdout.strip() == str(logits.tolist())


def test_best_model_is_loaded_at_the_end(folder, tmp_path):
    trainer = make_trainer(
        folder,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,  # so that it gets worse
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = BertForSequenceClassification.from_pretrained(best).state_dict()
    for name, value in trainer.model.student.state_dict().items():
        assert torch.equal(value, saved[name]), name
    state = load_file(best / STATE_FILE)
    assert torch.equal(trainer.model.contrast.bank.rows, state["contrast.bank.rows"])


def test_checkpoint_of_something_else_is_refused(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path / "run")
    with written_checkpoint(tmp_path / "other") as other:
        BertForSequenceClassification(tiny_config()).save_pretrained(other)
        trainer.state.save_to_json(other / "trainer_state.json")
    with pytest.raises(ValueError, match=f"has no {STATE_FILE}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"projection_dim": 16}, "does not fit this run"),
        ({"codir_weight": 0.0}, "`codir_weight` was 0.1, and can't become 0.0"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(folder, tmp_path, other, message):
    trainer = make_trainer(folder, tmp_path / "run")
    trainer.save_model(str(tmp_path / "checkpoint"))
    config = DistillationConfig(**({"projection_dim": 8} | other))
    changed = make_trainer(folder, tmp_path / "changed", config=config)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(changed.model, tmp_path / "checkpoint")


def test_several_gpus_in_one_process_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="needs one GPU per process.*got 2 GPUs"):
        make_trainer(folder, tmp_path)


def test_model_must_be_a_distillation_model(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a DistillationModel"):
        DistillationTrainer(torch.nn.Linear(2, 2), TrainingArguments(str(tmp_path)))
