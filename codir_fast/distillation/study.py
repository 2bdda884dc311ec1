"""`codir-fast study`: many distillations side by side, arms x regimes x seeds, as a file tells.

Each run is `codir-fast distill` with the flags of its arm and regime, one line of JSON in
runs.jsonl; runs that are there are not made again. Tables and pictures are made of the lines.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from codir_fast.distillation import distill
from codir_fast.distillation.checkpoint import replaced_file
from codir_fast.distillation.data import (
    read_file,
    select_columns,
    tokenize,
)
from codir_fast.distillation.labels import read_labels
from codir_fast.distillation.lengths import longest_text
from codir_fast.distillation.loading import load_tokenizer, load_trained_classifier
from codir_fast.distillation.objectives import is_regression
from codir_fast.distillation.scores import calibrated_scores, predict
from codir_fast.distillation.study_lines import add_lines, fault_of, lines_of, read_lines
from codir_fast.distillation.study_plan import (
    SPLITS,
    Run,
    Study,
    read_study,
    runs_of,
    trials_of,
)
from codir_fast.distillation.study_processes import in_processes
from codir_fast.distillation.study_report import Line, write_report
from codir_fast.errors import Diverged, SaveError, UsageError, is_full

RUNS, TRIALS, LOGITS, WORK = "runs.jsonl", "trials.jsonl", "logits", "work"


def run(arguments: list[str]) -> int:
    """Runs what is missing, then writes table.md and pictures of all runs that have a line."""
    options = _parse(arguments)
    study = read_study(options.config)
    tasks = list(trials_of(study) if options.trials else runs_of(study))
    wanted = _wanted(options, study, tasks)
    output = Path(options.output_dir)
    _check(study, wanted, output)
    inputs = _hash_inputs(study)
    _make_folder(output)
    lines = output / (TRIALS if options.trials else RUNS)
    done = {line["key"] for line in read_lines(lines)}
    # By key: arms of the same settings are one run.
    missing = {task.key(inputs): task for task in wanted if task.key(inputs) not in done}
    if missing:
        teacher = _teacher_logits(study, inputs, output)
        results = _results(study, missing, output, teacher, options.jobs)
        add_lines(lines, tqdm(results, "Study", len(missing), unit="run"))
    rows = lines_of([(task, task.key(inputs)) for task in tasks], read_lines(lines))
    print(write_report(rows, _reference(options, study), output, trials=options.trials))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"study: {message}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser("codir-fast study", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="the study, a YAML file")
    parser.add_argument("--output_dir", required=True, help="of lines, logits, table and pictures")
    parser.add_argument("--trials", action="store_true", help="run the trials, not the arms")
    parser.add_argument("--regimes", nargs="+", default=[], help="make runs of these alone")
    parser.add_argument("--arms", nargs="+", default=[], help="make runs of these alone")
    parser.add_argument("--reference", help="the arm that differences are taken to, another one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UsageError(f"study: `jobs` must be at least 1, got {options.jobs}")
    if options.trials and options.reference is not None:
        raise UsageError(
            "study: `reference` has no meaning beside `trials`, whose table has no differences"
        )
    return options


def _reference(options: argparse.Namespace, study: Study) -> str:
    return study.reference if options.reference is None else options.reference


def _wanted(options: argparse.Namespace, study: Study, tasks: list[Run]) -> list[Run]:
    """The runs to make: those that --arms and --regimes name, or all."""
    if not tasks:
        needed = "`trials` and `trial_seeds`" if options.trials else "`arms`, `regimes` and `seeds`"
        raise UsageError(f"study: there is nothing to run in {options.config}: it needs {needed}")
    _check_names("regimes", options.regimes, [task.regime for task in tasks])
    _check_names("arms", options.arms, [task.arm for task in tasks])
    _check_names("reference", [_reference(options, study)], study.arms)
    return [
        task
        for task in tasks
        if task.arm in (options.arms or [task.arm])
        and task.regime in (options.regimes or [task.regime])
    ]


def _check_names(flag: str, names: list[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for unknown in set(names) - set(known):
        raise UsageError(f"study: `{flag}` must be of {known}, got {unknown!r}")


def _check(study: Study, wanted: list[Run], output: Path) -> None:
    """Refuses flags that distill would refuse, before the first run is made."""
    seen = []
    for task in wanted:
        if task.settings in seen:
            continue
        seen.append(task.settings)
        try:
            *_, training = distill.read_flags(_flags(study, task, output, output))
            if training.max_steps < 1 and not training.num_train_epochs:
                raise UsageError("`num_train_epochs` must be above 0: there would be no step")
        except UsageError as error:
            raise UsageError(f"study: arm {task.arm}, regime {task.regime}: {error}") from error


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`output_dir` {output} can't be made: {error}") from error


def _hash_inputs(study: Study) -> str:
    """Of the contents of what all runs read."""
    names = ("train_file", "validation_file", "test_file")
    paths = [Path(getattr(study, name)) for name in names]
    paths.append(Path(study.teacher, "model.safetensors"))
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UsageError(f"study: there is no file {path}")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _results(
    study: Study, missing: dict[str, Run], output: Path, teacher: Path, jobs: int
) -> Iterator[Line]:
    """Lines of runs, as they are done; once one has failed, those of the runs beside it."""
    calls = [
        (f"study: {task}", partial(distil, study, task, key, output, teacher))
        for key, task in missing.items()
    ]
    if jobs > 1:
        yield from in_processes(calls, jobs)
    else:
        yield from (call() for _, call in calls)


def distil(study: Study, task: Run, key: str, output: Path, teacher: Path) -> Line:
    """Makes one run; its line. The student's logits are kept, its weights are not."""
    try:
        return _distil(study, task, key, output, teacher)
    except (UsageError, SaveError, Diverged) as error:
        raise type(error)(f"study: {task}: {error}") from error
    except OSError as error:
        if not is_full(error):
            raise
        raise SaveError(f"study: {task}: {error}") from error


