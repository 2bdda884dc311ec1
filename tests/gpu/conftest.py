"""Tests that need a CUDA GPU: `make test-gpu`.

CODIR_FAST_GPU_TESTS_ON=cpu with TRITON_INTERPRET=1 runs those that don't look at the GPU itself on
CPU tensors by Triton's interpreter, slowly: a trial of the tests, where there is no GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from codir_fast.backend import resolve

# Where algorithms must be deterministic, cuBLAS wants this before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes
    torch.set_num_threads(min(2, torch.get_num_threads()))
ON = os.environ.get("CODIR_FAST_GPU_TESTS_ON", "cuda")
if ON == "cpu":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import triton_interpreter

    triton_interpreter.install()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(ON)


@pytest.fixture(scope="session")
def needs_gpu() -> None:
    if ON == "cpu":
        pytest.skip("looks at the GPU itself")


@pytest.fixture(scope="session")
def needs_cuda_backend() -> Callable[[str], None]:
    """Skips where the hand-written kernel of an operator can't run, with the reason."""

    def check(op: str) -> None:
        like = torch.empty(2, 64, dtype=torch.bfloat16, device=ON)
        try:
            resolve(op, "cuda", like)
        except RuntimeError as error:
            pytest.skip(str(error))

    return check


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fill_empty_tensors_with_nan() -> Iterator[None]:
    """What a kernel forgets to write shows: torch.empty gives NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
