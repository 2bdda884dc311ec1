"""What transformers.Trainer offers holds for finetune and distill: progress, trackers, evaluation,
early stopping, precision, checkpointing of activations, determinism, batches of like lengths.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
from test_trainer import assert_same_state, make_trainer
from tiny import tiny_config
from transformers import BertForSequenceClassification

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.cli import main
from codir_fast.distillation.trainer import DistillationTrainer

FAST = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu"]
TERMS = ("loss", "ce", "kd", "codir", "pkd")
DETERMINISM = (
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "ASCEND_LAUNCH_BLOCKING",
    "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)
BEST = ["--load_best_model_at_end", "True", "--learning_rate", "0"]  # no evaluation is better


def run(command, folder, output, *flags):
    models = {
        "finetune": ["--model_name_or_path", str(folder / "teacher")],
        "distill": ["--teacher", str(folder / "teacher"), "--student_layers", "2"],
    }[command]
    files = ["--train_file", str(folder / "train.csv")]
    files += ["--validation_file", str(folder / "validation.csv"), "--output_dir", str(output)]
    return main([command, *models, *files, *FAST, *flags])


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_progress_shows_every_term(folder, tmp_path, capsys):
    flags = ["--pkd_weight", "0.5", "--logging_steps", "1"]
    assert run("distill", folder, tmp_path / "out", *flags) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("{'loss'")]
    assert len(lines) == 3
    for line, row in zip(lines, log_of(tmp_path / "out"), strict=False):
        for term in TERMS:
            assert f"'{term}': '{row[term]:.4g}'" in line
    assert re.search(r"100%\|█+\| 3/3 \[", shown.err)


def test_tensorboard_has_every_term(folder, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--pkd_weight", "0.5", "--logging_steps", "1", "--report_to", "tensorboard"]
    assert run("distill", folder, tmp_path, *flags) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    history = log_of(tmp_path)
    for term in TERMS:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{term}")]
        logged = [(row["step"], row[term]) for row in history if term in row]
        assert written == [(step, pytest.approx(value)) for step, value in logged]
        assert len(written) == 3
    accuracies = [row["eval_accuracy"] for row in history if "eval_accuracy" in row]
    written = [event.value for event in events.Scalars("eval/accuracy")]
    assert written == pytest.approx(accuracies) and written


def test_evaluation_changes_nothing_of_the_training(folder, tmp_path):
    without = make_trainer(folder, tmp_path / "without")  # seeds
    without.train()
    evaluated = make_trainer(folder, tmp_path / "with", eval_strategy="steps", eval_steps=2)
    evaluated.train()
    assert_same_state(without, evaluated)
    assert [row["step"] for row in evaluated.state.log_history if "eval_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_early_stopping(command, folder, tmp_path):
    flags = [*BEST, "--num_train_epochs", "9", "--early_stopping_patience", "2"]
    assert run(command, folder, tmp_path, *flags) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["epoch"] == 3 and state["best_global_step"] == 3  # 3 steps an epoch


def test_threshold_is_the_least_change_that_counts(folder, tmp_path):
    # What it has learnt by heart gets better each time, but not by so much.
    flags = [*BEST, "--learning_rate", "1e-3", "--num_train_epochs", "4"]
    flags += ["--validation_file", str(folder / "train.csv")]
    stopping = ["--early_stopping_patience", "1", "--early_stopping_threshold"]
    for threshold, epochs in (("0.0", 4), ("0.5", 2)):
        output = tmp_path / threshold
        assert run("finetune", folder, output, *flags, *stopping, threshold) == 0
        history = log_of(output)
        losses = [row["eval_loss"] for row in history if "eval_loss" in row][:epochs]
        assert losses == sorted(losses, reverse=True)
        assert history[-1]["epoch"] == epochs


def test_run_that_had_stopped_goes_on_where_nothing_would_stop_it(folder, tmp_path):
    flags = [*BEST, "--num_train_epochs", "4"]
    assert run("distill", folder, tmp_path, *flags, "--early_stopping_patience", "1") == 0
    assert log_of(tmp_path)[-1]["epoch"] == 2
    resume = ["--resume_from_checkpoint", "True"]
    assert run("distill", folder, tmp_path, *flags, *resume) == 0
    assert log_of(tmp_path)[-1]["epoch"] == 4


@pytest.mark.parametrize("size", ["16", "64"])
@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_an_evaluation_leaves_nothing_out(command, size, folder, tmp_path, monkeypatch):
    """dataloader_drop_last is of training; the features are standardised over all examples."""
    fitted, seen = DistillationModel.fit_features, []

    def count(self, batches):
        batches = list(batches)
        seen.append(sum(len(batch["labels"]) for batch in batches))
        fitted(self, batches)

    monkeypatch.setattr(DistillationModel, "fit_features", count)
    flags = ["--dataloader_drop_last", "True", "--per_device_eval_batch_size", size]
    more = ["--preset", "fidelity"] if command == "distill" else []
    assert run(command, folder, tmp_path, *flags, *more) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_accuracy"] * 20 == pytest.approx(round(metrics["eval_accuracy"] * 20))
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(
        20, rel=0.05
    )
    assert seen == [48] * (command == "distill")


def test_persistent_workers_evaluate_on_the_validation_file(folder, tmp_path):
    """Features are fitted on the training examples before, with workers of their own."""
    kept = []
    for workers in ("0", "1"):
        flags = ["--preset", "fidelity", "--dataloader_num_workers", workers]
        if workers == "1":
            flags += ["--dataloader_persistent_workers", "True"]
            flags += ["--dataloader_multiprocessing_context", "fork"]
        output = tmp_path / workers
        assert run("distill", folder, output, *flags) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        kept.append({name: metrics[name] for name in ("eval_loss", "eval_accuracy")})
    assert kept[0] == pytest.approx(kept[1], rel=1e-5)


def test_terms_are_summed_in_the_order_of_the_model(folder, tmp_path):
    """Ranks add them up by place, and a set's order differs between processes."""
    config = DistillationConfig(projection_dim=8, pkd_weight=0.5)
    trainer = make_trainer(folder, tmp_path, config=config)
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    terms = [name for name in outputs if name not in ("loss", "logits")]
    assert list(trainer._sums) == terms and set(terms) == {"ce", "kd", "codir", "pkd"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--pooling", "max"], "`pooling` was mean, and is max now"),
        (["--layer_mapping", "1:1,2:3"], "`layer_mapping` was uniform, and is 1:1,2:3 now"),
        (["--standardize_features", "True"], "`standardize_features` was False, and is True now"),
        (["--head_init", "equal"], "`head_init` was apart, and is equal now"),
        (["--bank_init", "random"], "`bank_init` was empty, and is random now"),
        (["--temperature", "0.5"], "`temperature` was 0.07, and is 0.5 now"),
        (["--teacher", "FOLDER/other"], "the teacher is another one"),
        (["--max_seq_length", "6"], "others: of other texts, or another `max_seq_length`"),
        (["--learning_rate", "0.5"], "`learning_rate` was 0.0001, and is 0.5 now"),
        (["--adam_beta2", "0.9"], "`adam_beta2` was 0.999, and is 0.9 now"),
        (["--lr_scheduler_type", "cosine"], "`lr_scheduler_type` was linear, and is cosine now"),
        (["--seed", "1"], "`seed` was 42, and is 1 now"),
        (
            ["--per_device_train_batch_size", "8"],
            "the batch size of all processes was 16, and is 8 now",
        ),
        (
            ["--gradient_accumulation_steps", "2"],
            "`gradient_accumulation_steps` was 1, and is 2 now",
        ),
    ],
)
def test_resume_with_other_settings_is_refused(changed, message, folder, tmp_path, capsys):
    assert run("distill", folder, tmp_path) == 0
    before = (tmp_path / "run.json").read_bytes()
    if "--teacher" in changed:
        torch.manual_seed(5)
        shutil.copytree(folder / "teacher", tmp_path / "other")
        BertForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "other")
        changed = [part.replace("FOLDER", str(tmp_path)) for part in changed]
    resume = ["--num_train_epochs", "2", "--resume_from_checkpoint", "True", *changed]
    assert run("distill", folder, tmp_path, *resume) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before


