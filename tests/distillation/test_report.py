"""codir-fast report: what the page shows, that it needs nothing else, and what it refuses."""

import base64
import json
import pickle
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LABELS, make_tokenizer, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DataCollatorWithPadding,
)

from codir_fast import DistillationConfig, DistillationModel
from codir_fast.cli import main
from codir_fast.distillation.arguments import TextArguments
from codir_fast.distillation.data import read_file, select_columns
from codir_fast.distillation.report import sections
from codir_fast.distillation.report.bank import bank_statistics, evenly, mean_cosines
from codir_fast.distillation.report.embeddings import Embeddings, embed, first_two_components
from codir_fast.distillation.report.page import table
from codir_fast.distillation.report.pictures import draw_curves, draw_scores, plt
from codir_fast.distillation.report.runs import Run, read_runs
from codir_fast.distillation.report.spaces import draw_cosines, draw_embeddings, label_groups
from codir_fast.distillation.trainer import STATE_FILE
from codir_fast.memory_bank import IndexedBank, MemoryQueue

FAST = ["--num_train_epochs", "2", "--per_device_train_batch_size", "16", "--use_cpu"]
FAST += ["--logging_steps", "1"]
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "p", "div"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
TAGS |= {"figure", "img", "figcaption"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page, and the sizes of its pictures."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.rows, self.highlighted, self.texts = set(), [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self.rows.append([])
            self.highlighted.append(dict(attrs).get("class") == "differs")
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.lasttag in ("td", "th") and data.strip():
            self.rows[-1][-1] += data

    def row(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)

    @property
    def pictures(self):
        start = "data:image/png;base64,"
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith(start) for source in sources)
        return [base64.b64decode(source.removeprefix(start)) for source in sources]

    @property
    def text(self):
        return " ".join(self.texts)


def report(output, *arguments):
    return main(["report", *map(str, arguments), "--output", str(output), "--device", "cpu"])


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """teacher, and students of the contrastive term in two forms and of none."""
    path = tmp_path_factory.mktemp("runs")
    files = ["--train_file", str(folder / "train.csv")]
    files += ["--validation_file", str(folder / "validation.csv")]
    teacher = ["--model_name_or_path", str(folder / "teacher")]
    command = ["finetune", *teacher, *files, *FAST, "--learning_rate", "1e-2"]
    assert main([*command, "--output_dir", str(path / "teacher")]) == 0
    forms = {
        "joint": ["--projection_dim", "8"],
        "each": ["--projection_dim", "8", "--contrast_layers", "each", "--both_sides", "True"]
        + ["--standardize_features", "True", "--pooling", "max"],
        "kd": ["--codir_weight", "0"],
    }
    for name, flags in forms.items():
        models = ["--teacher", str(path / "teacher"), "--student_layers", "2"]
        output = ["--output_dir", str(path / name)]
        assert main(["distill", *models, *files, *FAST, *flags, *output]) == 0
    return path


@pytest.fixture(scope="module")
def whole(runs, folder, tmp_path_factory):
    """A page with everything in it."""
    output = tmp_path_factory.mktemp("page") / "new" / "report.html"
    students = [runs / name for name in ("joint", "each", "kd")]
    means = ["--test_file", folder / "validation.csv", "--teacher", runs / "teacher"]
    assert report(output, *students, *means, "--num_sentences", "15") == 0
    return Page(output)


def test_page_is_one_file_that_fetches_and_runs_nothing(whole):
    assert whole.tags == TAGS
    outside = [(name, value) for _, name, value in whole.attributes if name in ("src", "href")]
    assert {name for name, _ in outside} == {"src"} and len(whole.pictures) == len(outside) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in whole.pictures)
    policies = [
        value for tag, name, value in whole.attributes if (tag, name) == ("meta", "content")
    ]
    assert policies[0].startswith("default-src 'none'; img-src data:;")
    assert "http://" not in whole.source and "https://" not in whole.source
    assert not [name for _, name, _ in whole.attributes if name.startswith("on")]
    alternatives = [value for _, name, value in whole.attributes if name == "alt"]
    assert len(alternatives) == 5 and all(alternatives)


