"""Lines of a study, one for each run that is done: their reading, writing and matching to runs."""

import json
from collections import defaultdict
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from codir_fast.distillation.study_plan import SPLITS, Run
from codir_fast.distillation.study_report import METRICS, Line
from codir_fast.errors import SaveError, UsageError

# What every line has, beside scores.
FIELDS = {
    **dict.fromkeys(("key", "arm", "regime"), str),
    "seed": int,
    **dict.fromkeys(("settings", *SPLITS), dict),
}


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, but for a last one that was cut off.

    Raises:
        UsageError: a line is no JSON, or lacks what tables are made of.
    """
    lines = path.read_bytes().splitlines(True) if path.is_file() else []
    return [
        _read_line(text, f"line {number} of {path}")
        for number, text in enumerate(lines, 1)
        if text.endswith(b"\n")
    ]


def _read_line(text: bytes, place: str) -> Line:
    try:
        line = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise UsageError(f"study: {place} is no JSON: {error}") from error
    if fault := fault_of(line):
        raise UsageError(f"study: {place} can't be used: {fault}")
    return line


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its numbers")


def fault_of(line: Any) -> str | None:
    """What keeps a line from being used, if anything does."""
    if not isinstance(line, dict):
        return f"it must be a mapping, got {line!r}"
    for name, kind in FIELDS.items():
        if not isinstance(line.get(name), kind):
            return f"`{name}` must be of type {kind.__name__}, got {line.get(name)!r}"
    numbers = {"`seconds_per_step`": line.get("seconds_per_step")}
    numbers |= {
        f"`{name}` in `{split}`": line[split].get(name) for split in SPLITS for name in METRICS
    }
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not isfinite(number):
            return f"{name} must be a finite number, got {number!r}"
    return None


def add_lines(path: Path, lines: Iterable[Line]) -> None:
    """Writes each line as it comes, in place of a last one that an earlier call did not finish.

    Raises:
        SaveError: the disk is full or fails.
    """
    path.touch()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)
    for line in lines:
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise SaveError(f"study: {path} can't be written: {error}") from error


def lines_of(runs: Iterable[tuple[Run, str]], lines: Iterable[Line]) -> list[Line]:
    """The lines that have the key of a run, in their order, under the run's arm and regime: the
    file of the study may have renamed them since. Runs of one key have a line each.

    Args:
        runs: each with its key.
    """
    names: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for run, key in runs:
        names[key][run.arm, run.regime] = None
    return [
        {**line, "arm": arm, "regime": regime}
        for key, line in {line["key"]: line for line in lines}.items()
        for arm, regime in names.get(key, ())
    ]
