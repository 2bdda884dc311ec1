"""The program without training: help, version, doctor, and unknown commands."""

import json
import subprocess
import sys

import pytest

from codir_fast import __version__, backends
from codir_fast.cli import COMMANDS, main


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"codir-fast {__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main([]) == 2


def test_unknown_command_is_one_line(capsys):
    assert main(["destill"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "got 'destill'" in error


def test_traceback_is_shown_where_it_is_wanted(monkeypatch, capsys):
    arguments = ["doctor", "--jsn"]
    monkeypatch.setenv("CODIR_FAST_TRACEBACK", "1")
    assert main(arguments) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert before[0].startswith("Traceback") and any("doctor.py" in line for line in before)
    assert last.startswith("codir-fast: error: doctor has no flag")
    monkeypatch.setenv("CODIR_FAST_TRACEBACK", "0")
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{last}\n"


def test_doctor_refuses_an_unknown_flag_in_one_line(capsys):
    assert main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err.startswith("codir-fast: error: doctor has no flag --jsn")


def test_doctor_tells_backends_and_reasons(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name, status in backends().items():
        assert name in shown and status.reason in shown
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["codir-fast"] == __version__ == report["build"]["version"]
    assert set(report["backends"]) == set(backends())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["doctor"]])
def test_light_commands_load_no_transformers(arguments):
    program = (
        "import sys; from codir_fast.cli import main; code = main(sys.argv[1:]);"
        "assert not {'transformers', 'datasets', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_missing_packages_are_named(monkeypatch, capsys):
    needs = {"codir_fast.distillation": (("transformers", "no_such_package"), "train")}
    monkeypatch.setattr("codir_fast.cli.NEEDS", needs)
    assert main(["distill"]) == 2
    error = capsys.readouterr().err
    assert "no_such_package" in error and "pip install '.[train]'" in error


def test_module_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "codir_fast", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"codir-fast {__version__}\n"
