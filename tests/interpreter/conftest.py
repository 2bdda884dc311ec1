"""These tests need TRITON_INTERPRET=1 from the start of the process; see triton_interpreter.py."""

import os
from collections.abc import Iterator

import pytest
import torch
import triton_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.6's interpreter turns arrays of one element into numbers, and log(0) is meant.
    for warning in ("Conversion of an array:DeprecationWarning", "divide by zero:RuntimeWarning"):
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


@pytest.fixture(autouse=True)
def fill_empty_tensors_with_nan() -> Iterator[None]:
    """What a kernel forgets to write shows: torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
