"""These tests need TRITON_INTERPRET=1 from the start of the process; see triton_interpreter.py."""

import os

import pytest
import triton_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.6's interpreter turns arrays of one element into numbers.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning")