def test_results_are_those_of_the_runs_and_of_the_test_file(whole, runs, folder, capsys):
    metrics = json.loads((runs / "joint" / "metrics.json").read_text())
    size = sum(v.numel() for v in load_file(runs / "joint" / "model.safetensors").values())
    accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
    row = whole.row("joint")
    head = next(row for row in whole.rows if row[0] == "run")
    named = dict(zip(head[1:], row, strict=True))
    assert named["parameters (M)"] == f"{size / 1e6:#.4g}" and named["steps"] == "6"
    assert named["validation accuracy"] == f"{accuracy:#.4g}"
    assert named["validation loss (nats)"] == f"{loss:#.4g}"

    command = ["evaluate", "--test_file", str(folder / "validation.csv"), "--device", "cpu"]
    command += ["--teacher", str(runs / "teacher"), "--model_name_or_path", str(runs / "joint")]
    capsys.readouterr()
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)
    head = next(row for row in whole.rows if row[0] == "model")
    below = whole.rows[whole.rows.index(head) + 1 :][:4]
    assert [row[0] for row in below] == ["teacher", "joint", "each", "kd"]
    measured = dict(zip(head[1:], below[1][1:], strict=True))
    for title, name in (
        ("accuracy", "accuracy"),
        ("examples", "n"),
        ("agreement with the teacher", "agreement"),
        ("KL to the teacher (nats)", "kl"),
    ):
        assert float(measured[title]) == pytest.approx(expected[name], rel=1e-3), name


def test_settings_that_differ_are_highlighted_and_all_are_there(whole, runs):
    differing = {row[0] for row, is_on in zip(whole.rows, whole.highlighted, strict=True) if is_on}
    expected = {"codir_weight", "projection_dim", "contrast_layers", "both_sides", "pooling"}
    expected |= {"standardize_features"}
    assert differing == expected | {f"distillation: {name}" for name in expected}
    assert whole.row("distillation: contrast_layers") == ["joint", "each", "joint"]
    settings = json.loads((runs / "kd" / "run.json").read_text())["settings"]
    assert set(settings) == {"model", "distillation", "data", "stopping", "training"}
    shown = {row[0] for row in whole.rows}
    assert all(set(group) <= shown for group in settings.values())
    assert whole.row("teacher") and whole.row("train_file")[0].endswith("train.csv")


def test_parts_without_their_input_say_what_to_give(runs, tmp_path):
    output = tmp_path / "report.html"
    assert report(output, runs / "kd", runs / "teacher") == 0
    page = Page(output)
    assert "Accuracy against size and latency needs --test_file." in page.text
    assert "No run has projection heads: give one of distill or pretrain" in page.text
    assert "No run has a memory bank." in page.text
    assert len(page.pictures) == 2  # of the training

    assert report(output, runs / "joint") == 0
    page = Page(output)
    assert "embeddings needs --test_file and --teacher." in page.text
    assert f"The teacher was {runs / 'teacher'}." in page.text
    assert len(page.pictures) == 3  # and of the bank
    assert "What differs" not in page.text  # from what?


def test_run_that_goes_on_is_read_from_its_last_checkpoint(runs, tmp_path):
    shutil.copytree(runs / "joint", tmp_path / "going")
    for name in ("trainer_state.json", "model.safetensors", "metrics.json", STATE_FILE, "run.json"):
        (tmp_path / "going" / name).unlink()
    (run,) = read_runs([str(tmp_path / "going")])
    assert run.terms[-1] != run.terms[0] and "codir" in run.terms
    assert max(row["step"] for row in run.history) == 6 and run.parameters is None
    assert report(tmp_path / "report.html", run.path) == 0
    page = Page(tmp_path / "report.html")
    assert "Settings of going are not known: no run.json." in page.text
    assert page.row("going")[:2] == ["", "6"]


