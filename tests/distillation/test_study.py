"""codir-fast study: runs are made once and told apart; tables follow from the lines."""

import json
import os
import re
import signal
from datetime import date
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from test_checkpoint import files_up_to
from tiny import write_examples

from codir_fast.cli import main
from codir_fast.distillation import study as study_module
from codir_fast.distillation.scores import calibrated_scores, fit_inverse_temperature, nll, scores
from codir_fast.distillation.study_lines import add_lines, read_lines
from codir_fast.distillation.study_plan import REFUSED, read_study, runs_of, trials_of
from codir_fast.distillation.study_report import METRICS, interval, write_report
from codir_fast.errors import Diverged, SaveError

FAST = {"student_layers": 2, "use_cpu": True, "per_device_train_batch_size": 16}


@pytest.fixture
def study(folder, tmp_path):
    write_examples(tmp_path / "test.csv", 30, seed=4)
    settings = FAST | {"max_seq_length": 16}
    return {
        "teacher": str(folder / "teacher"),
        "train_file": str(folder / "train.csv"),
        "validation_file": str(folder / "validation.csv"),
        "test_file": str(tmp_path / "test.csv"),
        "reference": "ce_kd",
        "settings": settings,
        "regimes": {"few": {"max_train_samples": 32, "num_train_epochs": 1}},
        "arms": {"ce_kd": {"codir_weight": 0}, "paper": {"preset": "paper"}},
        "seeds": [10, 11],
        "trials": {"paper": [{"codir_weight": 0.1}, {"codir_weight": 1}]},
        "trial_seeds": [0],
        "trial_regime": "few",
    }


def command(study, tmp_path, *flags):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return ["study", str(path), "--output_dir", str(tmp_path / "out"), *flags]


def test_runs_are_made_once_and_reported(study, tmp_path, capsys):
    assert main(command(study, tmp_path)) == 0
    out = tmp_path / "out"
    lines = read_lines(out / "runs.jsonl")
    assert [(line["seed"], line["arm"]) for line in lines] == [
        *((10, "ce_kd"), (10, "paper")),
        *((11, "ce_kd"), (11, "paper")),
    ]
    assert (out / "differences-few.png").is_file()
    assert [path.name for path in (out / "work").iterdir()] == ["teacher"]
    assert "Differences to ce_kd" in (out / "table.md").read_text()
    assert main(command(study, tmp_path, "--reference", "paper")) == 0
    assert "Differences to paper" in (out / "table.md").read_text()
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and "| paper | 2 |" in table

    (teacher,) = (load_file(path) for path in (out / "logits").glob("teacher-*.safetensors"))
    kept = load_file(out / "logits" / f"{lines[1]['key']}.safetensors")
    assert kept["test"].shape == (30, 2) and kept["validation"].shape == (20, 2)
    same = (kept["test"].argmax(1) == teacher["test"].argmax(1)).double().mean()
    assert lines[1]["test"]["agreement"] == pytest.approx(float(same))

    # Again: the line that was cut off is made again, to the same numbers; the others are not.
    content = (out / "runs.jsonl").read_text()
    (out / "runs.jsonl").write_text(content[:-9])
    for line in lines[:-1]:
        (out / "logits" / f"{line['key']}.safetensors").unlink()
    assert main(command(study, tmp_path)) == 0
    assert len(list((out / "logits").glob("*.safetensors"))) == 2
    again = read_lines(out / "runs.jsonl")
    assert again[:-1] == lines[:-1] and again[-1]["test"] == lines[-1]["test"]

    assert main(command(study | {"seeds": [10]}, tmp_path, "--arms", "paper", "ce_kd")) == 0
    assert (out / "runs.jsonl").read_text().count("\n") == 4
    assert "| paper | 1 |" in (out / "table.md").read_text()
    assert main(command(study | {"seeds": [11, 12]}, tmp_path, "--arms", "ce_kd")) == 0
    assert [(row["seed"], row["arm"]) for row in read_lines(out / "runs.jsonl")[4:]] == [
        (12, "ce_kd")
    ]


