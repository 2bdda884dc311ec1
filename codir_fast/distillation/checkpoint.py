"""Checkpoints: folders that are there whole or not at all, and that tell whether they still are.

A checkpoint is written beside its final name, gets a manifest, is put on disk and renamed. What a
crash leaves has a name that no reader looks for.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from codir_fast.distillation.manifest import DamagedFolder, read_manifest, verify, write_manifest
from codir_fast.errors import SaveError, UsageError

NAME = re.compile(r"checkpoint-(\d+)")
# Ends of the names of folders that are being written, and removed.
UNFINISHED, DISCARDED = ".unfinished", ".discarded"


@contextmanager
def written_checkpoint(
    final: Path, *, is_main: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end of the block.

    Of several processes, which all write into the same folder, the main one makes and finishes it.
    After an error the folder is gone, and what was at `final` is as it was.

    Args:
        final: name of the checkpoint, OUTPUT/checkpoint-STEP.
        is_main: whether this process is the main one.
        wait: returns once every process has called it.

    Raises:
        SaveError: the disk is full or fails.
    """
    there = _aside(final, UNFINISHED)
    with _nothing_left_of(there, final):
        if is_main:
            remove_leftovers(final.parent)
            there.mkdir(parents=True)
        wait()
        yield there
        wait()
        if is_main:
            newest = max((order for order, _ in checkpoints(final.parent)), default=-1)
            write_manifest(there, newest + 1)
            _sync_tree(there)
            _discard(final)
            os.rename(there, final)
            _sync(final.parent)
        wait()


@contextmanager
def replaced_files(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files take the place of those in `directory` at the end of the
    block, each of them whole; after an error in the block nothing has changed.

    Raises:
        SaveError: the disk is full or fails.
    """
    there = directory / f".files{UNFINISHED}"
    with _nothing_left_of(there, directory):
        _remove(there)
        there.mkdir(parents=True)
        yield there
        _sync_tree(there)
        for path in filter(Path.is_file, there.rglob("*")):
            target = directory / path.relative_to(there)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        _remove(there)
        _sync(directory)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end of the block, whole; after an
    error nothing has changed.

    Raises:
        SaveError: the disk is full or fails.
    """
    there = _aside(path, UNFINISHED)
    with _nothing_left_of(there, path):
        yield there
        _sync(there)
        os.replace(there, path)
        _sync(path.parent)


@contextmanager
def _nothing_left_of(there: Path, wanted: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _remove(there)
        cause = error.__cause__ if isinstance(error, SaveError) else error
        # The libraries in Rust give an error of the system in the text of one of their own.
        if isinstance(cause, OSError) or "(os error " in str(cause):
            raise SaveError(f"{wanted} can't be written: {cause}{advice(wanted)}") from cause
        raise


def advice(wanted: Path) -> str:
    """What a run that ended early can go on from, in words that begin with a semicolon; `wanted`:
    its folder, or a checkpoint in it.
    """
    directory = wanted.parent if NAME.fullmatch(wanted.name) else wanted
    known = [path.name for order, path in checkpoints(directory) if order >= 0]
    if not known:
        return ""
    return f"; {known[-1]} is there, --resume_from_checkpoint True goes on from it"


def whole_checkpoint(wanted: str) -> Path:
    """The folder, which is as it was written.

    Raises:
        UsageError: it is not.
    """
    try:
        verify(Path(wanted).resolve())
    except (DamagedFolder, OSError) as error:
        raise UsageError(
            f"`resume_from_checkpoint` must be the folder of a checkpoint, {wanted}: {error}"
        ) from error
    return Path(wanted)


def last_whole_checkpoint(output_dir: Path, say: Callable[[str], None]) -> Path:
    """The last checkpoint that is as it was written; `say` gets a line on each newer one.

    Raises:
        UsageError: there is none.
    """
    known = checkpoints(output_dir)
    # Those that can't tell when they were written come first: they may be the last.
    candidates = [path for order, path in known if order < 0]
    candidates += [path for order, path in reversed(known) if order >= 0]
    damaged = []
    for path in candidates:
        try:
            verify(path)
        except (DamagedFolder, OSError) as error:
            damaged.append(f"{path.name} is damaged: {error}")
            continue
        for line in damaged:
            say(f"{line}; resuming from {path.name}")
        return path
    advice = damaged or ["leave it out to start anew"]
    raise UsageError(
        "; ".join([f"`resume_from_checkpoint` found no checkpoint in {output_dir}", *advice])
    )


@contextmanager
def refusing(directory: Path) -> Iterator[None]:
    """Turns what goes wrong while files of a checkpoint are read into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever a reader makes of bytes that are not what it expects
        what = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        raise UsageError(
            f"`resume_from_checkpoint` does not fit this run, {directory}: {what}"
        ) from error


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit` (None or 0: none), those without a manifest
    first, but neither the newest nor `best`.
    """
    paths = [path for _, path in checkpoints(output_dir)]
    kept = {*paths[-1:]}
    if best is not None:
        kept |= {path for path in paths if path.resolve() == Path(best).resolve()}
    if limit:
        for path in [path for path in paths if path not in kept][: max(len(paths) - limit, 0)]:
            _discard(path)


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints and when they were written, the oldest first; -1 where that can't be read."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        name = NAME.fullmatch(path.name)
        if name and path.is_dir():
            try:
                order = read_manifest(path)["order"]
            except (DamagedFolder, OSError):
                order = -1
            found.append((order, int(name[1]), path))
    return [(order, path) for order, _, path in sorted(found)]


def is_leftover(path: Path) -> bool:
    """Whether a crash left this, while it was written or removed."""
    return path.name.startswith(".") and path.name.endswith((UNFINISHED, DISCARDED))


def remove_leftovers(output_dir: Path) -> None:
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else ():
        if is_leftover(path):
            _remove(path)


def _aside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _discard(path: Path) -> None:
    """Removes it under another name: half of it must not be taken for a checkpoint."""
    if os.path.lexists(path):
        aside = _aside(path, DISCARDED)
        _remove(aside)
        os.rename(path, aside)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until it is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
