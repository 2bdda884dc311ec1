"""Which backend runs: the table, explicit names, and what is said when one can't."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

import codir_fast
from codir_fast import backend


@dataclass
class Like:
    """What a backend is chosen by: a tensor's device, dtype and shape, on a GPU that need not be
    there.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (2, 8)


CPU, CUDA = Like(torch.device("cpu")), Like(torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(backend, "_has_triton", lambda: True)


def test_backends_says_what_runs_here_and_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = codir_fast.backends()
    assert tuple(status) == backend.NAMES
    assert status["torch"].available and status["cpu"].available
    assert status["cpu"].ops == status["torch"].ops == backend.OPS
    assert all(isinstance(entry.reason, str) and entry.reason for entry in status.values())
    assert not status["cuda"].available and "no hand-written CUDA kernel" in status["cuda"].reason
    if not torch.cuda.is_available():
        assert not status["triton"].available and "CUDA GPU" in status["triton"].reason


@pytest.mark.parametrize("op", backend.OPS)
def test_auto(op):
    assert backend.resolve(op, "auto", CPU) == "cpu"
    assert backend.resolve(op, "auto", Like(torch.device("meta"))) == "torch"


@pytest.mark.parametrize("op", backend.OPS)
def test_auto_on_a_gpu(op, gpu, monkeypatch):
    assert backend.resolve(op, "auto", CUDA) == "triton"
    assert backend.resolve(op, "auto", replace(CUDA, dtype=torch.bfloat16)) == "triton"
    others = "triton" if op == "masked_pool" else "torch"
    assert backend.resolve(op, "auto", replace(CUDA, dtype=torch.float64)) == others
    assert backend.resolve(op, "auto", replace(CUDA, shape=(2, 5000))) == others
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert backend.resolve(op, "auto", CUDA) == "torch"
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert backend.resolve(op, "auto", CUDA) == "torch"


def test_the_table_names_what_exists():
    for (_, op), names in backend.AUTO.items():
        assert all(op in backend.backends()[name].ops for name in names)


def test_explicit_names():
    assert backend.resolve("bank_contrast", "torch", CUDA) == "torch"
    assert backend.resolve("bank_contrast", "cpu", CPU) == "cpu"


def test_unknown_name():
    message = "`backend` must be one of ('auto', 'torch', 'cpu', 'triton', 'cuda'), got 'gpu'"
    with pytest.raises(ValueError, match=re.escape(message)):
        backend.resolve("masked_pool", "gpu", CPU)


@pytest.mark.parametrize(
    ("name", "op", "device", "reason"),
    [
        ("cpu", "bank_contrast", CUDA, "it needs tensors on the CPU; backends that can: ['torch']"),
        ("cuda", "bank_contrast", CPU, "no hand-written CUDA kernel"),
        ("triton", "bank_update", CPU, "needs tensors on a CUDA GPU; backends that can: ['torch',"),
        ("triton", "bank_update", replace(CUDA, dtype=torch.float64), "it has no float64"),
        ("triton", "bank_contrast", replace(CUDA, shape=(2, 5000)), "D is 5000, it takes up to"),
    ],
)
def test_a_backend_that_cannot_run_says_why(name, op, device, reason, gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if device is CUDA and name == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        backend.resolve(op, name, device)


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' can't run masked_pool on cpu: "):
        codir_fast.pool_hidden_states(torch.ones(1, 2, 3), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    assert "sm_75, the kernels need sm_80 or newer" in backend.backends()["triton"].reason
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert "not installed" in backend.backends()["triton"].reason


def test_loss_and_pooling_pass_the_name_on():
    query = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run bank_contrast on cpu"):
        codir_fast.ContrastiveLoss(backend="cuda")(query, query)