def test_texts_are_read_alike_by_runs_and_judges(study, tmp_path):
    """Columns and length of the `settings` hold for the evaluation, and for the teacher's logits,
    which are made again where they change.
    """
    for name in ("train_file", "validation_file", "test_file"):
        lines = Path(study[name]).read_text().splitlines()[1:]
        rows = [line.rsplit(",", 1) for line in lines]
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(["review,y", *(",".join(row) for row in rows)]) + "\n")
        study[name] = str(path)
    study["settings"] |= {"text_column": "review", "label_column": "y"}
    study["seeds"] = [10]
    assert main(command(study, tmp_path, "--arms", "ce_kd")) == 0
    (first,) = (tmp_path / "out" / "logits").glob("teacher-*.safetensors")
    study["settings"] |= {"max_seq_length": 4}
    assert main(command(study, tmp_path, "--arms", "ce_kd")) == 0
    (other,) = {*(tmp_path / "out" / "logits").glob("teacher-*.safetensors")} - {first}
    assert not torch.equal(load_file(first)["test"], load_file(other)["test"])


def test_a_line_that_is_no_json_is_named(study, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").write_text("{}}\n")
    assert main(command(study, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs.jsonl is no JSON" in error and "line 1" in error


def a_line(key="k", arm="a", regime="few", seed=1, settings=None, value=0.5):
    scores = dict.fromkeys(METRICS, value)
    return {
        **{"key": key, "arm": arm, "regime": regime, "seed": seed, "settings": settings or {}},
        **{"validation": scores, "test": scores, "seconds_per_step": 1.0},
    }


BAD_LINES = {
    "no mapping": ([1], "it must be a mapping, got [1]"),
    "no key": ({"arm": "a"}, "`key` must be of type str, got None"),
    "number for an arm": (a_line(arm=3), "`arm` must be of type str, got 3"),
    "no settings": (a_line() | {"settings": None}, "`settings` must be of type dict"),
    "no scores": (a_line() | {"test": 1}, "`test` must be of type dict, got 1"),
    "a score short": (a_line() | {"test": {"accuracy": 1}}, "in `test` must be a finite number"),
    "text": (a_line(value="0.5"), "in `validation` must be a finite number, got '0.5'"),
    "no time": (a_line() | {"seconds_per_step": None}, "`seconds_per_step` must be a finite"),
    "no number": (a_line(value=float("nan")), "is no JSON: NaN"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_can_not_be_reported_is_named(study, tmp_path, capsys, name):
    line, message = BAD_LINES[name]
    lines = tmp_path / "out" / "runs.jsonl"
    lines.parent.mkdir()
    lines.write_text("\n".join(map(json.dumps, (a_line(), line))) + "\n")
    assert main(command(study, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"line 2 of {lines}" in error and message in error


def test_no_line_holds_what_json_has_no_number_for(tmp_path):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        add_lines(path, [a_line(), a_line("b", value=float("nan"))])
    assert read_lines(path) == [a_line()]


@pytest.fixture
def made(monkeypatch):
    """Runs that cost nothing; the list of those that were made, for tests of what is told."""
    runs = []

    def distil(study, task, key, output, teacher):
        runs.append((task.arm, task.regime, task.seed))
        value = task.seed / 100 + task.settings.get("codir_weight", 0.5)
        return a_line(key, task.arm, task.regime, task.seed, task.settings, value)

    monkeypatch.setattr("codir_fast.distillation.study.distil", distil)
    return runs


def rows_of(path, arm):
    return [row for row in path.read_text().splitlines() if row.startswith(f"| {arm} |")]


def test_tables_have_the_names_of_now(study, tmp_path, made):
    """Runs are told apart by their settings: a new name is no new run, and each name has a row."""
    table = tmp_path / "out" / "table.md"
    assert main(command(study, tmp_path)) == 0
    before = table.read_text()
    study |= {
        "reference": "base",
        "arms": {"base": {"codir_weight": 0}, "codir": study["arms"]["paper"]},
    }
    study |= {"regimes": {"little": study["regimes"]["few"]}, "trial_regime": "little"}
    assert main(command(study, tmp_path)) == 0 and len(made) == 4
    renamed = before.replace("ce_kd", "base").replace("| paper |", "| codir |")
    assert table.read_text() == renamed.replace("## few", "## little")
    assert "+50.00 ± 0.00" in rows_of(table, "codir")[1]
    assert (tmp_path / "out" / "differences-little.png").is_file()

    study["arms"]["again"] = {"codir_weight": 0}
    assert main(command(study, tmp_path)) == 0 and len(made) == 4
    rows = [rows_of(table, name) for name in ("base", "again")]
    assert rows[0][0].replace("base", "again") == rows[1][0]
    assert "| again | +0.00 ± 0.00 |" in rows[1][1]
    study["seeds"] = [12, 12]
    assert main(command(study, tmp_path)) == 0 and len(made) == 6
    assert rows_of(table, "again")[0].startswith("| again | 1 |")


def test_arms_and_regimes_choose_what_is_made_not_what_is_told(study, tmp_path, made):
    study["regimes"]["all"] = {"num_train_epochs": 1}
    table = tmp_path / "out" / "table.md"
    assert main(command(study, tmp_path, "--arms", "ce_kd")) == 0
    assert {run[:2] for run in made} == {("ce_kd", "few"), ("ce_kd", "all")}
    assert not rows_of(table, "paper")
    assert main(command(study, tmp_path, "--arms", "paper", "--regimes", "few")) == 0
    assert len(made) == 6 and made[4][:2] == ("paper", "few")
    assert len(rows_of(table, "ce_kd")) == 4  # two regimes, two splits
    assert "| paper | +50.00 ± 0.00 |" in rows_of(table, "paper")[1]
    told = table.read_text()
    assert main(command(study, tmp_path, "--regimes", "all", "--arms", "ce_kd")) == 0
    assert table.read_text() == told and len(made) == 6


def test_trials_that_are_not_there_are_refused(study, tmp_path, capsys, made):
    for changes in ({"trials": {}}, {"trial_seeds": []}):
        assert main(command(study | changes, tmp_path, "--trials")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "needs `trials` and `trial_seeds`" in error
    study["regimes"]["all"] = {"num_train_epochs": 1}
    assert main(command(study, tmp_path, "--trials", "--regimes", "all")) == 2
    assert "`regimes` must be of ['few'], got 'all'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not made


# What ends a run -> settings that do, exit code.
FAILING = {
    "diverges": ({"learning_rate": 1e9, "max_grad_norm": 0}, 1),
    "is refused": ({"layer_mapping": "1:9,2:10"}, 2),
}


@pytest.mark.parametrize(
    "name, jobs", [("diverges", "1"), ("is refused", "1"), ("is refused", "2")]
)
def test_a_run_that_fails_ends_the_study_and_leaves_the_others(study, tmp_path, capsys, name, jobs):
    settings, code = FAILING[name]
    study |= {"arms": study["arms"] | {"paper": settings}}
    assert main(command(study, tmp_path, "--jobs", jobs)) == code
    error = capsys.readouterr().err.splitlines()[-1]
    # Of two processes one may be so late that the other comes to the second seed first.
    seed = "10" if jobs == "1" else "1[01]"
    assert re.match(f"codir-fast: error: study: arm paper, regime few, seed {seed}: ", error)
    out = tmp_path / "out"
    kept = read_lines(out / "runs.jsonl")
    assert {line["arm"] for line in kept} == {"ce_kd"} and kept[0]["seed"] == 10
    assert {path.stem for path in (out / "logits").glob("[!t]*")} == {line["key"] for line in kept}
    study["arms"]["paper"] = {"preset": "paper"}
    assert main(command(study, tmp_path)) == 0
    assert read_lines(out / "runs.jsonl")[: len(kept)] == kept
    assert "| paper | 2 |" in (out / "table.md").read_text()


def test_outputs_that_are_no_numbers_make_no_line(study, tmp_path, capsys, monkeypatch):
    predict = study_module.predict

    def broken(model, *args):
        rows = predict(model, *args)
        return rows / 0 if "student" in model.name_or_path else rows

    monkeypatch.setattr("codir_fast.distillation.study.predict", broken)
    assert main(command(study, tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "arm ce_kd, regime few, seed 10: `" in error and "must be a finite number, got nan" in error
    )
    assert (tmp_path / "out" / "runs.jsonl").read_text() == ""
    assert not list((tmp_path / "out" / "logits").glob("[!t]*"))


@pytest.mark.parametrize("kind", [SaveError, Diverged])
def test_what_ends_a_run_keeps_its_exit_code(study, tmp_path, capsys, monkeypatch, kind):
    def fail(arguments):
        raise kind("it ended")

    monkeypatch.setattr("codir_fast.distillation.distill.run", fail)
    assert main(command(study, tmp_path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "codir-fast: error: study: arm ce_kd, regime few, seed 10: it ended"


def distil_or_die(study, task, key, output, teacher):
    """In place of study.distil, in a process of its own."""
    if task.arm == "paper":
        os.kill(os.getpid(), signal.SIGKILL)
    return a_line(key, task.arm, task.regime, task.seed, task.settings)


def test_a_process_that_dies_is_told_and_the_others_are_kept(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_module, "distil", distil_or_die)
    assert main(command(study, tmp_path, "--jobs", "2")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        "codir-fast: error: study: arm paper, regime few, seed 1[01]: its process ended before the "
        "run was done, .*; runs that are done are kept, the next call goes on",
        error,
    )
    kept = read_lines(tmp_path / "out" / "runs.jsonl")
    assert kept[0]["seed"] == 10 and {line["arm"] for line in kept} == {"ce_kd"}
    monkeypatch.setattr(study_module, "distil", lambda _, task, key, *__: a_line(key, task.arm))
    assert main(command(study, tmp_path, "--arms", "paper")) == 0
    assert read_lines(tmp_path / "out" / "runs.jsonl")[: len(kept)] == kept


# What has no room on the disk -> what the line says.
FULL = {
    "the teacher's logits": "logits/teacher-",
    "a run's logits": "study: arm ce_kd, regime few, seed 10: ",
}


@pytest.mark.parametrize("number, name", list(enumerate(FULL)))
def test_a_full_disk_leaves_no_half_of_the_logits(
    study, tmp_path, capsys, monkeypatch, number, name
):
    saved = []

    def save(tensors, path):
        saved.append(path)
        with files_up_to(100 if len(saved) > number else 10**9):
            save_file(tensors, path)

    monkeypatch.setattr(study_module, "save_file", save)
    assert main(command(study, tmp_path, "--arms", "ce_kd")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("codir-fast: error: ") and FULL[name] in error
    assert ".safetensors can't be written: " in error and "os error 27" in error
    logits = tmp_path / "out" / "logits"
    assert len(list(logits.iterdir())) == number  # the teacher's are whole
    monkeypatch.setattr(study_module, "save_file", save_file)
    assert main(command(study, tmp_path, "--arms", "ce_kd")) == 0
    assert len(list(logits.iterdir())) == 3
    for path in logits.iterdir():
        assert load_file(path)["test"].shape == (30, 2)


def test_a_full_disk_names_the_file(study, tmp_path, capsys, made):
    """Lines of before stay; what there is of another one is none, and its run is made again."""
    out, one_arm = tmp_path / "out", ["--arms", "ce_kd"]

    def fails(size, name, *flags):
        given = command(study, tmp_path, *flags)
        with files_up_to(size):
            assert main(given) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{out / name} can't be written: " in error and "File too large" in error

    assert main(command(study, tmp_path, *one_arm)) == 0
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    kept = read_lines(out / "runs.jsonl")
    fails(10, "table.md", *one_arm)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    fails(len(before[out / "runs.jsonl"]) + 100, "runs.jsonl")
    assert read_lines(out / "runs.jsonl") == kept
    assert main(command(study, tmp_path)) == 0
    assert len(made) == 5 and len(read_lines(out / "runs.jsonl")) == 4
    picture = (out / "differences-few.png").read_bytes()
    fails(100, "differences-few.png")
    assert (out / "differences-few.png").read_bytes() == picture


def test_trials_and_jobs(study, tmp_path, capsys):
    assert main(command(study, tmp_path, "--trials", "--jobs", "2")) == 0
    lines = read_lines(tmp_path / "out" / "trials.jsonl")
    assert sorted(line["settings"]["codir_weight"] for line in lines) == [0.1, 1]
    assert "codir_weight 0.1 | 1 |" in capsys.readouterr().out
    assert not (tmp_path / "out" / "runs.jsonl").exists()


ERRORS = {
    "no file": (None, "no.yaml can't be read"),
    "no mapping": ("- 1\n", "must hold a mapping, got list"),
    "no yaml": ("a: [\n", "can't be read"),
    "unknown name": ({"arm": {}}, "study.yaml has an unknown key 'arm', known: ["),
    "reference": ({"reference": "x"}, "`reference` must be an arm, ['ce_kd', 'paper'], got 'x'"),
    "arms": ({"arms": ["x"]}, "`arms` must be a mapping"),
    "trial regime": ({"trial_regime": "x"}, "`trial_regime` must be a regime, ['few'], got 'x'"),
    "arm": ({"arms": {"ce_kd": None}}, "`arms` must hold mappings of settings, 'ce_kd' is None"),
    "regime": ({"regimes": {"few": 3}}, "`regimes` must hold mappings of settings, 'few' is 3"),
    "tried": (
        {"trials": {"paper": [1]}},
        "`trials` must hold mappings of settings, 1 of 'paper' is 1",
    ),
    "trials": ({"trials": {"paper": {}}}, "`trials` must hold lists, 'paper' is {}"),
    "number for a teacher": ({"teacher": 5}, "`teacher` must be a path, got 5"),
    "texts of an arm": (
        {"arms": {"ce_kd": {"max_seq_length": 4}}},
        "`max_seq_length` must be in the `settings` of all runs",
    ),
    "seeds": ({"seeds": ["x"]}, "`seeds` must be a list of integers"),
    "switches for seeds": ({"seeds": [True]}, "`seeds` must be a list of integers, got [True]"),
    "a switch for a seed of trials": ({"trial_seeds": [True]}, "`trial_seeds` must be a list of"),
    "a date that is none": ("2021-13-45: x", "study.yaml can't be read: month must be in 1..12"),
    "deep": ("[" * 5000, "study.yaml can't be read: it is nested too deeply"),
    "words for a length": (
        {"settings": FAST | {"max_seq_length": "abc"}},
        "`max_seq_length` in `settings` must be an integer, got 'abc'",
    ),
    "number for a column": (
        {"settings": FAST | {"text_column": 5}},
        "`text_column` in `settings` must be a text, got 5",
    ),
    "list for a reference": ({"reference": ["a"]}, "`reference` must be a name, got ['a']"),
    "list for a regime": ({"trial_regime": ["few"]}, "`trial_regime` must be a name, got ['few']"),
    "number for a key": ({5: 1}, "study.yaml has an unknown key 5, known: ['teacher', "),
    "seeds of trials": (
        {"trial_seeds": [11]},
        "`seeds` and `trial_seeds` must have none in common",
    ),
    "no teacher": ({"teacher": "nowhere"}, "there is no file nowhere/model.safetensors"),
    "unknown flag": (
        {"arms": {"ce_kd": {"speed": 1}}},
        "arm ce_kd, regime few: distill has no flag --speed",
    ),
    "bad value": (
        {"arms": {"ce_kd": {"kd_weight": -1}}},
        "arm ce_kd, regime few: distill: `kd_weight` must be",
    ),
    "no step": (
        {"arms": {"ce_kd": {"num_train_epochs": 0}}},
        "arm ce_kd, regime few: `num_train_epochs` must be above 0",
    ),
    "dashes": (
        {"arms": {"ce_kd": {"max-seq-length": 4}}},
        "'ce_kd' in `arms` must hold flags' names with underscores, got 'max-seq-length'",
    ),
    "two flags in one": ({"settings": {"seed=1 --x": 4}}, "`settings` must hold flags' names"),
    "a date": ({"settings": {"text_column": date(2020, 1, 1)}}, "must hold texts, numbers and"),
    "infinite": ({"regimes": {"few": {"temperature": float("inf")}}}, "must hold texts, numbers"),
    "number for an arm": ({"arms": {1: {}}}, "`arms` must have names that are text, got 1"),
    "a regime that is a path": (
        {"regimes": {"a/b": {}}, "trial_regime": "a/b"},
        "`regimes` must have names of 1 to 60 characters that are no paths, as files are named "
        "by them, got 'a/b'",
    ),
    "a regime above": ({"regimes": {"few": {}, "..": {}}}, "characters that are no paths"),
    "an arm that is a path": ({"arms": {"ce_kd": {}, "/tmp": {}}}, "no paths, as files are named"),
    "an empty regime": ({"regimes": {"few": {}, "": {}}}, "`regimes` must have names of 1 to 60"),
    "an empty arm": ({"arms": {"ce_kd": {}, " ": {}}}, "`arms` must have names of 1 to 60 char"),
    "trials of a path": ({"trials": {"a/b": [{}]}}, "`trials` must have names of 1 to 60 char"),
    "two lines": ({"arms": {"ce_kd": {}, "a\nb": {}}}, "`arms` must have names of 1 to 60"),
    "a long regime": ({"regimes": {"few": {}, "x" * 61: {}}}, "`regimes` must have names of 1 to"),
    "no runs": ({"seeds": []}, "it needs `arms`, `regimes` and `seeds`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_study_that_can_not_be_run_is_refused(study, tmp_path, capsys, name):
    changes, message = ERRORS[name]
    given = command(study | changes if isinstance(changes, dict) else study, tmp_path)
    if isinstance(changes, str):
        (tmp_path / "study.yaml").write_text(changes)
    elif changes is None:
        given[1] = str(tmp_path / "no.yaml")
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: study: ") and error.count("\n") == 1
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_study_sets_itself_is_no_setting(study, tmp_path, capsys, name):
    setting = {name: "x"}
    for changes, place in (
        ({"settings": study["settings"] | setting}, "`settings`"),
        ({"regimes": {"few": setting}}, "'few' in `regimes`"),
        ({"arms": study["arms"] | {"paper": setting}}, "'paper' in `arms`"),
        ({"trials": {"paper": [{}, setting]}}, "2 of 'paper' in `trials`"),
    ):
        assert main(command(study | changes, tmp_path)) == 2
        error = capsys.readouterr().err
        assert error.startswith("codir-fast: error: study: ") and error.count("\n") == 1
        assert f"`{name}` can't be in {place}: " in error


def test_an_arm_without_a_teacher_keeps_none_of_its_outputs(study, tmp_path):
    study["arms"] = {"ce_kd": {"ce_weight": 1, "kd_weight": 0, "codir_weight": 0}}
    study["seeds"] = [10]
    assert main(command(study, tmp_path)) == 0
    assert not (tmp_path / "out" / "work" / "teacher").exists()
    study["arms"]["live"] = {"cache_teacher": False}
    assert main(command(study, tmp_path)) == 0
    assert not (tmp_path / "out" / "work" / "teacher").exists()


def test_the_committed_study_is_one():
    """Its flags are those that distill takes, also where a check is added there."""
    root = Path(__file__).parents[2]
    plan = read_study(str(root / "configs" / "demo_study.yaml"))
    plan.train_file = __file__  # any that is there
    study_module._check(plan, [*runs_of(plan), *trials_of(plan)], root)
    results = root / "benchmarks" / "results" / "demo-study"
    runs = [(task.arm, task.regime, task.seed, task.settings) for task in runs_of(plan)]
    lines = read_lines(results / "runs.jsonl")
    assert len(lines) == len(runs)
    for line in lines:
        assert tuple(line[name] for name in ("arm", "regime", "seed", "settings")) in runs


def test_flags_of_a_study_are_checked(study, tmp_path, capsys):
    for flags, message in (
        (["--jobs", "0"], "`jobs` must be at least 1"),
        (["--regimes", "many"], "`regimes` must be of ['few'], got 'many'"),
        (["--arms", "mine"], "`arms` must be of ['ce_kd', 'paper'], got 'mine'"),
        (["--reference", "mine"], "`reference` must be of ['ce_kd', 'paper'], got 'mine'"),
        (["--reference", ""], "`reference` must be of ['ce_kd', 'paper'], got ''"),
        (["--trials", "--reference", "paper"], "`reference` has no meaning beside `trials`"),
        (["--trials", "--arms", "ce_kd"], "`arms` must be of ['paper'], got 'ce_kd'"),
        (["--speed"], "unrecognized arguments: --speed"),
    ):
        assert main(command(study, tmp_path, *flags)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_scores_are_their_formulas():
    torch.manual_seed(0)
    logits, teacher = torch.randn(50, 3), 2 * torch.randn(50, 3)
    labels = torch.randint(3, (50,))
    found = scores(logits, teacher, labels)
    p, q = (rows.double().softmax(1) for rows in (teacher, logits))
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert found["nll"] == pytest.approx(float(-q[torch.arange(50), labels].log().mean()))
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    same = (logits.argmax(1) == teacher.argmax(1)).double().mean()
    assert found["agreement"] == pytest.approx(float(same))


def test_calibration_finds_the_temperature_that_is_there():
    torch.manual_seed(0)
    logits = torch.randn(4000, 2, dtype=torch.float64)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1)[:, 0]
    found = fit_inverse_temperature(lambda s: nll(logits * s, labels))
    assert found == pytest.approx(1 / 2.5, rel=0.1)
    nearby = [nll(logits * found * change, labels) for change in (0.999, 1, 1.001)]
    assert min(nearby) == nearby[1]
    # A teacher that is the student at another temperature is met exactly.
    teacher = {"validation": logits * 3, "test": logits[:99] * 3}
    splits = {"validation": (logits, labels), "test": (logits[:99], labels[:99])}
    result = calibrated_scores(splits, teacher)["test"]
    assert result["kl_calibrated"] < 1e-9 < result["kl"]
    expected = F.cross_entropy(logits[:99] * found, labels[:99])
    assert result["nll_calibrated"] == pytest.approx(float(expected))


def test_interval_is_students():
    # scipy.stats.t.ppf(0.975, 4) is 2.7764
    middle, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (middle, half) == (3, pytest.approx(2.776 * 2.5**0.5 / 5**0.5))
    assert interval([1.0])[1] == float("inf")


def test_differences_are_paired_by_seed(tmp_path):
    def line(arm, seed, value):
        validation = {"validation": dict.fromkeys(METRICS, 2 * value)}
        return a_line(arm=arm, seed=seed, value=value) | validation

    lines = [line("a", 1, 0.5), line("a", 2, 0.7), line("b", 2, 0.8), line("b", 1, 0.6)]
    lines += [line("b", 3, 0.0)]  # has no partner
    text = write_report(lines, "a", tmp_path, trials=False)
    rows = [row for row in text.splitlines() if row.startswith("| b | +")]
    assert "+10.00 ± 0.00" in rows[0] and "+0.1000 ± 0.0000" in rows[0]
    assert "+20.00 ± 0.00" in rows[1]  # on the validation texts
    assert (tmp_path / "table.md").read_text() == text


def test_names_stand_in_the_table_as_they_are(tmp_path):
    scores = {name: 0.5 for name in METRICS}
    lines = [
        {
            **{"arm": arm, "regime": "r|1", "seed": seed, "settings": {"a|b": 1}},
            **{"validation": scores, "test": scores, "seconds_per_step": 0.1},
        }
        for arm in ("<b>|x", "plain")
        for seed in (1, 2)
    ]
    text = write_report(lines, "plain", tmp_path, trials=False)
    assert "| &lt;b&gt;\\|x | 2 |" in text and "## r\\|1, test texts" in text
    assert "<b>" not in text
    assert "| &lt;b&gt;\\|x |" in write_report(lines, "plain", tmp_path, trials=True)
