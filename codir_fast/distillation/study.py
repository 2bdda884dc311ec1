"""`codir-fast study`: many distillations side by side, arms x regimes x seeds, as a file tells.

Each run is `codir-fast distill` with the flags of its arm and regime, one line of JSON in
runs.jsonl; runs that are there are not made again. Tables and pictures are made of the lines.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from codir_fast.distillation import distill
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
from codir_fast.distillation.study_plan import Run, Study, read_study, runs_of, trials_of
from codir_fast.distillation.study_report import write_report
from codir_fast.errors import UsageError

RUNS, TRIALS, LOGITS, WORK = "runs.jsonl", "trials.jsonl", "logits", "work"
SPLITS = ("validation", "test")


def run(arguments: list[str]) -> int:
    """Runs what is missing, then writes table.md and pictures from all lines."""
    options = _parse(arguments)
    study = read_study(options.config)
    _check_names("regimes", options.regimes, study.regimes)
    _check_names("arms", options.arms, study.arms)
    _check_names("reference", [options.reference or study.reference], study.arms)
    tasks = trials_of(study) if options.trials else runs_of(study, options.regimes or study.regimes)
    wanted = [task for task in tasks if not options.arms or task.arm in options.arms]
    output = Path(options.output_dir)
    _check(study, wanted, output)
    inputs = _hash_inputs(study)
    _make_folder(output)
    lines = output / (TRIALS if options.trials else RUNS)
    done = {line["key"] for line in read_lines(lines)}
    missing = [(task, task.key(inputs)) for task in wanted if task.key(inputs) not in done]
    if missing:
        teacher = _teacher_logits(study, inputs, output)
        _run_all(study, missing, output, lines, teacher, options.jobs)
    keys = [task.key(inputs) for task in wanted]
    rows = [row for row in read_lines(lines) if row["key"] in keys]
    print(write_report(rows, options.reference or study.reference, output, trials=options.trials))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"study: {message}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser("codir-fast study", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="the study, a YAML file")
    parser.add_argument("--output_dir", required=True, help="of lines, logits, table and pictures")
    parser.add_argument("--trials", action="store_true", help="run the trials, not the arms")
    parser.add_argument("--regimes", nargs="+", default=[], help="these alone")
    parser.add_argument("--arms", nargs="+", default=[], help="these alone")
    parser.add_argument("--reference", help="the arm that differences are taken to, another one")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UsageError(f"study: `jobs` must be at least 1, got {options.jobs}")
    return options


def _check_names(flag: str, names: list[str], known: Iterable[str]) -> None:
    for unknown in set(names) - set(known):
        raise UsageError(f"study: `{flag}` must be of {list(known)}, got {unknown!r}")


def _check(study: Study, wanted: list[Run], output: Path) -> None:
    """Refuses flags that distill would refuse, before the first run is made."""
    seen = []
    for task in wanted:
        if task.settings not in seen:
            seen.append(task.settings)
            try:
                distill.read_flags(_flags(study, task, output, output))
            except UsageError as error:
                raise UsageError(f"study: arm {task.arm}: {error}") from error


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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for a last one that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UsageError(f"study: line {number} of {path} is no JSON: {error}") from error
    return rows


def _run_all(
    study: Study,
    missing: list[tuple[Run, str]],
    output: Path,
    lines: Path,
    teacher: Path,
    jobs: int,
) -> None:
    _end_last_line(lines)
    results = _results(study, missing, output, teacher, jobs)
    with lines.open("a", encoding="utf-8") as file:
        for line in tqdm(results, "Study", len(missing), unit="run"):
            file.write(json.dumps(line) + "\n")
            file.flush()


def _results(
    study: Study, missing: list[tuple[Run, str]], output: Path, teacher: Path, jobs: int
) -> Iterator[dict[str, Any]]:
    """Lines of runs, as they are done."""
    if jobs == 1:
        for task, key in missing:
            yield distil(study, task, key, output, teacher)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawned: a fork after torch has started its threads may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(distil, study, *task, output, teacher) for task in missing]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_last_line(lines: Path) -> None:
    """Cuts off a last line that an earlier run did not finish."""
    if lines.is_file():
        content = lines.read_bytes()
        lines.write_bytes(content[: content.rfind(b"\n") + 1])


def distil(study: Study, task: Run, key: str, output: Path, teacher: Path) -> dict[str, Any]:
    """Makes one run; its line. The student's logits are kept, its weights are not."""
    folder = output / WORK / key
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    student = folder / "student"
    with (folder / "log.txt").open("w", encoding="utf-8") as log, redirect_stderr(log):
        try:
            distill.run(_flags(study, task, student, output))
        except UsageError as error:
            raise UsageError(f"study: arm {task.arm}, seed {task.seed}: {error}") from error
    logits = {name: classify(str(student), study, name) for name in SPLITS}
    save_file(
        {name: rows for name, (rows, _) in logits.items()}, output / LOGITS / f"{key}.safetensors"
    )
    metrics, state = (
        json.loads((student / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "trainer_state.json")
    )
    shutil.rmtree(folder)
    return {
        "key": key,
        "arm": task.arm,
        "regime": task.regime,
        "seed": task.seed,
        "settings": task.settings,
        **calibrated_scores(logits, load_file(teacher)),
        "steps": state["global_step"],
        "seconds_per_step": metrics["train_runtime"] / state["global_step"],
    }


def _flags(study: Study, task: Run, student: Path, output: Path) -> list[str]:
    settings = {
        "teacher": study.teacher,
        "train_file": study.train_file,
        "output_dir": student,
        "seed": task.seed,
        "cache_teacher": True,
        "teacher_cache_dir": output / WORK / "teacher",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **task.settings,
    }
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
    tokens = tokenize(examples, tokenizer, labels, data.max_seq_length, longest)
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
        partial = path.with_suffix(".partial")
        save_file({name: classify(study.teacher, study, name)[0] for name in SPLITS}, partial)
        partial.replace(path)
    return path
