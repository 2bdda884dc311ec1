"""docs/: every command of the page about fine-tuning runs, in its order, on tiny data."""

import re
import shlex
import shutil
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from codir_fast.cli import main
from codir_fast.distillation.config import PRESETS, DistillationConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fine-tuning.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)


def commands():
    text = PAGE.read_text(encoding="utf-8")
    return [line for block in BLOCK.findall(text) for line in block.splitlines()]


def test_the_commands_run_in_their_order(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(folder / "teacher", "encoder")
    shutil.copy(folder / "train.csv", "train.csv")
    shutil.copy(folder / "validation.csv", "dev.csv")
    ran = []
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "codir-fast"
        extra = [] if arguments[0] == "evaluate" else ["--use_cpu", "--max_steps", "6"]
        assert main([*arguments, *extra]) == 0, command
        ran.append(arguments[0])
    assert ran == ["finetune", "distill", "evaluate", "distill"]
    assert '"agreement"' in capsys.readouterr().out
    assert list((tmp_path / "cache" / "codir_fast" / "teacher").iterdir())
    student = AutoModelForSequenceClassification.from_pretrained("student")
    assert student.config.num_hidden_layers == 2


def test_the_page_names_every_preset_and_choices_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"--preset (\w+)", text)) == set(PRESETS)
    for flag, value in re.findall(r"--(contrast_layers|negatives) (\w+)", text):
        assert value in DistillationConfig.CHOICES[flag]