def _distil(study: Study, task: Run, key: str, output: Path, teacher: Path) -> Line:
    folder = output / WORK / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    student = folder / "student"
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stderr(log):
        distill.run(_flags(study, task, student, output))
    logits = {name: classify(str(student), study, name) for name in SPLITS}
    metrics, state = (
        json.loads((student / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "trainer_state.json")
    )
    line = {
        "key": key,
        "arm": task.arm,
        "regime": task.regime,
        "seed": task.seed,
        "settings": task.settings,
        **calibrated_scores(logits, load_file(teacher)),
        "steps": state["global_step"],
        "seconds_per_step": metrics["train_runtime"] / state["global_step"],
    }
    if fault := fault_of(line):
        raise Diverged(fault)
    with replaced_file(output / LOGITS / f"{key}.safetensors") as file:
        save_file({name: rows for name, (rows, _) in logits.items()}, file)
    shutil.rmtree(folder)
    return line


def _flags(study: Study, task: Run, student: Path, output: Path) -> list[str]:
    """Of distill; the teacher's outputs are kept for all runs, where the run looks at them."""
    settings = {  # those that are not to be changed are in study_plan.REFUSED
        "teacher": study.teacher,
        "train_file": study.train_file,
        "output_dir": student,
        "seed": task.seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **task.settings,
    }
    if task.settings.get("cache_teacher", _learns_from_teacher(settings)):
        settings = {
            "cache_teacher": True,
            "teacher_cache_dir": output / WORK / "teacher",
            **settings,
        }
    return _as_flags(settings)


def _learns_from_teacher(settings: dict[str, Any]) -> bool:
    config = distill.read_flags(_as_flags(settings))[1]
    return any(getattr(config, name) > 0 for name in config.WEIGHTS if name != "ce_weight")


def _as_flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def classify(model: str, study: Study, split: str) -> tuple[Tensor, Tensor]:
    """A model's logits (N, C) on a split's texts, and their labels (N,)."""
    data = study.texts()
    classifier, tokenizer = load_trained_classifier("model", model), load_tokenizer("model", model)
    name = f"{split}_file"
    examples = select_columns(read_file(name, getattr(study, name)), name, data)
    if is_regression(classifier.config):
        raise UsageError(
            f"`model` must be a classifier, {model} is of regression: its scores differ"
        )
    labels = read_labels(examples, name, classifier.config)
    longest = longest_text(data, tokenizer, classifier)
    tokens = tokenize(examples, tokenizer, labels, longest)
    return predict(classifier, tokens, tokenizer), torch.tensor(labels)


def _teacher_logits(study: Study, inputs: str, output: Path) -> Path:
    """File of the teacher's logits on each split, made once."""
    folder = Path(study.teacher)
    digest = hashlib.sha256(json.dumps([inputs, asdict(study.texts())], sort_keys=True).encode())
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.txt")):  # tokenizer, config
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    path = output / LOGITS / f"teacher-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        logits = {name: classify(study.teacher, study, name)[0] for name in SPLITS}
        with replaced_file(path) as file:
            save_file(logits, file)
    return path
