"""The output folder of a run: what may be written there, and which checkpoint there is to go on
from.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from transformers import TrainingArguments

from codir_fast.distillation.arguments import say
from codir_fast.distillation.checkpoint import (
    is_leftover,
    last_whole_checkpoint,
    whole_checkpoint,
)
from codir_fast.distillation.processes import keep_timeout, telling_of_loss, wait_for_all
from codir_fast.distillation.run_settings import RUN_FILE
from codir_fast.errors import UsageError


@dataclass
class OutputArguments:
    """What may happen to the output folder."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into an output_dir that is not empty."}
    )


def check_output(
    training: TrainingArguments, output: OutputArguments, **models: str | None
) -> None:
    """Refuses to mix a run with what is there, before anything is written; `models`: where the
    models that it begins with are.
    """
    if not training.output_dir:
        raise UsageError("`output_dir` must be given")
    directory = Path(training.output_dir)
    keep_timeout(training)
    if _is_used(directory) and not (output.overwrite_output_dir or resumes(training)):
        raise UsageError(
            f"`output_dir` must be empty, {directory} is not; give --overwrite_output_dir to write "
            "into it or --resume_from_checkpoint to go on"
        )
    for name, model in models.items():
        if model is not None and _is_same(Path(model), directory):
            raise UsageError(f"`output_dir` must not be the folder of `{name}`, {model}")
    with telling_of_loss(training):
        wait_for_all(training)  # else another process may see what the first one writes below
        if training.should_save:
            _check_writable(directory)
        wait_for_all(training)  # the others end here where the first one may not write


def _is_same(model: Path, directory: Path) -> bool:
    try:
        return model.samefile(directory)
    except (OSError, ValueError):  # one of them is not there
        return False


def _is_used(directory: Path) -> bool:
    try:
        return directory.is_dir() and not all(map(_is_of_a_start, directory.iterdir()))
    except (OSError, ValueError):  # no folder, and none that can be made, which is told after
        return False


def _is_of_a_start(path: Path) -> bool:
    """Whether a run that ended before its first checkpoint left this: nothing is lost with it."""
    if path.name == "runs" and path.is_dir():  # the log for TensorBoard
        files = [file for file in path.rglob("*") if not file.is_dir()]
        return all(file.name.startswith("events.out.tfevents.") for file in files)
    return is_leftover(path) or path.name == RUN_FILE


def _check_writable(directory: Path) -> None:
    """Makes the folder and a file in it, and leaves nothing behind."""
    missing: list[Path] = []
    try:
        missing += [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"`output_dir` must be a folder to write in, {directory}: {reason}"
        ) from error
    finally:
        for path in missing:
            with suppress(OSError, ValueError):
                path.rmdir()


def resumes(training: TrainingArguments) -> bool:
    """Whether the run goes on from a checkpoint."""
    return str(training.resume_from_checkpoint).lower() not in ("none", "false")


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The folder that --resume_from_checkpoint means: itself, or for True the output's last one;
    it is as it was written.
    """
    if not resumes(training):
        return None
    wanted = str(training.resume_from_checkpoint)
    if wanted.lower() == "true":
        return str(last_whole_checkpoint(Path(str(training.output_dir)), say))
    return str(whole_checkpoint(wanted))
