"""run.json: every resolved setting of a run, in its folder before the first step."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from codir_fast.distillation.checkpoint import replaced_files
from codir_fast.version import __version__

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors")


def run_settings(command: str, **parts: Any) -> dict[str, Any]:
    """What run.json holds: the command, the versions of what ran it, and each of its filled
    dataclasses under its name. Tokens are masked, as TrainingArguments masks them.
    """
    settings = {
        name: part.to_dict() if isinstance(part, TrainingArguments) else asdict(part)
        for name, part in parts.items()
    }
    return {"command": command, "versions": versions(), "settings": settings}


def versions() -> dict[str, str]:
    """Of codir-fast, Python and the packages that a run depends on."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"codir-fast": __version__, "python": platform.python_version(), **packages}


def save_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Writes run.json, into a folder that is made where it is missing."""
    text = json.dumps(settings, indent=2) + "\n"
    with replaced_files(directory) as files:
        (files / RUN_FILE).write_text(text, encoding="utf-8")