def test_evaluation_of_the_best_model_is_no_point_of_the_last_step(runs, tmp_path):
    """It is what the run gave, and as a value of its last step would be wrong."""
    path = tmp_path / "best"
    shutil.copytree(runs / "joint", path)
    settings = json.loads((path / "run.json").read_text())
    state = json.loads((path / "trainer_state.json").read_text())
    closing = next(row for row in reversed(state["log_history"]) if "eval_loss" in row)
    closing["eval_loss"] = 0.125
    (path / "trainer_state.json").write_text(json.dumps(state))
    for goes_back in (False, True):
        settings["settings"]["training"]["load_best_model_at_end"] = goes_back
        (path / "run.json").write_text(json.dumps(settings))
        (run,) = read_runs([str(path)])
        assert run.metrics["loss"] == 0.125
        drawn = [row["eval_loss"] for row in run.history if "eval_loss" in row]
        assert len(drawn) >= 2 and (drawn[-1] == 0.125) != goes_back


def test_texts_from_files_stay_texts(runs, folder, tmp_path):
    nasty = '<script>alert("1")</script> & $x^{$ _y'
    path = tmp_path / "_<b>$\\frac{1"
    shutil.copytree(runs / "joint", path)
    state = json.loads((path / "trainer_state.json").read_text())
    for row in state["log_history"]:
        if "codir" in row:
            row[nasty] = 1.0
        if "eval_loss" in row:
            row[f"eval_{nasty}"] = 2.0
    (path / "trainer_state.json").write_text(json.dumps(state))
    settings = {"settings": {nasty: {nasty: nasty}, "model": {"teacher": nasty}}}
    (path / "run.json").write_text(json.dumps(settings))
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": {"0": nasty, "1": "fine"}, "label2id": {nasty: 0, "fine": 1}}
    (path / "config.json").write_text(json.dumps(config))
    text = (folder / "validation.csv").read_text().replace("positive", "_<i>$x^{$")
    (tmp_path / "test.csv").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of matplotlib, of a label that it hides
        assert report(tmp_path / "report.html", path, runs / "kd") == 0
        embeddings = Embeddings.of(*torch.eye(4).double().chunk(2))
        plt.close(draw_embeddings({nasty: embeddings}, ["_a", "$b^{$"]))
    page = Page(tmp_path / "report.html")
    assert page.tags == TAGS
    assert page.text.count(nasty) >= 4
    assert [nasty, nasty, ""] in page.rows and path.name in page.text


def test_terms_of_any_name_are_drawn(tmp_path):
    for name, term in (("a", "mlm"), ("b", "distance")):
        (tmp_path / name).mkdir()
        history = [{"step": n, "loss": 1 / n, term: 2.0, "learning_rate": 0.1} for n in (1, 2, 3)]
        history += [{"step": 3, "eval_loss": 1.0, "eval_runtime": 9.0}]
        state = json.dumps({"log_history": history})
        (tmp_path / name / "trainer_state.json").write_text(state)
    read = read_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [run.terms for run in read] == [["loss", "mlm"], ["loss", "distance"]]
    assert read[0].evaluated == ["eval_loss"] and read[0].metrics == {"loss": 1.0}
    figure = draw_curves({run.name: run for run in read}, ["loss", "mlm", "distance"])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[1:] == ["MLM, masked tokens (nats)", "distance"] and len(titles) == 3
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5], [3, 1 / 3]]
    assert [line.get_label() for line in figure.axes[2].get_lines()] == ["b"]
    plt.close(figure)


def test_more_runs_than_colours_are_all_drawn(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]})
    )
    (run,) = read_runs([str(tmp_path / "a")])
    figure = draw_curves({f"run {n}": run for n in range(30)}, ["loss"])
    lines = figure.axes[0].get_lines()
    assert len(lines) == 30 == len(figure.legends[0].get_texts())
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24
    plt.close(figure)


