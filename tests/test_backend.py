"""Which backend runs: the table, explicit names, and what is said when one can't."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

import codir_fast
from codir_fast import _C, backend
from codir_fast.bank_facts import Rows, rows_of


@dataclass
class Like:
    """What a backend is chosen by: a tensor's device, dtype and shape, on a GPU that need not be
    there.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (2, 8)


CPU, CUDA = Like(torch.device("cpu")), Like(torch.device("cuda", 0))
HALF = replace(CUDA, dtype=torch.bfloat16)


def set_capability(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    forget()


def forget():
    backend._capability_of.cache_clear()
    backend._remembered.cache_clear()


@pytest.fixture(autouse=True)
def ask_again():
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_capability(monkeypatch, 9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "_built_with_cuda", lambda: True)


def test_backends_says_what_runs_here_and_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = codir_fast.backends()
    assert tuple(status) == backend.NAMES
    assert status["torch"].available and status["cpu"].available
    assert status["torch"].ops == backend.OPS
    assert status["cpu"].ops == (*backend.OPS, "in_batch_contrast")
    assert all(isinstance(entry.reason, str) and entry.reason for entry in status.values())
    assert status["cuda"].ops == ("masked_pool", "bank_contrast")
    if not torch.cuda.is_available():
        assert not status["triton"].available and "CUDA GPU" in status["triton"].reason
        assert not status["cuda"].available and "CUDA" in status["cuda"].reason


@pytest.mark.parametrize("symmetric", [False, True])
def test_who_fuses_in_batch_losses(symmetric):
    for name, like in (("auto", CPU), ("cpu", CPU)):
        assert backend.in_batch_backend(name, like, symmetric) == "cpu"
    for name, like in (("torch", CPU), ("auto", Like(torch.device("meta")))):
        assert backend.in_batch_backend(name, like, symmetric) is None


def test_who_fuses_in_batch_losses_on_a_gpu(gpu, monkeypatch):
    few, many = (replace(HALF, shape=(n, 128)) for n in (5792, 5793))
    assert backend.resolve("bank_contrast", "auto", few) == "cuda"
    for name in ("auto", "triton"):
        assert backend.in_batch_backend(name, few, False) == "triton"
        assert backend.in_batch_backend(name, many, True) == "triton"
        assert backend.in_batch_backend(name, many, False) is None
    for name in ("torch", "cuda"):
        assert backend.in_batch_backend(name, few, True) is None
    symbolic = replace(few, shape=(object(), 128))  # as torch.compile has B: nothing is asked of it
    assert backend.in_batch_backend("triton", symbolic, False) is None
    assert backend.in_batch_backend("triton", symbolic, True) == "triton"
    for other in (replace(few, dtype=torch.float64), replace(few, shape=(2, 5000))):
        assert backend.in_batch_backend("auto", other, True) is None
    backend._remembered.cache_clear()
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert backend.in_batch_backend("auto", few, True) is None


@pytest.mark.parametrize("op", backend.OPS)
def test_auto(op):
    assert backend.resolve(op, "auto", CPU) == "cpu"
    assert backend.resolve(op, "auto", Like(torch.device("meta"))) == "torch"


@pytest.mark.parametrize("op", backend.OPS)
def test_auto_on_a_gpu(op, gpu, monkeypatch):
    shown = replace(HALF, shape=(2, 128))
    has_cuda = op in ("masked_pool", "bank_contrast")
    assert backend.resolve(op, "auto", shown) == ("cuda" if has_cuda else "triton")
    assert backend.resolve(op, "auto", CUDA) == "triton"
    others = "triton" if op == "masked_pool" else "torch"
    assert backend.resolve(op, "auto", replace(CUDA, dtype=torch.float64)) == others
    assert backend.resolve(op, "auto", replace(CUDA, shape=(2, 5000))) == others
    set_capability(monkeypatch, 10, 0)  # where the hand-written kernels were not timed
    assert backend.resolve(op, "auto", shown) == "triton"
    set_capability(monkeypatch, 7, 5)
    assert backend.resolve(op, "auto", CUDA) == "torch"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert backend.resolve(op, "auto", CUDA) == "torch"


@pytest.mark.parametrize(
    ("like", "rows"),
    [
        (replace(HALF, shape=(2, 128)), Rows(warm=False)),
        (replace(HALF, shape=(2, 512)), Rows(warm=False)),
        (replace(HALF, shape=(2, 256), dtype=torch.float16), Rows()),
    ],
)
def test_auto_takes_triton_where_no_result_shows_the_hand_written_kernel_faster(like, rows, gpu):
    assert backend.resolve("bank_contrast", "auto", like, rows) == "triton"
    assert backend.resolve("bank_contrast", "cuda", like, rows) == "cuda"


@pytest.mark.parametrize(
    ("dtype", "D", "rows"),
    [
        (torch.bfloat16, 8, Rows()),
        (torch.bfloat16, 256, Rows()),
        (torch.float16, 512, Rows()),
        (torch.float16, 64, Rows(masked=True)),
        (torch.bfloat16, 128, Rows(masked=True, warm=False)),
    ],
)
def test_auto_takes_the_hand_written_kernel_where_a_result_shows_it_faster(
    dtype, D, rows, gpu, monkeypatch
):
    like = replace(HALF, shape=(2, D), dtype=dtype)
    assert backend.resolve("bank_contrast", "auto", like, rows) == "cuda"
    set_capability(monkeypatch, 8, 0)
    assert backend.resolve("bank_contrast", "auto", like, rows) == "triton"


class OnGpu(torch.Tensor):
    """As on a GPU that need not be there."""

    is_cuda = True


def make_bank(offset=0):
    """Rows that begin so many elements after a multiple of 16 bytes."""
    return torch.zeros(64, dtype=torch.bfloat16)[offset:].as_subclass(OnGpu)


def test_what_is_told_of_rows():
    warm, cold, label = torch.tensor(1 / 0.07), torch.tensor(1 / 0.02), torch.zeros(3)
    of = rows_of
    bank = make_bank()
    assert of(bank, None, warm) == Rows(torch.bfloat16)
    assert not of(bank, None, warm, None, None).masked
    assert of(bank, None, warm, None, label).masked
    assert not of(bank, None, cold).warm
    assert not of(bank, None, torch.empty((), device="meta")).warm  # as on a device: not known
    assert of(bank, label, warm).scaled
    assert of(make_bank(8), None, warm).aligned and not of(make_bank(1), None, warm).aligned
    # An allocation of others' may begin anywhere.
    foreign = torch.frombuffer(bytearray(64), dtype=torch.bfloat16, offset=2).as_subclass(OnGpu)
    assert foreign.storage_offset() == 0 and foreign.data_ptr() % 16 != 0
    assert not of(foreign, None, warm).aligned


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
        ("cuda", "bank_contrast", CPU, "it takes bfloat16 and float16, `query` is torch.float32"),
        ("cuda", "bank_contrast", replace(CPU, dtype=torch.float16), "tensors on a CUDA GPU"),
        ("cuda", "bank_contrast", replace(HALF, shape=(2, 520)), "D is 520, it takes multiples of"),
        ("cuda", "bank_contrast", replace(HALF, shape=(2, 12)), "D is 12, it takes multiples of 8"),
        ("cuda", "masked_pool", CPU, "it needs tensors on a CUDA GPU"),
        ("cuda", "indexed_contrast", HALF, "it has no indexed_contrast"),
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


def test_cuda_on_a_gpu(gpu, monkeypatch):
    assert backend.resolve("bank_contrast", "cuda", HALF, Rows(torch.bfloat16)) == "cuda"
    assert backend.resolve("masked_pool", "cuda", replace(CUDA, dtype=torch.float64)) == "cuda"
    with pytest.raises(RuntimeError, match="the bank torch.float32: it needs one dtype"):
        backend.resolve("bank_contrast", "cuda", HALF, Rows(torch.float32))
    assert backend.backends()["cuda"].available
    set_capability(monkeypatch, 10, 0)
    assert "bank_contrast needs sm_90" in backend.backends()["cuda"].reason
    with pytest.raises(RuntimeError, match="it needs a Hopper GPU, sm_90; backends that can: "):
        backend.resolve("bank_contrast", "cuda", HALF)
    assert backend.resolve("masked_pool", "cuda", HALF) == "cuda"
    set_capability(monkeypatch, 7, 5)
    with pytest.raises(RuntimeError, match="the GPU is sm_75, the kernels need sm_80 or newer"):
        backend.resolve("masked_pool", "cuda", HALF)
    monkeypatch.setattr(backend, "_built_with_cuda", lambda: False)
    with pytest.raises(RuntimeError, match="has no CUDA part: made without nvcc"):
        backend.resolve("masked_pool", "cuda", HALF)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (Rows(torch.bfloat16, scaled=True), "keep them in a bank, or normalise them and `query`"),
        (Rows(torch.bfloat16, aligned=False), "`bank` must begin at a multiple of 16 bytes"),
        (Rows(torch.float8_e4m3fn, scaled=True), "the bank torch.float8_e4m3fn: it needs one dty"),
    ],
)
def test_rows_that_cuda_does_not_take(rows, reason, gpu):
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        backend.resolve("bank_contrast", "cuda", HALF, rows)
    assert backend.resolve("bank_contrast", "auto", HALF, rows) == "triton"


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize("op", backend.backends()["cuda"].ops)
def test_operators_are_there_for_cuda_tensors(op):
    for name in (op, f"{op}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"codir_fast::{name}", "CUDA")


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend 'triton' can't run masked_pool on cpu: "):
        codir_fast.pool_hidden_states(torch.ones(1, 2, 3), backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_capability(monkeypatch, 7, 5)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert "sm_75, the kernels need sm_80 or newer" in backend.backends()["triton"].reason
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert "not installed" in backend.backends()["triton"].reason


def test_loss_and_pooling_pass_the_name_on():
    query = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run bank_contrast on cpu"):
        codir_fast.ContrastiveLoss(backend="cuda")(query, query)


def test_triton_beside_a_backend(gpu, monkeypatch):
    """It makes unit rows for itself and for the hand-written kernels, where it is there."""
    shown = replace(HALF, shape=(2, 128))
    assert backend.resolve("bank_contrast", "auto", shown) == "cuda"
    for name, tensor, expected in (
        ("auto", shown, True),
        ("auto", CUDA, True),
        ("cuda", shown, True),
        ("triton", HALF, True),
        ("torch", HALF, False),
        ("auto", replace(CUDA, dtype=torch.float64), False),
        ("auto", replace(CUDA, shape=(2, 5000)), False),
        ("auto", CPU, False),
    ):
        assert backend.runs_triton(name, tensor) == expected, (name, tensor)
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    forget()
    assert backend.resolve("bank_contrast", "auto", shown) == "cuda"
    assert not backend.runs_triton("auto", shown) and not backend.runs_triton("auto", CUDA)
