"""The file of a study, and the runs that it asks for."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from codir_fast.distillation.arguments import TextArguments
from codir_fast.errors import UsageError

SPLITS = ("validation", "test")
LONGEST_NAME = 60  # of an arm or a regime; file systems take 255 bytes, a character has up to 4
OF_TEXTS = {field.name for field in fields(TextArguments)}
# Flags of distill that are no settings of a run, and why: a study gives them itself, or judges its
# runs otherwise.
REFUSED = {
    "seed": "seeds are those of `seeds` and `trial_seeds`",
    **dict.fromkeys(("teacher", "train_file"), "the study has one for all runs"),
    **dict.fromkeys(
        ("output_dir", "overwrite_output_dir", "teacher_cache_dir", "resume_from_checkpoint"),
        "the study has a folder for each run, and starts it anew",
    ),
    **dict.fromkeys(
        ("validation_file", "validation_split", "dataset_name", "dataset_config"),
        "texts are those of the study's `train_file`, `validation_file` and `test_file`",
    ),
}


@dataclass
class Study:
    """What the file of a study says. Settings are flags of `codir-fast distill`, without dashes.

    Args:
        teacher: folder of the fine-tuned classifier.
        train_file, validation_file, test_file: labelled texts. Settings are chosen, and
            temperatures fitted, on the validation file; what is reported is of the test file.
        reference: the arm that differences are taken to.
        settings: of all runs.
        regimes: name -> settings, such as the number of examples and epochs.
        arms: name -> settings, as they were chosen.
        seeds: of the runs.
        trials: arm -> settings to try, each with all of `trial_seeds` in `trial_regime`.
    """

    teacher: str
    train_file: str
    validation_file: str
    test_file: str
    reference: str
    regimes: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    trial_seeds: list[int] = field(default_factory=list)
    trial_regime: str = ""

    def __post_init__(self) -> None:
        for name in ("regimes", "arms", "settings", "trials"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"`{name}` must be a mapping, got {getattr(self, name)!r}")
        for name in ("teacher", "train_file", "validation_file", "test_file"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be a path, got {getattr(self, name)!r}")
        self._check_groups()
        for name in ("reference", "trial_regime"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"`{name}` must be a name, got {getattr(self, name)!r}")
        if self.reference not in self.arms:
            raise ValueError(
                f"`reference` must be an arm, {list(self.arms)}, got {self.reference!r}"
            )
        if self.trials and self.trial_regime not in self.regimes:
            raise ValueError(
                f"`trial_regime` must be a regime, {list(self.regimes)}, got {self.trial_regime!r}"
            )
        for name in ("seeds", "trial_seeds"):
            seeds = getattr(self, name)
            if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
                raise ValueError(f"`{name}` must be a list of integers, got {seeds!r}")
        if set(self.seeds) & set(self.trial_seeds):
            raise ValueError("`seeds` and `trial_seeds` must have none in common")
        self.texts()

    def _check_groups(self) -> None:
        _check_settings("`settings`", self.settings)
        for group, name, settings in self._groups():
            if not isinstance(settings, dict):
                raise ValueError(
                    f"`{group}` must hold mappings of settings, {name} is {settings!r}"
                )
            _check_settings(f"{name} in `{group}`", settings)
            if shared := sorted(OF_TEXTS & settings.keys()):
                raise ValueError(
                    f"`{shared[0]}` must be in the `settings` of all runs, which are judged on the "
                    f"same texts, not of {name} in `{group}`"
                )

    def _groups(self) -> Iterator[tuple[str, str, Any]]:
        """Where settings of some runs stand, and what stands there."""
        for group in ("regimes", "arms", "trials"):
            for name in getattr(self, group):
                _check_name(group, name)
        for group in ("regimes", "arms"):
            for name, settings in getattr(self, group).items():
                yield group, repr(name), settings
        for arm, tried in self.trials.items():
            if not isinstance(tried, list):
                raise ValueError(f"`trials` must hold lists, {arm!r} is {tried!r}")
            for number, settings in enumerate(tried, 1):
                yield "trials", f"{number} of {arm!r}", settings

    def texts(self) -> TextArguments:
        """How texts are read, by runs and when they are judged."""
        given = {name: self.settings[name] for name in OF_TEXTS & self.settings.keys()}
        for name, value in given.items():
            kind, wanted = (int, "an integer") if name == "max_seq_length" else (str, "a text")
            if type(value) is not kind and value is not None:
                raise ValueError(f"`{name}` in `settings` must be {wanted}, got {value!r}")
        return TextArguments(**given)


def _check_name(group: str, name: Any) -> None:
    """Refuses what can't be part of a file's name, or stand in a line of the table."""
    if not isinstance(name, str):
        raise ValueError(f"`{group}` must have names that are text, got {name!r}")
    is_path = "/" in name or name in (".", "..")
    if is_path or not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(
            f"`{group}` must have names of 1 to {LONGEST_NAME} characters that are no paths, as "
            f"files are named by them, got {name!r}"
        )


def _check_settings(place: str, settings: dict[Any, Any]) -> None:
    """Refuses what is no setting of a run, or would be another one when it is a flag."""
    for name in settings:
        if not str(name).isidentifier():
            raise ValueError(f"{place} must hold flags' names with underscores, got {name!r}")
        if name in REFUSED:
            raise ValueError(f"`{name}` can't be in {place}: {REFUSED[name]}")
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} must hold texts, numbers and switches: {error}") from error


@dataclass(frozen=True)
class Run:
    """One distillation: flags of distill, and what the line about it says of it."""

    arm: str
    regime: str
    seed: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"arm {self.arm}, regime {self.regime}, seed {self.seed}"

    def key(self, inputs: str) -> str:
        """Tells runs apart by settings, seed and the contents of the files they read."""
        text = json.dumps([self.settings, self.seed, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_study(path: str) -> Study:
    """The study in a YAML file.

    Raises:
        UsageError: no such file, no YAML, or settings that are missing, unknown or of no sense.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: a date that is none
        raise UsageError(f"study: {path} can't be read: {error}") from error
    except RecursionError as error:
        raise UsageError(f"study: {path} can't be read: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise UsageError(f"study: {path} must hold a mapping, got {type(content).__name__}")
    _check_keys(path, content)
    try:
        return Study(**content)
    except (TypeError, ValueError) as error:
        raise UsageError(f"study: {path}: {error}") from error


def _check_keys(path: str, content: dict[Any, Any]) -> None:
    """Refuses keys of a study that are unknown or missing."""
    known = {key.name: key for key in fields(Study)}
    if unknown := [key for key in content if key not in known]:
        raise UsageError(f"study: {path} has an unknown key {unknown[0]!r}, known: {list(known)}")
    needed = [name for name, key in known.items() if MISSING is key.default is key.default_factory]
    if missing := [name for name in needed if name not in content]:
        raise UsageError(f"study: {path} must have the keys {needed}, it lacks {missing}")


def runs_of(study: Study) -> Iterator[Run]:
    """Seed by seed, so that arms can be compared early."""
    for regime in study.regimes:
        for seed in study.seeds:
            for arm, settings in study.arms.items():
                yield _task(study, arm, regime, seed, settings)


def trials_of(study: Study) -> Iterator[Run]:
    for seed in study.trial_seeds:
        for arm, trials in study.trials.items():
            for settings in trials:
                yield _task(study, arm, study.trial_regime, seed, settings)


def _task(study: Study, arm: str, regime: str, seed: int, settings: dict[str, Any]) -> Run:
    return Run(arm, regime, seed, {**study.settings, **study.regimes[regime], **settings})
