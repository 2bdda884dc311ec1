"""Forward and backward of every form of the loss, as a GPU would run them, never wait for the host:
nothing depends on values and nothing is copied between devices, so that a CUDA graph can hold them.

Runs without a GPU, on meta tensors: a device that is not the CPU and has no values to look at.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codir_fast import ContrastiveLoss, IndexedBank, MemoryQueue
from codir_fast.ops import bank_contrast, bank_update, indexed_contrast
from codir_fast.ops.registration import overload

B, K, M, D = 4, 300, 6, 8
# The operators that a GPU runs by backend "torch" and what is behind them: meta tensors would take
# their shapes from the operator's fake implementation and never enter it.
BODIES = {
    overload("bank_contrast", "torch"): bank_contrast._torch,
    overload("bank_contrast_backward", "torch"): bank_contrast._torch_backward,
    overload("indexed_contrast", "torch"): indexed_contrast._torch,
    overload("indexed_contrast_backward", "torch"): indexed_contrast._torch_backward,
    overload("bank_update", "torch"): bank_update._torch,
}


class NoHostSync(TorchDispatchMode):
    """Enters the bodies of our operators, and raises at what a CUDA graph can't hold and a meta
    tensor can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in BODIES:
            self.entered.append(function)
            with self:
                return BODIES[function](*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        name, tensors = function.overloadpacket.__name__, list(flat_tensors(args))
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{function} with a mask looks for its nonzero elements"
        if name in ("_to_copy", "copy_"):
            tensors.append(result)
        else:  # a number of the host's can be an argument of a kernel
            tensors = [x for x in tensors if x.ndim > 0 or x.is_meta]
        devices = {x.device.type for x in tensors}
        assert len(devices) < 2, f"{function} copies between {sorted(devices)}"
        return result


def flat_tensors(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat_tensors(value)
        elif isinstance(value, Tensor):
            yield value


@pytest.fixture
def no_sync(monkeypatch):
    # Autocast knows no meta tensors; the loss only ever switches it off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with torch.device("meta"), NoHostSync() as watch:
        yield watch


def leaf(*shape, dtype=torch.float32, needs=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(needs)


def negatives(form, dtype):
    """Negatives of this form, and the arguments that go with them."""
    index = {"negative_index": torch.randint(0, K, (B, M))} if "index" in form else {}
    if form == "in-batch":
        return None, {}
    if form.startswith("own"):
        rows = leaf(B, M, D, dtype=dtype, needs="gradient" in form)
        return rows, {"negative_labels": torch.randint(0, 3, (B, M))}
    exclude = {"exclude_index": torch.randint(-1, K, (B,))}
    if "queue" in form:
        rows = torch.float8_e4m3fn if "float8" in form else torch.bfloat16
        queue = MemoryQueue(K, D, with_labels=True, dtype=rows)
        return queue, exclude | index
    if "bank" in form:
        return IndexedBank(K, D, labels=torch.randint(0, 3, (K,))), exclude | index
    rows = leaf(K, D, dtype=dtype, needs="gradient" in form)
    return rows, exclude | index | {"negative_labels": torch.randint(0, 3, (K,))}


FORMS = ("in-batch", "shared", "shared, gradient", "own", "own, gradient", "index")
FORMS += ("index, gradient", "queue", "bank", "queue by index", "bank by index", "float8 queue")


@pytest.mark.parametrize("more", [False, True], ids=["", "symmetric, learnt temperature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ["infonce", "nce", "nce, Z given"])
@pytest.mark.parametrize("form", FORMS)
def test_step(no_sync, form, objective, dtype, more):
    options = {"log_partition": 3.0} if objective == "nce, Z given" else {}
    options |= {"symmetric": more, "learnable_temperature": more}
    loss_fn = ContrastiveLoss(objective=objective.split(",")[0], **options)
    query, positive = leaf(B, D, dtype=dtype), leaf(B, D, dtype=dtype)
    rows, masks = negatives(form, dtype)
    masks |= {"labels": torch.randint(0, 3, (B,)), "weight": torch.rand(B)}
    for _ in range(2):  # Z of NCE is set at the first
        loss_fn(query, positive, rows, **masks).backward()
    assert query.grad.is_meta and query.grad.shape == (B, D)
    op = "indexed_contrast" if form.startswith("own") or "index" in form else "bank_contrast"
    expected = {overload(op, "torch")}
    if "gradient" in form or form == "in-batch":
        expected.add(overload(f"{op}_backward", "torch"))
    assert expected <= set(no_sync.entered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("with_labels", [False, True])
def test_enqueue(no_sync, with_labels, dtype):
    queue = MemoryQueue(K, D, with_labels=with_labels, dtype=dtype)
    for rows in (B, K + 1):
        labels = [torch.randint(0, 3, (rows,))] if with_labels else []
        queue.enqueue(leaf(rows, D), *labels)
    assert no_sync.entered == [overload("bank_update", "torch")] * 2


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(3, device="cpu").to(x.device),
    "copy from the host": lambda x: x.copy_(torch.zeros(3, device="cpu")),
    "index on the host": lambda x: x[torch.zeros(3, device="cpu", dtype=torch.int64)],
}


@pytest.mark.parametrize("name", WAITS)
def test_the_watch_sees_what_waits(no_sync, name):
    with pytest.raises((AssertionError, RuntimeError)):
        WAITS[name](torch.zeros(3))


def test_the_watch_lets_pass_what_does_not_wait(no_sync):
    x, number = torch.zeros(3), torch.full((), 2.0, device="cpu")
    x = (x * number)[torch.zeros(2, dtype=torch.int64)].masked_fill(torch.zeros(2) > 0, 1.0)
    assert x.is_meta
