"""One bad kernel costs one test: a test that hangs ends its process, and so does one that leaves
the GPU unusable. Under pytest-xdist another process takes the tests that are left.

CODIR_FAST_GPU_TEST_SECONDS bounds a test (60). CODIR_FAST_GPU_TEST_LOG names a file to which each
test's outcome is added as soon as it is known, a JSON object a line.
"""

import faulthandler
import json
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

_SECONDS = float(os.environ.get("CODIR_FAST_GPU_TEST_SECONDS", "60"))
_LOG = os.environ.get("CODIR_FAST_GPU_TEST_LOG")
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_LENGTH = 6000  # characters of a failure that are kept
_stderr = -1


def pytest_configure() -> None:
    global _stderr
    _stderr = os.dup(2)  # while a test runs, pytest keeps what is written to 2 itself


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    # From a thread of its own, without Python's lock: a call that waits for the GPU may hold that.
    faulthandler.dump_traceback_later(_SECONDS, exit=True, file=_stderr)
    try:
        result = yield
        _end_if_gpu_is_lost()
        return result
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_if_gpu_is_lost() -> None:
    """After an illegal access every later call of the process fails too."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"the GPU takes no more work from this process: {str(error).splitlines()[0]}"
        if not _IS_WORKER:
            pytest.exit(message, returncode=1)
        os.write(_stderr, f"{message}\n".encode())
        os._exit(1)


def pytest_runtest_logreport(report: Any) -> None:
    if _LOG is None or _IS_WORKER or (report.when != "call" and report.passed):
        return
    entry = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
    }
    if not report.passed:
        entry["why"] = report.longreprtext[-_LENGTH:]
    with open(_LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")
