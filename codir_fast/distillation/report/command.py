"""`codir-fast report`: reads folders of runs, measures what it is given the means for, writes the
page.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from codir_fast.distillation import arguments as args
from codir_fast.distillation.checkpoint import replaced_files
from codir_fast.distillation.data import read_file, select_columns
from codir_fast.distillation.evaluate import EvaluateArguments, measure
from codir_fast.distillation.report import sections
from codir_fast.distillation.report.bank import bank_statistics, evenly
from codir_fast.distillation.report.embeddings import Embeddings, embed, has_heads
from codir_fast.distillation.report.page import page
from codir_fast.distillation.report.runs import Run, parameters_in, read_json, read_runs
from codir_fast.errors import UsageError


@dataclass
class ReportArguments:
    """Where the page goes, and what it may measure with."""

    output: str = field(default="report.html", metadata={"help": "The page, one file of HTML."})
    test_file: str | None = field(
        default=None,
        metadata={"help": "Labelled texts to measure accuracy, latency and embeddings on."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "The runs' teacher: a folder or a hub name."}
    )
    num_sentences: int = field(
        default=300, metadata={"help": "Texts of test_file in the picture of the embeddings."}
    )
    batch_size: int = field(default=32, metadata={"help": "Texts that are run together."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."}
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"`output` must end in .html, got {self.output}")
        if self.num_sentences < 2:
            raise ValueError(f"`num_sentences` must be at least 2, got {self.num_sentences}")
        self.evaluation("", None)  # checks batch_size and device

    def evaluation(self, model: str, teacher: str | None) -> EvaluateArguments:
        test_file = str(self.test_file)
        return EvaluateArguments(model, test_file, teacher, self.batch_size, self.device)


def run(arguments: list[str]) -> int:
    """Writes one page about the runs."""
    classes = (ReportArguments, args.TextArguments)
    options, data, given = args.parse(
        "report", classes, arguments, positional=("runs", "Folders of runs.")
    )
    args.check_file("test_file", options.test_file)
    _check_output(Path(options.output))
    runs = read_runs(given.runs)
    banks = {f"{run.name}, {bank.name}": bank for run in runs for bank in bank_statistics(run.path)}
    texts = None
    if options.test_file is not None:
        texts = select_columns(read_file("test_file", options.test_file), "test_file", data)
    measured = _measure(runs, options, data) if texts is not None else {}
    found, labels = _embed(runs, options, data, texts)
    names = ", ".join(run.name for run in runs)
    text = page(
        f"Report: {names}",
        {
            "Results": sections.results_section(
                runs, measured, "--test_file" if texts is None else "runs of classifiers"
            ),
            "Settings": sections.settings_section(runs),
            "Training": sections.curves_section(runs),
            "Embeddings": sections.embeddings_section(found, labels, _wanted(runs, options)),
            "Memory banks": sections.banks_section(banks, _label_names(runs)),
        },
    )
    output = Path(options.output)
    with replaced_files(output.parent) as files:
        (files / output.name).write_text(text, encoding="utf-8")
    args.say(f"saved {output}")
    return 0


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise UsageError(f"`output` must be a file, {output} is a folder")
    there = next(path for path in output.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"`output` {output} can't be written: {there} is no folder to write in")


def _measure(
    runs: list[Run], options: ReportArguments, data: args.TextArguments
) -> dict[str, dict[str, Any]]:
    """What `codir-fast evaluate` gives of each classifier, the teacher first."""
    folders = {run.name: run.path for run in runs if _is_classifier(run.path)}
    if not folders:
        return {}
    teacher = options.teacher
    if teacher is not None and Path(teacher).is_dir():
        if not _is_classifier(Path(teacher)):
            teacher = None
        elif not any(Path(teacher).samefile(folder) for folder in folders.values()):
            name = "teacher" if "teacher" not in folders else teacher
            folders = {name: Path(teacher)} | folders
    results = {}
    for name, folder in folders.items():
        args.say(f"evaluating {name}")
        try:
            result = measure(options.evaluation(str(folder), teacher), data)
        except UsageError as error:
            raise UsageError(f"report: {name}: {error}") from error
        results[name] = {"parameters": parameters_in(folder), **result}
    return results


def _is_classifier(folder: Path) -> bool:
    """Whether it holds a model that `codir-fast evaluate` takes."""
    file = folder / "config.json"
    kinds = read_json(file).get("architectures") or [] if file.is_file() else []
    if not isinstance(kinds, list):
        raise UsageError(f"{file} must hold a list of `architectures`, got {kinds!r}")
    is_kind = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    return is_kind and parameters_in(folder) is not None


def _embed(
    runs: list[Run], options: ReportArguments, data: args.TextArguments, texts: Dataset | None
) -> tuple[dict[str, Embeddings], list[Any]]:
    """Embeddings of each run with heads, and the texts' labels."""
    if texts is None or options.teacher is None:
        return {}, []
    chosen = texts.select(evenly(len(texts), options.num_sentences).tolist())
    found = {}
    for run in filter(has_heads, runs):
        args.say(f"embedding {len(chosen)} texts, {run.name}")
        found[run.name] = embed(
            run, options.teacher, chosen, data, options.batch_size, options.device
        )
    return found, list(chosen["label"])


def _wanted(runs: list[Run], options: ReportArguments) -> str:
    """What the picture of the embeddings lacks."""
    heads = [run for run in runs if has_heads(run)]
    if not heads:
        return "No run has projection heads: give one of distill or pretrain with codir_weight > 0."
    flags = [f"--{name}" for name in ("test_file", "teacher") if not getattr(options, name)]
    teachers = {str((run.settings or {}).get("model", {}).get("teacher")) for run in heads}
    told = f" The teacher was {', '.join(sorted(teachers))}." if "--teacher" in flags else ""
    return f"The picture of student's and teacher's embeddings needs {' and '.join(flags)}.{told}"


def _label_names(runs: list[Run]) -> dict[int, str]:
    """Names of the labels, where all runs that know some agree."""
    known = []
    for run in runs:
        file = run.path / "config.json"
        names = read_json(file).get("id2label") if file.is_file() else None
        if isinstance(names, dict):
            if not all(str(number).isdecimal() for number in names):
                raise UsageError(f"{file} must hold an `id2label` of numbers, got {list(names)}")
            known.append({int(number): str(name) for number, name in names.items()})
    agree = known and all(names == known[0] for names in known)
    return known[0] if agree else {}
