"""Marks of tests that compile Triton kernels, with or without a GPU."""

import importlib.util
import platform
import sys

import pytest

MARKS = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="Triton's compiler and interpreter come for x86-64 Linux",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the triton package is not installed"
    ),
]
