"""The file of a study, and the runs that it asks for."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from codir_fast.distillation.arguments import TextArguments
from codir_fast.errors import UsageError

OF_TEXTS = {field.name for field in fields(TextArguments)}


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
        if self.reference not in self.arms:
            raise ValueError(
                f"`reference` must be an arm, {list(self.arms)}, got {self.reference!r}"
            )
        if self.trials and self.trial_regime not in self.regimes:
            raise ValueError(
                f"`trial_regime` must be a regime, {list(self.regimes)}, got {self.trial_regime!r}"
            )
        for seeds in (self.seeds, self.trial_seeds):
            if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
                raise ValueError(f"`seeds` must be a list of integers, got {seeds!r}")
        if set(self.seeds) & set(self.trial_seeds):
            raise ValueError("`seeds` and `trial_seeds` must have none in common")
        self.texts()

    def _check_groups(self) -> None:
        groups: list[tuple[str, dict[Any, Any]]] = [("regimes", self.regimes), ("arms", self.arms)]
        groups += [("trials", dict(enumerate(tried))) for tried in self._tried()]
        for name, group in groups:
            for key, settings in group.items():
                if not isinstance(settings, dict):
                    raise ValueError(
                        f"`{name}` must hold mappings of settings, {key!r} is {settings!r}"
                    )
                if shared := sorted(OF_TEXTS & settings.keys()):
                    raise ValueError(
                        f"`{shared[0]}` must be in the `settings` of all runs, which are judged on "
                        f"the same texts, not of {key!r} in `{name}`"
                    )

    def _tried(self) -> Iterator[list[Any]]:
        for arm, tried in self.trials.items():
            if not isinstance(tried, list):
                raise ValueError(f"`trials` must hold lists, {arm!r} is {tried!r}")
            yield tried

    def texts(self) -> TextArguments:
        """How texts are read, by runs and when they are judged."""
        given = {name: self.settings[name] for name in OF_TEXTS & self.settings.keys()}
        return TextArguments(**given)


@dataclass(frozen=True)
class Run:
    """One distillation: flags of distill, and what the line about it says of it."""

    arm: str
    regime: str
    seed: int
    settings: dict[str, Any]

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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"study: {path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"study: {path} must hold a mapping, got {type(content).__name__}")
    try:
        return Study(**content)
    except (TypeError, ValueError) as error:
        raise UsageError(f"study: {path}: {error}") from error


def runs_of(study: Study, regimes: Iterable[str]) -> Iterator[Run]:
    """Seed by seed, so that arms can be compared early."""
    for regime in regimes:
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
