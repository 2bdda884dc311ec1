"""Regression: float labels from finetune to evaluate, its loss terms, bins and correlations."""

import csv
import json
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, make_tokenizer, tiny_config
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers.trainer_utils import EvalPrediction

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.cli import main
from codir_fast.distillation.data import read_file
from codir_fast.distillation.metrics import RegressionScores, output_scores, pearson
from codir_fast.distillation.objectives import middle_ranks, quantile_bins
from codir_fast.distillation.student import student_from_teacher
from codir_fast.distillation.study import classify
from codir_fast.distillation.study_plan import Study
from codir_fast.errors import UsageError

FAST = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16", "--use_cpu"]
SCORES = {"mse", "pearson", "spearman"}


def write_scores(path, count, seed, kind=float):
    """The label counts the words among the first ten; as a float it is a third of that."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randint(3, 9))
            found = sum(word in WORDS[:10] for word in words)
            writer.writerow([" ".join(words), found / 3 if kind is float else found])
    return path


@pytest.fixture(scope="module")
def scored(folder, tmp_path_factory):
    """train.csv, validation.csv and a teacher that was fine-tuned on them by the command line."""
    path = tmp_path_factory.mktemp("scored")
    write_scores(path / "train.csv", 48, seed=1)
    write_scores(path / "validation.csv", 20, seed=2)
    assert main(["finetune", *encoder(folder), *data(path), *FAST, *output(path / "teacher")]) == 0
    return path


def encoder(folder):
    return ["--model_name_or_path", str(folder / "teacher"), "--learning_rate", "1e-2"]


def data(path):
    files = ["--train_file", str(path / "train.csv")]
    return [*files, "--validation_file", str(path / "validation.csv")]


def output(path):
    return ["--output_dir", str(path)]


def outputs_of(model, path):
    """Outputs and labels of the examples in a file, by the library alone."""
    model = AutoModelForSequenceClassification.from_pretrained(model).eval()
    examples = read_file("test_file", str(path))
    tokens = make_tokenizer()(list(examples["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens).logits[:, 0]
    return found.double().numpy(), numpy.array(examples["label"], dtype=float)


def expected_scores(found, labels):
    ranks = [[(side < v).sum() + (side == v).sum() / 2 for v in side] for side in (found, labels)]
    return {
        "mse": ((found - labels) ** 2).mean(),
        "pearson": numpy.corrcoef(found, labels)[0, 1],
        "spearman": numpy.corrcoef(*ranks)[0, 1],
    }


def test_float_labels_make_a_model_of_regression(scored):
    config = json.loads((scored / "teacher" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert len(config["id2label"]) == len(config["label2id"]) == 1
    metrics = json.loads((scored / "teacher" / "metrics.json").read_text())
    expected = expected_scores(*outputs_of(scored / "teacher", scored / "validation.csv"))
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(expected["mse"], rel=1e-4)
    assert "eval_accuracy" not in metrics


def test_distill_and_evaluate(scored, tmp_path, capsys):
    teacher, student = str(scored / "teacher"), tmp_path / "student"
    command = ["distill", "--teacher", teacher, "--student_layers", "2", "--logging_steps", "1"]
    assert main([*command, *data(scored), *FAST, *output(student), "--label_bins", "4"]) == 0
    assert "validation pearson" in capsys.readouterr().err
    metrics = json.loads((student / "metrics.json").read_text())
    expected = expected_scores(*outputs_of(student, scored / "validation.csv"))
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4)
    history = json.loads((student / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "codir" in row]
    assert all(0 < row[name] < 100 for row in rows[1:] for name in ("ce", "kd", "codir"))
    # 4 bins of 48 examples, as far as equal labels allow
    classes = load_file(student / "distillation_state.safetensors")["contrast.bank.row_labels"]
    assert sorted(classes.unique().tolist()) == [0, 1, 2, 3]

    command = ["evaluate", "--model_name_or_path", str(student), "--teacher", teacher]
    assert main([*command, "--test_file", str(scored / "validation.csv"), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    beside = {"mse_to_teacher", "pearson_to_teacher"}
    assert set(result) == SCORES | beside | {"n", "loss", "milliseconds_per_sentence"}
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4)
    assert result["loss"] == pytest.approx(result["mse"]) and result["n"] == 20
    ours, theirs = (
        outputs_of(side, scored / "validation.csv")[0] for side in (student, scored / "teacher")
    )
    assert result["mse_to_teacher"] == pytest.approx(((ours - theirs) ** 2).mean(), rel=1e-3)
    correlation = numpy.corrcoef(ours, theirs)[0, 1]
    assert result["pearson_to_teacher"] == pytest.approx(correlation, abs=1e-4)


def test_teacher_and_student_learn_to_count(folder, tmp_path):
    write_scores(tmp_path / "train.csv", 150, seed=5)
    write_scores(tmp_path / "validation.csv", 60, seed=6)
    flags = [*data(tmp_path), *FAST, "--num_train_epochs", "10", "--eval_strategy", "no"]
    flags += ["--save_strategy", "no", "--learning_rate", "5e-3"]
    teacher = tmp_path / "teacher"
    command = ["finetune", "--model_name_or_path", str(folder / "teacher"), *flags]
    assert main([*command, *output(teacher)]) == 0
    command = ["distill", "--teacher", str(teacher), "--student_layers", "2", *flags]
    assert main([*command, *output(tmp_path / "student")]) == 0
    for name in ("teacher", "student"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["eval_pearson"] > 0.8 and metrics["eval_spearman"] > 0.8


def test_integer_labels_with_problem_type(folder, tmp_path):
    write_scores(tmp_path / "train.csv", 32, seed=3, kind=int)
    files = ["--train_file", str(tmp_path / "train.csv"), "--validation_split", "0.25"]
    command = ["finetune", *encoder(folder), *files, *FAST]
    teacher = tmp_path / "teacher"
    assert main([*command, "--problem_type", "regression", *output(teacher)]) == 0
    assert {name[5:] for name in json.loads((teacher / "metrics.json").read_text())} >= SCORES
    command = ["distill", "--teacher", str(teacher), "--student_layers", "2", *files, *FAST]
    assert main([*command, *output(tmp_path / "student")]) == 0
    # A model of regression is no obstacle to classes, nor the other way round.
    command = ["finetune", "--model_name_or_path", str(teacher), *files, *FAST]
    assert main([*command, *output(tmp_path / "classes")]) == 0
    config = json.loads((tmp_path / "classes" / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert "eval_accuracy" in json.loads((tmp_path / "classes" / "metrics.json").read_text())
    command = ["finetune", "--model_name_or_path", str(tmp_path / "classes"), *files, *FAST]
    assert main([*command, "--problem_type", "regression", *output(tmp_path / "numbers")]) == 0
    config = json.loads((tmp_path / "numbers" / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "LABEL_0"}


def test_best_model_has_the_least_error(folder, scored, tmp_path):
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "mse"]
    flags = ["--num_train_epochs", "4", "--learning_rate", "0.3", "--save_total_limit", "1"]
    command = ["finetune", *encoder(folder), *data(scored), *FAST, *flags, *best]
    assert main([*command, *output(tmp_path / "out")]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    errors = [row["eval_mse"] for row in state["log_history"] if "eval_mse" in row][:4]
    assert state["best_metric"] == min(errors) < max(errors)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_mse"] == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [["--bf16", "True"], ["--batch_eval_metrics", "True"], ["--eval_do_concat_batches", "False"]],
    ids=lambda flags: flags[0],
)
def test_flags_of_training_arguments_work(flags, folder, scored, tmp_path):
    flags = [*data(scored), *FAST, "--per_device_eval_batch_size", "8", *flags]
    models = ["--teacher", str(scored / "teacher"), "--student_layers", "2"]
    for command in (["finetune", *encoder(folder)], ["distill", *models]):
        assert main([*command, *flags, *output(tmp_path / command[0])]) == 0
        metrics = json.loads((tmp_path / command[0] / "metrics.json").read_text())
        found = outputs_of(tmp_path / command[0], scored / "validation.csv")
        tolerance = {"mse": 0.05} if "--bf16" in flags else dict.fromkeys(SCORES, 1e-4)
        expected = expected_scores(*found)
        for name, relative in tolerance.items():
            assert metrics[f"eval_{name}"] == pytest.approx(expected[name], rel=relative)


def test_cached_teacher_gives_the_same_student(scored, tmp_path):
    command = ["distill", "--teacher", str(scored / "teacher"), "--student_layers", "2"]
    command += [*data(scored), *FAST, "--logging_steps", "1"]
    cache = ["--cache_teacher", "True", "--teacher_cache_dir", str(tmp_path / "cache")]
    logs = []
    for name, flags in (("plain", []), ("cached", cache)):
        assert main([*command, *flags, *output(tmp_path / name)]) == 0
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        logs.append([row["loss"] for row in history if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_resumed_run_is_bit_equal(scored, tmp_path):
    command = ["distill", "--teacher", str(scored / "teacher"), "--student_layers", "2"]
    command += [*data(scored), *FAST[2:], "--max_steps", "4", "--preset", "official"]
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"]
    assert main([*command, *saving, *output(tmp_path / "unbroken")]) == 0
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "unbroken" / "checkpoint-2")]
    assert main([*command, *saving, *checkpoint, *output(tmp_path / "resumed")]) == 0
    for name in ("model.safetensors", "distillation_state.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("unbroken", "resumed"))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_study_is_of_classifiers(scored):
    names = ("train_file", "validation_file", "test_file")
    files = dict.fromkeys(names, str(scored / "validation.csv"))
    teacher = str(scored / "teacher")
    study = Study(teacher, **files, reference="a", regimes={}, arms={"a": {}}, seeds=[])
    with pytest.raises(UsageError, match="must be a classifier"):
        classify(teacher, study, "validation")


def scorer(**changes):
    changes = {"id2label": {0: "score"}, "label2id": {"score": 0}, **changes}
    return BertForSequenceClassification(tiny_config(**changes))


def batch_of(count):
    tokens = torch.randint(4, 40, (count, 6))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("layers", ["joint", "each"])
def test_terms_by_their_formulas(layers):
    teacher = scorer(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    scores = torch.tensor([0.1, 0.2, 0.3, 5.0, 5.5, 6.0, -1.0, 0.15])
    config = DistillationConfig(projection_dim=4, label_bins=2, contrast_layers=layers)
    model = DistillationModel(student_from_teacher(teacher, 2), teacher, config, scores).train()
    classes = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0])
    assert torch.equal(model.bins, classes)
    batch, index = batch_of(8), torch.arange(8)
    model(**batch, labels=scores, index=index)
    model.update_bank()
    terms = model(**batch, labels=scores, index=index)
    outputs, wanted = (side(**batch).logits[:, 0] for side in (model.student, teacher))
    torch.testing.assert_close(terms["ce"], (outputs - scores).square().mean())
    torch.testing.assert_close(terms["kd"], (outputs - wanted).square().mean())
    loss = 0.1 * terms["ce"] + 0.9 * terms["kd"] + 0.1 * terms["codir"]
    torch.testing.assert_close(terms["loss"], loss)
    # The contrast is that of a classification with the bins as labels.
    outputs = model.student(**batch, output_hidden_states=True)
    features = model._pool(outputs, batch["attention_mask"], model.student_layers)
    targets = model.teacher_outputs(**batch)[1]
    expected = model.contrast(features, targets, labels=classes, index=index)
    torch.testing.assert_close(terms["codir"], expected)
    others = model.contrast(features, targets, labels=torch.zeros_like(classes), index=index)
    assert not torch.allclose(terms["codir"], others)
    model.eval()
    evaluated = model(**batch, labels=scores)
    torch.testing.assert_close(evaluated["loss"], terms["ce"])


def test_all_negatives_need_no_bins():
    teacher = scorer()
    config = DistillationConfig(projection_dim=4, negatives="all")
    model = DistillationModel(student_from_teacher(teacher, 2), teacher, config, torch.ones(4))
    model(**batch_of(4), labels=torch.ones(4), index=torch.arange(4))
    model.update_bank()
    assert model(**batch_of(4), labels=torch.ones(4), index=torch.arange(4))["codir"] > 0.1


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (torch.ones(4), {}, "at least 2 labels, all 4 have the same"),
        (torch.tensor([1.0, torch.nan]), {}, "`bank_labels` must be finite, row 1 is nan"),
        (torch.rand(4), {"kd_temperature": 4.0}, "`kd_temperature` has no meaning"),
    ],
)
def test_settings_and_labels_without_meaning_are_refused(labels, settings, message):
    teacher = scorer()
    with pytest.raises(ValueError, match=message):
        DistillationModel(teacher, scorer(), DistillationConfig(**settings), labels)


def test_models_of_two_tasks_are_refused():
    with pytest.raises(ValueError, match="`student` must have the teacher's 1 labels, got 2"):
        classifier = BertForSequenceClassification(tiny_config())
        DistillationModel(classifier, scorer(), DistillationConfig(), torch.rand(4))
    with pytest.raises(ValueError, match="`teacher` must be a model of single_label_classificatio"):
        both = BertForSequenceClassification(tiny_config(problem_type="multi_label_classification"))
        single = BertForSequenceClassification(tiny_config())
        DistillationModel(single, both, DistillationConfig(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("values", "bins", "expected"),
    [
        ([5, 1, 4, 2, 3, 0], 3, [2, 0, 2, 1, 1, 0]),
        ([0.5, 0.25], 5, [1, 0]),
        ([0] * 9 + [1], 2, [0] * 9 + [1]),
        ([0] + [1] * 9, 2, [0] + [1] * 9),
        ([0] * 90 + list(range(1, 11)), 5, [0] * 90 + [1] * 10),
        (list(range(10)) + [11] * 90, 5, [0] * 10 + [1] * 90),
        ([3, 3, 3], 5, [0, 0, 0]),
    ],
)
def test_quantile_bins(values, bins, expected):
    assert quantile_bins(torch.tensor(values), bins).tolist() == expected


@pytest.mark.parametrize("bins", [2, 3, 5, 100])
def test_bins_keep_order_and_equal_values_together(bins):
    draw = torch.Generator().manual_seed(bins)
    for spread in (2, 3, 10, 1000):
        values = torch.randint(spread, (60,), generator=draw).float() / 7
        found = quantile_bins(values, bins)
        order = values.argsort()
        assert (found[order].diff() >= 0).all()
        assert not found[order].diff()[values[order].diff() == 0].any()
        numbers = found.unique()
        assert 2 <= len(numbers) <= bins and torch.equal(numbers, torch.arange(len(numbers)))


def test_bins_of_different_values_have_one_size():
    values = torch.randperm(100).double().exp()
    assert quantile_bins(values, 5).bincount().tolist() == [20] * 5


def test_correlations():
    one, other = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([5.0, 6, 7, 8, 7])
    # The example of scipy.stats.spearmanr
    assert pearson(middle_ranks(one), middle_ranks(other)) == pytest.approx(0.8207826816681233)
    assert pearson(one, other) == pytest.approx(numpy.corrcoef(one, other)[0, 1])
    assert pearson(one, -3 * one + 1) == pytest.approx(-1)
    assert pearson(one, torch.full((5,), 0.1)) == 0 == pearson(torch.full((5,), 0.1), one)
    tiny = torch.tensor([1.0, 1.0 + 1e-6])
    assert pearson(tiny, tiny) == pytest.approx(1)


def test_scores_of_batches_are_those_of_all_rows():
    outputs, labels = torch.randn(10, 1), torch.randn(10)
    whole = output_scores(outputs, labels)
    collected = RegressionScores()
    for part in (slice(0, 4), slice(4, 7)):
        assert collected(EvalPrediction(outputs[part], labels[part]), compute_result=False) == {}
    assert collected(EvalPrediction(outputs[7:], labels[7:]), compute_result=True) == whole
    lists = EvalPrediction([outputs[:4].numpy(), outputs[4:].numpy()], [labels[:4], labels[4:]])
    assert collected(lists) == whole  # and nothing is left of the rows before