def test_scores_are_drawn_against_size_and_latency():
    results = {
        "one": {"accuracy": 0.5, "n": 100, "parameters": 2e6, "milliseconds_per_sentence": 3.0},
        "two": {"accuracy": 0.9, "n": 100, "parameters": 1e6, "milliseconds_per_sentence": 1.0},
    }
    figure = draw_scores(results)
    for axis, places in zip(figure.axes, ([2, 1], [3, 1]), strict=True):
        points = [container.lines[0].get_xydata().tolist() for container in axis.containers]
        assert points == [[[x, y]] for x, y in zip(places, (0.5, 0.9), strict=True)]
    (bar,) = figure.axes[0].containers[0].lines[2]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([0.45, 0.55])  # 1 standard error
    plt.close(figure)
    of_regression = [{**result, "pearson": 0.7} for result in results.values()]
    for result in of_regression:
        del result["accuracy"]
    figure = draw_scores(dict(zip("ab", of_regression, strict=True)))
    assert figure.axes[0].get_ylabel() == "pearson"
    plt.close(figure)


def test_run_has_one_colour_on_the_page(runs, monkeypatch):
    figures = []
    monkeypatch.setattr(sections, "figure", lambda picture, caption: figures.append(picture) or "")
    found = read_runs([str(runs / name) for name in ("joint", "kd")])
    result = {"accuracy": 0.5, "n": 9, "parameters": 1, "milliseconds_per_sentence": 1.0}
    sections.results_section(found, {"teacher": result, "joint": result, "kd": result}, "")
    sections.curves_section(found)
    scores, terms, evaluations = figures
    points = {c.get_label(): c.lines[0].get_color() for c in scores.axes[0].containers}
    assert len(set(points.values())) == len(points) == 3
    for figure in (terms, evaluations):
        lines = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
        assert lines == {name: points[name] for name in ("joint", "kd")}
    titles = [axis.get_title() for axis in evaluations.axes]
    assert titles == ["validation accuracy", "validation loss (nats)"]
    for figure in figures:
        plt.close(figure)


def test_loss_has_a_unit_where_it_is_known():
    def head(**metrics):
        run = Run("a", Path("a"), [], None, metrics, None)
        return re.findall("validation ([^<]*)<", sections.results_section([run], {}, "")[0])

    assert head(loss=1.0, accuracy=0.5) == ["loss (nats)", "accuracy"]
    assert head(loss=1.0, perplexity=2.7) == ["loss (nats)", "perplexity"]
    assert head(loss=1.0, mse=1.0) == ["loss", "mse"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.837, "0.8370"), (1.0, "1.000"), (1234.0, "1234"), (0.0, "0.000"), (7, "7"), (None, "")],
)
def test_numbers_have_four_digits(value, shown):
    assert f"<td>{shown}</td>" in table(["name", "value"], {"a": [value]})


