"""What is shipped: wheel and sdist hold everything, an installed wheel works elsewhere."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from codir_fast import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with the sdist of this checkout and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_sdist_holds_all_sources(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = ("csrc/**/*", "kernels/*.py", "codir_fast/**/*.py", "tests/**/*.py", "tests/csrc/*")
    for pattern in (
        *sources,
        "docs/**/*.md",
        "benchmarks/**/*.py",
        "examples/*.py",
        "requirements/*.txt",
    ):
        files = [
            path
            for path in ROOT.glob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        ]
        assert files, pattern
        missing = {str(path.relative_to(ROOT)) for path in files} - names
        assert not missing, missing
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "Makefile"} <= names
    assert {".clang-format", ".pre-commit-config.yaml", ".ci/run"} <= names, "make lint needs them"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_binary_and_packages(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"codir_fast/_C{suffix}" in names
    for pattern, package in (
        ("codir_fast/**/*.py", "codir_fast"),
        ("kernels/*.py", "codir_fast/kernels"),
        ("benchmarks/**/*.py", "codir_fast/benchmarks"),
    ):
        base = ROOT / pattern.split("/")[0]
        expected = {f"{package}/{path.relative_to(base).as_posix()}" for path in ROOT.glob(pattern)}
        assert expected <= set(names)
    assert "codir_fast/py.typed" in names
    files = {name for name in names if not name.endswith((".py", suffix))}
    assert all(name == "codir_fast/py.typed" or ".dist-info/" in name for name in files)
    top = {name.split("/")[0] for name in names}
    assert top == {"codir_fast", f"codir_fast-{__version__}.dist-info"}


def test_installed_wheel_works_elsewhere(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([python, *install], check=True, capture_output=True)
    # torch is seen where it is installed for these tests; as plain folder names, so that the .pth
    # file of an editable codir_fast there is not obeyed.
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    program = """
import torch, codir_fast, codir_fast.kernels
print(codir_fast.__file__)
query, key, bank = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(99, 8)
codir_fast.ContrastiveLoss(backend="cpu")(query, key, bank).backward()
assert query.grad.abs().sum() > 0
"""
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "venv")
    script = tmp_path / "venv" / "bin" / "codir-fast"
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == f"codir-fast {__version__}\n", done.stderr
