"""A folder's manifest: size and SHA-256 of every file, so that damage is recognised."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"


class DamagedFolder(ValueError):
    """Says what is wrong with a folder, without its name."""


def write_manifest(directory: Path, order: int) -> None:
    """Names every file in the folder and below, without hidden ones.

    Args:
        directory: the folder, complete.
        order: how many folders of its kind were written before.
    """
    files = {
        name: {"size": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in _files(directory)
    }
    text = json.dumps({"order": order, "files": files}, indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def verify(directory: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        DamagedFolder: what differs first.
    """
    if directory.is_symlink():
        raise DamagedFolder("it is a link")
    expected = read_manifest(directory)["files"]
    found = set(_files(directory)) - {MANIFEST}
    for name in sorted(expected.keys() - found):
        raise DamagedFolder(f"{name} is missing")
    for name in sorted(found - expected.keys()):
        raise DamagedFolder(f"{name} is not in its {MANIFEST}")
    for name, entry in expected.items():
        size = (directory / name).stat().st_size
        if size != entry["size"]:
            raise DamagedFolder(f"{name} has {size} bytes, {entry['size']} were written")
    for name, entry in expected.items():
        if _sha256(directory / name) != entry["sha256"]:
            raise DamagedFolder(f"{name} is not as it was written (SHA-256)")


def read_manifest(directory: Path) -> dict[str, Any]:
    """{"order": int, "files": {name: {"size": int, "sha256": str}}}; names lead out of no folder.

    Raises:
        DamagedFolder: there is none, or it is of another form.
    """
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise DamagedFolder(f"it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFolder(f"{MANIFEST} is no JSON") from error
    try:
        order, files = manifest["order"], manifest["files"]
        entries = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedFolder(f"{MANIFEST} holds no order and files") from error
    if not isinstance(order, int) or order < 0:
        raise DamagedFolder(f"{MANIFEST} holds no order and files")
    for name, size, sha256 in entries:
        if not is_inside(name):
            raise DamagedFolder(f"{MANIFEST} names {name}, outside of the folder")
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise DamagedFolder(f"{MANIFEST} holds no size and SHA-256 of {name}")
    return manifest


def is_inside(name: str) -> bool:
    """Whether this is a relative path that leads out of no folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _files(directory: Path) -> Iterator[str]:
    """Names of the files in a folder and below, without hidden ones, in order.

    Raises:
        DamagedFolder: a link, or what is no file.
    """
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            raise DamagedFolder(f"{name} is a link")
        if path.is_file():
            yield name.as_posix()
        elif not path.is_dir():
            raise DamagedFolder(f"{name} is no file")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