def test_same_folder_names_are_told_apart_by_their_paths(runs, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(runs / "kd", tmp_path / parent / "kd")
    names = [run.name for run in read_runs([str(tmp_path / p / "kd") for p in "ab"])]
    assert names == [str(tmp_path / "a" / "kd"), str(tmp_path / "b" / "kd")]


def brute_force(rows, labels):
    """Mean cosines of different rows, of one label and of two."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines, differ = unit @ unit.T, ~torch.eye(len(rows), dtype=torch.bool)
    same = labels[:, None] == labels[None]
    return float(cosines[same & differ].mean()), float(cosines[~same].mean())


def test_statistics_of_a_bank(tmp_path):
    labels = torch.tensor([0, 1] * 20 + [5] * 10)
    bank = IndexedBank(50, 6, labels=labels)
    keys = torch.randn(45, 6)
    bank.update(torch.arange(45), keys)
    state = {f"contrast.bank.{name}": v.clone() for name, v in bank.state_dict().items()}
    save_file(state, tmp_path / STATE_FILE)
    (found,) = bank_statistics(tmp_path)
    assert (found.name, found.size, found.dim, found.filled) == ("bank", 50, 6, 45)
    assert found.norms == pytest.approx((1, 1, 1), abs=1e-6)
    assert found.per_label == {0: 20, 1: 20, 5: 5}
    within, between = brute_force(bank.rows[:45].double(), labels[:45])
    assert found.within == pytest.approx(within) and found.between == pytest.approx(between)
    for shares, mean in zip(found.histograms.values(), (within, between), strict=True):
        assert float(shares.sum()) == pytest.approx(1)
        middles = torch.linspace(-1, 1, len(shares) + 1, dtype=torch.float64)
        middles = (middles[1:] + middles[:-1]) / 2
        assert float(shares @ middles) == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_statistics_of_a_queue_without_labels(tmp_path, dtype):
    queue = MemoryQueue(30, 4, dtype=dtype)
    queue.enqueue(torch.randn(20, 4) + 1)
    state = {f"contrast.queue.{name}": v.clone() for name, v in queue.state_dict().items()}
    save_file(state, tmp_path / STATE_FILE)
    (found,) = bank_statistics(tmp_path)
    assert found.filled == 20 and found.per_label is None and found.within is None
    assert found.norms[0] == pytest.approx(1, abs=0.01)
    rows = queue.rows[:20].double()
    different = brute_force(rows, torch.arange(20))[1]
    assert found.between == pytest.approx(different)
    assert list(found.histograms) == ["any two rows"]
    figure = draw_cosines({"queue": found, "again": found})
    assert [axis.get_title() for axis in figure.axes] == ["queue", "again"]
    plt.close(figure)


@pytest.mark.parametrize("filled", [0, 1])
def test_bank_with_no_pair_is_described(tmp_path, filled, runs):
    bank = IndexedBank(5, 4, labels=torch.zeros(5, dtype=torch.int64))
    bank.update(torch.arange(filled), torch.randn(filled, 4))
    shutil.copytree(runs / "kd", tmp_path / "kd")
    state = {f"contrast.bank.{name}": v.clone() for name, v in bank.state_dict().items()}
    save_file(state, tmp_path / "kd" / STATE_FILE)
    (found,) = bank_statistics(tmp_path / "kd")
    assert (found.within, found.between, found.filled) == (None, None, filled)
    assert report(tmp_path / "report.html", tmp_path / "kd") == 0
    assert Page(tmp_path / "report.html").row("kd, bank")[0] == f"{filled} of 5"


def test_banks_of_a_run_are_on_the_page(whole):
    names = [f"each, layers.{n}.{side}" for n in (0, 1) for side in ("bank", "student_bank")]
    for name in ["joint, bank", *names]:
        filled, width, _, within, between = whole.row(name)
        assert filled == "48 of 48" and width == "8"
        assert -1 <= float(between) <= 1 and -1 <= float(within) <= 1
    counts = [[int(n) for n in row[1:]] for row in whole.rows if row[0] in LABELS and len(row) == 6]
    assert [sum(column) for column in zip(*counts, strict=True)] == [48] * 5


def test_mean_cosines_of_few_rows():
    row = torch.ones(1, 2, dtype=torch.float64) / 2**0.5
    assert mean_cosines(row, None) == (None, None)
    assert mean_cosines(row.expand(2, 2), torch.tensor([0, 1])) == (None, pytest.approx(1))
    assert mean_cosines(row.expand(2, 2), torch.tensor([1, 1])) == (pytest.approx(1), None)


@pytest.mark.parametrize("name", ["joint", "each"])
def test_embeddings_are_those_that_the_run_trained_with(name, runs, folder):
    """z of the run's own model, whose bank would hold it."""
    test_file = str(folder / "validation.csv")
    texts = select_columns(read_file("test_file", test_file), "test_file", TextArguments())
    (run,) = read_runs([str(runs / name)])
    found = embed(run, str(runs / "teacher"), texts, TextArguments(max_seq_length=16), 7, "cpu")

    sides = (
        AutoModelForSequenceClassification.from_pretrained(runs / n) for n in (name, "teacher")
    )
    labels = torch.arange(48) % 2
    config = DistillationConfig.load(runs / name)
    model = DistillationModel(*sides, config, labels).eval()
    model.load_distillation_state(load_file(runs / name / STATE_FILE))
    tokenizer = make_tokenizer()
    rows = [tokenizer(text, truncation=True, max_length=16) for text in texts["text"]]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    mapped = model.student_layers, model.teacher_layers
    layers = model.contrast.layers if name == "each" else [model.contrast]
    with torch.no_grad():
        for side, encoder, mine in zip(
            ("student", "teacher"), (model.student, model.teacher), mapped, strict=True
        ):
            states = encoder(**batch, output_hidden_states=True)
            features = model._pool(states, batch["attention_mask"], mine)
            parts = [
                getattr(layer, f"{side}_projection")(getattr(layer, f"{side}_features")(part))
                for layer, part in zip(layers, features.chunk(len(layers), dim=1), strict=True)
            ]
            expected = torch.cat(parts, dim=1).double() / len(parts) ** 0.5
            torch.testing.assert_close(getattr(found, side), expected, rtol=0, atol=1e-5)


def test_ten_layers_keep_their_order(runs, folder, tmp_path):
    """contrast.layers.10 is the eleventh, not the second."""
    torch.manual_seed(3)
    deep = BertForSequenceClassification(tiny_config(num_hidden_layers=12))
    run = tmp_path / "deep"
    for path in (run, tmp_path / "teacher"):
        deep.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    config = DistillationConfig(contrast_layers="each", projection_dim=3, head_init="equal")
    model = DistillationModel(deep, deep, config, torch.arange(4) % 2)
    save_file({k: v.clone() for k, v in model.distillation_state().items()}, run / STATE_FILE)
    config.save(run)
    (run / "trainer_state.json").write_text('{"log_history": []}')
    state = load_file(run / STATE_FILE)
    key = "contrast.layers.11.student_projection.linear.bias"
    save_file(state | {key: state[key] + 100}, run / STATE_FILE)
    texts = select_columns(
        read_file("test_file", str(folder / "validation.csv")), "test_file", TextArguments()
    )
    (read,) = read_runs([str(run)])
    found = embed(read, str(tmp_path / "teacher"), texts, TextArguments(), 32, "cpu")
    differ = (found.student - found.teacher).abs().amax(0).reshape(12, 3).amax(1) > 1e-4
    assert differ.tolist() == [False] * 11 + [True]


def test_embeddings_are_compared():
    one, other = torch.eye(2, dtype=torch.float64)
    found = Embeddings.of(torch.stack([one, one]), torch.stack([one, other]))
    assert (found.same, found.other, found.found) == (0.5, 0.5, 0.5)


def test_first_two_components_are_those_of_the_covariance():
    rows = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([5.0, 3, 1, 1, 1]).double()
    points, shares = first_two_components(rows)
    values, vectors = numpy.linalg.eigh(numpy.cov(rows.numpy().T))
    assert shares == pytest.approx((values[::-1] / values.sum())[:2])
    expected = (rows - rows.mean(0)).numpy() @ vectors[:, ::-1][:, :2]
    numpy.testing.assert_allclose(points.abs().numpy(), numpy.abs(expected), atol=1e-10)
    again, _ = first_two_components(rows.clone())
    assert torch.equal(points, again)
    flat, shares = first_two_components(torch.ones(3, 1, dtype=torch.float64))
    assert shares == (0, 0) and not flat.any()


def test_labels_are_grouped_to_as_many_as_there_are_colours():
    assert label_groups([0, 1, 0]) == ["0", "1", "0"]
    many = [n for n in range(9) for _ in range(9 - n)]
    groups = label_groups(many)
    assert sorted(set(groups)) == ["0", "1", "2", "3", "4", "other labels"]
    assert groups.count("other labels") == 4 + 3 + 2 + 1
    quarters = label_groups([float(n) for n in range(5)])
    assert quarters == ["0 to 1", "0 to 1", "1 to 2", "2 to 3", "3 to 4"]
    assert set(label_groups([2.0, 2.0])) == {"2 to 2"}


def test_rows_are_chosen_evenly():
    assert evenly(10, 3).tolist() == [0, 3, 6]
    assert evenly(3, 10).tolist() == [0, 1, 2] and evenly(0, 10).tolist() == []


def test_run_of_the_pre_training_stage(corpus, folder, tmp_path):
    """Its terms, its queue and its embeddings; it classifies nothing."""
    for name in ("mlm", "student"):
        models = {
            "mlm": ["--student", str(corpus / "encoder")],
            "student": ["--teacher", str(tmp_path / "mlm"), "--student_layers", "2"]
            + ["--queue_size", "16", "--projection_dim", "8"],
        }[name]
        data = ["--train_file", str(corpus / "texts.txt"), "--output_dir", str(tmp_path / name)]
        assert main(["pretrain", *models, *data, *FAST]) == 0
    means = ["--test_file", folder / "validation.csv", "--teacher", tmp_path / "mlm"]
    output = tmp_path / "report.html"
    assert report(output, tmp_path / "mlm", tmp_path / "student", *means) == 0
    page = Page(output)
    (run,) = read_runs([str(tmp_path / "student")])
    assert set(run.terms) == {"loss", "mlm", "kd", "codir"}
    assert page.row("student, bank")[0] == "16 of 16"
    assert page.row("distillation: codir_weight") == ["0.0", "0.1"]
    same, other, *_, texts = next(row for row in reversed(page.rows) if row[0] == "student")[1:]
    assert texts == "20" and -1 <= float(same) <= 1 and -1 <= float(other) <= 1
    assert "size and latency needs runs of classifiers." in page.text
    assert len(page.pictures) == 3  # losses, embeddings, cosines


ERRORS = {
    "no runs": ([], "the following arguments are required: runs"),
    "no folder": (["FOLDER/nowhere"], "`runs` must be folders of finetune, distill or pretrain"),
    "no run": (["FOLDER/empty"], "FOLDER/empty has no trainer_state.json"),
    "twice": (["FOLDER/kd", "FOLDER/../good/kd"], "`runs` must be different folders"),
    "garbled log": (["FOLDER/garbled"], "trainer_state.json can't be read as JSON"),
    "log of a list": (["FOLDER/list"], "must hold an object of JSON, got list"),
    "no history": (["FOLDER/no_history"], "holds no log_history"),
    "endless step": (["FOLDER/endless"], "at most 3.4e+38; step has a larger one"),
    "endless loss": (["FOLDER/large"], "at most 3.4e+38; loss has a larger one"),
    "number for a kind": (
        ["FOLDER/kind", "--test_file", "FOLDER/train.csv"],
        "kind/config.json must hold a list of `architectures`, got 5",
    ),
    "number for names": (
        ["FOLDER/names", "--test_file", "FOLDER/train.csv"],
        "names, a value in its files is of another type: ",
    ),
    "words for numbers": (["FOLDER/words"], "must hold an `id2label` of numbers, got ['a']"),
    "garbled settings": (["FOLDER/settings"], "run.json holds no settings"),
    "pickle": (["FOLDER/pickle"], f"{STATE_FILE} can't be read as safetensors"),
    "garbled model": (["FOLDER/model"], "model.safetensors can't be read as safetensors"),
    "nan": (["FOLDER/nan"], "contrast.bank has rows that are not finite"),
    "bank of another form": (["FOLDER/ragged"], "contrast.bank must have rows (K, D)"),
    "output is a folder": (["FOLDER/kd", "--output", "FOLDER/x.html"], "is a folder"),
    "output is no page": (["FOLDER/kd", "--output", "a.csv"], "`output` must end in .html"),
    "output below a file": (
        ["FOLDER/kd", "--output", "FOLDER/train.csv/a.html"],
        "is no folder to write in",
    ),
    "one sentence": (["FOLDER/kd", "--num_sentences", "1"], "`num_sentences` must be at least 2"),
    "empty batch": (["FOLDER/kd", "--batch_size", "0"], "`batch_size` must be"),
    "no device": (["FOLDER/kd", "--device", "tpu9"], "`device` 'tpu9' can't be used"),
    "unknown flag": (["FOLDER/kd", "--colour", "red"], "report has no flag --colour"),
    "no test file": (["FOLDER/kd", "--test_file", "no.csv"], "`test_file` must be an existing"),
    "another column": (
        ["FOLDER/kd", "--test_file", "FOLDER/train.csv", "--text_column", "b"],
        "`test_file` has no column 'b'",
    ),
    "teacher of another width": (
        ["FOLDER/joint", "--test_file", "FOLDER/train.csv", "--teacher", "FOLDER/wide"],
        "do not fit each other",
    ),
    "no teacher": (
        ["FOLDER/joint", "--test_file", "FOLDER/train.csv", "--teacher", "./nowhere"],
        "`teacher` must be a model's folder or hub name",
    ),
    "no layers": (
        ["FOLDER/layers", "--test_file", "FOLDER/train.csv", "--teacher", "FOLDER/teacher"],
        "`layer_mapping` must be one of",
    ),
}


@pytest.fixture(scope="module")
def broken(runs, folder, tmp_path_factory):
    """Runs as they should be, and others that no report should be made of."""
    path = tmp_path_factory.mktemp("reported") / "good"
    shutil.copytree(runs, path)
    shutil.copy(folder / "train.csv", path)
    for name in ("garbled", "list", "no_history", "settings", "pickle", "model", "nan", "ragged"):
        shutil.copytree(path / "joint", path / name)
    shutil.copytree(path / "joint", path / "layers")
    (path / "empty").mkdir()
    (path / "x.html").mkdir()
    (path / "garbled" / "trainer_state.json").write_text("{")
    (path / "list" / "trainer_state.json").write_text("[]")
    (path / "no_history" / "trainer_state.json").write_text('{"log_history": 3}')
    (path / "settings" / "run.json").write_text('{"settings": {"model": 1}}')
    (path / "pickle" / STATE_FILE).write_bytes(pickle.dumps({"contrast.bank.rows": [1.0]}))
    (path / "model" / "model.safetensors").write_bytes(b"nothing")
    (path / "layers" / "distillation.json").write_text("{}")
    for name, file, change in (
        ("endless", "trainer_state.json", {"log_history": [{"step": 10**400, "loss": 1}]}),
        ("large", "trainer_state.json", {"log_history": [{"step": 1, "loss": -1e308}]}),
        ("kind", "config.json", {"architectures": 5}),
        ("names", "config.json", {"id2label": 5}),
        ("words", "config.json", {"id2label": {"a": "b"}}),
    ):
        shutil.copytree(path / "joint", path / name)
        content = json.loads((path / name / file).read_text()) | change
        (path / name / file).write_text(json.dumps(content))
    state = load_file(path / "joint" / STATE_FILE)
    rows = state["contrast.bank.rows"].clone()
    rows[3, 1] = torch.nan
    save_file(state | {"contrast.bank.rows": rows}, path / "nan" / STATE_FILE)
    valid = torch.ones(7, dtype=torch.bool)
    save_file(state | {"contrast.bank.valid": valid}, path / "ragged" / STATE_FILE)
    torch.manual_seed(0)
    wide = BertForSequenceClassification(tiny_config(hidden_size=32))
    wide.save_pretrained(path / "wide")
    make_tokenizer().save_pretrained(path / "wide")
    return path


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_and_no_page_is_written(name, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[name]
    given = [argument.replace("FOLDER", str(broken)) for argument in arguments]
    assert main(["report", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("codir-fast: error: ")
    assert message.replace("FOLDER", str(broken)) in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_page_that_can_not_be_written_leaves_the_one_before(runs, tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    output.write_text("before")
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "disk full")))
    assert report(output, runs / "kd") != 0
    assert output.read_text() == "before" and list(tmp_path.iterdir()) == [output]


def test_help_names_the_runs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "codir-fast report RUNS ... [--flag value ...]" in shown and "--num_sentences" in shown