def test_resume_with_other_examples_is_refused(folder, tmp_path, capsys):
    """Without a bank, which would have other rows."""
    no_bank = ["--codir_weight", "0"]
    assert run("distill", folder, tmp_path, *no_bank) == 0
    resume = [*no_bank, "--num_train_epochs", "2", "--resume_from_checkpoint", "True"]
    assert run("distill", folder, tmp_path, *resume, "--max_train_samples", "20") == 2
    assert "the number of training examples was " in capsys.readouterr().err
    # At no place among them, it may.
    more = ["--max_train_samples", "20", "--ignore_data_skip", "True"]
    assert run("distill", folder, tmp_path, *resume, *more) == 0


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_run_whose_weights_are_no_numbers_saves_nothing(command, folder, tmp_path, capsys):
    steps = ["--save_strategy", "steps", "--save_steps", "3", "--max_grad_norm", "0"]
    steps += ["--lr_scheduler_type", "constant", "--learning_rate", "1e9", "--weight_decay", "1e9"]
    assert run(command, folder, tmp_path, *steps) == 1
    error = capsys.readouterr().err
    assert "training diverged: " in error and "is not finite after step 3; start anew" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_resumed_run_saves_and_logs_as_it_is_told_now(folder, tmp_path):
    first = ["--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "3"]
    then = ["--save_strategy", "steps", "--save_steps", "5", "--logging_steps", "1"]
    then += ["--num_train_epochs", "2", "--resume_from_checkpoint", "True"]
    assert run("distill", folder, tmp_path, *first) == 0
    assert run("distill", folder, tmp_path, *then) == 0
    assert (tmp_path / "checkpoint-5").is_dir()
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [3, 4, 5, 6]


def test_rebalanced_batches_are_drawn_by_the_seed(folder, tmp_path):
    orders = []
    for seed in (1, 1, 2):
        options = {"train_sampling_strategy": "batch_rebalance", "data_seed": seed}
        trainer = make_trainer(folder, tmp_path, **options)
        orders.append([batch["index"].tolist() for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("first", "epochs"), [(["--early_stopping_patience", "3"], 4), ([], 5)])
def test_resumed_run_goes_on_counting(first, epochs, folder, tmp_path):
    """Three evaluations without a better one end it: the one of the second epoch counts, where the
    first run counted at all.
    """
    both = [*BEST, "--save_total_limit", "2"]
    assert run("distill", folder, tmp_path, *both, "--num_train_epochs", "2", *first) == 0
    flags = [*both, "--num_train_epochs", "9", "--resume_from_checkpoint", "True"]
    assert run("distill", folder, tmp_path, *flags, "--early_stopping_patience", "3") == 0
    assert log_of(tmp_path)[-1]["epoch"] == epochs


ERRORS = {
    "no best model": (["--early_stopping_patience", "2"], "needs --load_best_model_at_end True"),
    "no patience": (
        ["--early_stopping_patience", "0", *BEST],
        "`early_stopping_patience` must be at least 1, got 0",
    ),
    "no evaluation": (
        [*BEST, "--early_stopping_patience", "2", "--eval_strategy", "no"]
        + ["--save_strategy", "best"],
        "`early_stopping_patience` needs evaluations, got `eval_strategy` no",
    ),
    "evaluations that do not match": (
        [*BEST, "--early_stopping_patience", "2", "--eval_strategy", "no"],
        "--load_best_model_at_end requires the save and eval strategy to match",
    ),
    "threshold alone": (
        ["--early_stopping_threshold", "0.1", *BEST],
        "`early_stopping_threshold` needs `early_stopping_patience`",
    ),
    "threshold nan": (
        ["--early_stopping_patience", "2", "--early_stopping_threshold", "nan", *BEST],
        "`early_stopping_threshold` must be 0 or more and finite, got nan",
    ),
    "unknown metric": (
        [*BEST, "--metric_for_best_model", "f1"],
        "`metric_for_best_model` must be one of loss, accuracy, got 'f1'",
    ),
    "unknown tracker": (["--report_to", "paper"], "`report_to` must be none, all or of "),
    "absent tracker": (["--report_to", "comet_ml"], "`report_to` comet_ml needs the package of"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_before_anything_is_written(name, folder, tmp_path, capsys):
    flags, message = ERRORS[name]
    for command in ("finetune", "distill"):
        assert run(command, folder, tmp_path / "out", *flags) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_best_model_by_accuracy_is_the_one_saved(folder, tmp_path):
    flags = ["--num_train_epochs", "4", "--learning_rate", "0.05"]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "accuracy"]
    assert run("distill", folder, tmp_path, *flags, "--save_total_limit", "9") == 0
    seen = {row["step"]: row["eval_accuracy"] for row in log_of(tmp_path) if "eval_loss" in row}
    best = max(seen, key=lambda step: (seen[step], -step))
    assert len(set(seen.values())) > 1 and best != max(seen)
    for name in ("model.safetensors", "distillation_state.safetensors"):
        saved = (tmp_path / f"checkpoint-{best}" / name).read_bytes()
        assert (tmp_path / name).read_bytes() == saved
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_accuracy"] == seen[best]


def test_best_perplexity_is_the_lowest(corpus, tmp_path):
    flags = ["--student", str(corpus / "mlm"), "--train_file", str(corpus / "texts.txt")]
    flags += ["--validation_split", "0.2", "--output_dir", str(tmp_path), *FAST]
    flags += ["--num_train_epochs", "4", "--learning_rate", "0.01"]
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "perplexity"]
    assert main(["pretrain", *flags, *best]) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    seen = [row["eval_perplexity"] for row in state["log_history"] if "eval_perplexity" in row]
    assert state["best_metric"] == min(seen) < max(seen)


def test_bf16_runs_the_models_in_it_and_keeps_weights_and_bank(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, bf16=True)
    seen = set()
    for side in (trainer.model.student, trainer.model.teacher):
        side.classifier.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    rows = trainer.model.contrast.bank.rows
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_accumulated_loss_is_the_weighted_sum_of_the_logged_terms(folder, tmp_path):
    pieces = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(folder, tmp_path, **pieces)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        weighted = 0.1 * row["ce"] + 0.9 * row["kd"] + 0.1 * row["codir"]
        assert row["loss"] == pytest.approx(weighted, rel=1e-3)


def test_gradient_checkpointing_gives_the_same_weights(folder, tmp_path):
    """Dropout included: the second forward pass of a layer draws what the first drew."""
    trainers, calls = [], []
    config = DistillationConfig(projection_dim=8, pkd_weight=0.5)
    for name, is_on in (("off", False), ("on", True)):
        trainer = make_trainer(folder, tmp_path / name, config=config, gradient_checkpointing=is_on)
        count = []
        attention = trainer.model.student.bert.encoder.layer[0].attention
        attention.register_forward_hook(lambda *_, count=count: count.append(1))
        trainer.train()
        trainers.append(trainer)
        calls.append(len(count))
    assert calls == [6, 12]
    assert_same_state(*trainers)


@pytest.fixture
def restored_determinism(monkeypatch):
    """Full determinism is a state of the process: it ends with the test."""
    for name in DETERMINISM:
        monkeypatch.setenv(name, "")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_full_determinism_and_seed(folder, tmp_path, restored_determinism):
    def weights(name, seed):
        output = tmp_path / name
        flags = ["--full_determinism", "True", "--seed", seed, "--preset", "official"]
        assert run("distill", folder, output, *flags) == 0
        assert torch.are_deterministic_algorithms_enabled()
        names = ("model.safetensors", "distillation_state.safetensors")
        return [(output / name).read_bytes() for name in names]

    first = weights("first", "7")
    assert weights("again", "7") == first
    other = weights("other", "8")
    assert all(one != two for one, two in zip(other, first, strict=True))


def test_batches_are_of_like_lengths_by_default(folder, tmp_path, monkeypatch):
    def padding(name, *flags):
        """Share of the tokens that are padding, in the batches of a run."""
        masks = []
        step = transformers.Trainer.training_step

        def seen(self, model, inputs, *args, **kwargs):
            masks.append(inputs["attention_mask"])
            return step(self, model, inputs, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(transformers.Trainer, "training_step", seen)
            small = ["--per_device_train_batch_size", "4"]
            assert run("distill", folder, tmp_path / name, *small, *flags) == 0
        real = sum(int(mask.sum()) for mask in masks)
        return 1 - real / sum(mask.numel() for mask in masks)

    grouped = padding("grouped")
    scattered = padding("random", "--train_sampling_strategy", "random")
    assert grouped < 0.7 * scattered


def test_run_that_ended_before_its_first_checkpoint_starts_anew(folder, tmp_path, capsys):
    """Its log for TensorBoard is no work that could be lost; anything else is."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    output = tmp_path / "out"
    flags = ["--report_to", "tensorboard", "--logging_steps", "1"]
    ended = ["--save_strategy", "steps", "--save_steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_save_checkpoint", _interrupt)
        assert run("distill", folder, output, *flags, *ended) == 130
    assert sorted(path.name for path in output.iterdir()) == ["run.json", "runs"]
    (output / ".checkpoint-1.unfinished").mkdir()

    assert run("distill", folder, output, "--resume_from_checkpoint", "True") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "`resume_from_checkpoint` found no checkpoint in" in told
    assert told.endswith("; leave it out to start anew")

    (output / "runs" / "notes.txt").write_text("mine")
    assert run("distill", folder, output, *flags) == 2
    assert "`output_dir` must be empty" in capsys.readouterr().err
    (output / "runs" / "notes.txt").unlink()
    assert run("distill", folder, output, *flags) == 0
    assert (output / "model.safetensors").is_file()


def _interrupt(*args):
    raise KeyboardInterrupt


def test_a_mistake_of_the_program_can_be_found(folder, tmp_path, capsys, monkeypatch):
    """What looks like bad input is one line, and where it is wanted its traceback comes first."""

    def broken(*args, **kwargs):
        raise ValueError("x must be positive")

    monkeypatch.setattr("codir_fast.distillation.distill.DistillationTrainer", broken)
    assert run("distill", folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].endswith("codir-fast: error: distill: x must be positive")
    monkeypatch.setenv("CODIR_FAST_TRACEBACK", "1")
    assert run("distill", folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "in broken\n" in error and "ValueError: x must be positive" in error
    assert error.splitlines()[-1] == "codir-fast: error: distill: x must be positive"
