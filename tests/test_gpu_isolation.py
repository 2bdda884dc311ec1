"""tests/gpu/isolation.py, without a GPU: what a test that hangs leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

GPU_TESTS = Path(__file__).resolve().parent / "gpu"
TESTS = """
import ctypes

def test_good():
    pass

def test_wrong():
    assert 1 == 2

def test_hangs():  # in C, with Python's lock held
    ctypes.PyDLL(None).sleep(600)
"""


def test_a_test_that_hangs_ends_its_process_and_what_was_before_is_known(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    log = tmp_path / "log.jsonl"
    settings = {
        "PYTHONPATH": os.pathsep.join([str(GPU_TESTS), os.environ.get("PYTHONPATH", "")]),
        "CODIR_FAST_GPU_TEST_SECONDS": "5",
        "CODIR_FAST_GPU_TEST_LOG": str(log),
    }
    flags = ["-q", "-c", str(GPU_TESTS / "pytest.ini"), "--rootdir", "."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "test_it.py"],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in test_hangs" in done.stderr
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(entry["test"].split("::")[1], entry["outcome"]) for entry in entries] == [
        ("test_good", "passed"),
        ("test_wrong", "failed"),
    ]
    assert "assert 1 == 2" in entries[1]["why"]


def test_other_tests_are_not_bounded_beside_those_of_the_gpu(tmp_path):
    """As in a run of everything, in which hooks of a conftest would reach all tests."""
    slow = "import time\n\ndef test_slow():\n    time.sleep(3)\n"
    (tmp_path / "test_it.py").write_text(slow, encoding="utf-8")
    flags = ["-q", "-c", str(GPU_TESTS.parent.parent / "pyproject.toml"), "-k", "test_slow"]
    files = [str(GPU_TESTS / "test_sanitizer.py"), str(tmp_path / "test_it.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *files],
        cwd=GPU_TESTS.parent.parent,
        env=os.environ | {"CODIR_FAST_GPU_TEST_SECONDS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
