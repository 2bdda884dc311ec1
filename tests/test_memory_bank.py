"""MemoryQueue and IndexedBank: order, state, and what they refuse."""

import copy
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import codir_fast
from codir_fast.ops import bank_update


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def queue_of(size, keys, **options):
    queue = codir_fast.MemoryQueue(size, keys.shape[1], **options)
    queue.enqueue(keys, *([torch.arange(len(keys))] if options.get("with_labels") else []))
    return queue


def test_queue_is_first_in_first_out():
    keys = unit(40, 3)
    queue = codir_fast.MemoryQueue(7, 3, with_labels=True)
    begin = 0
    for n in (3, 0, 2, 3, 7, 1, 10, 6, 8):  # no divisor of 7, exactly 7, more than 7
        queue.enqueue(keys[begin : begin + n], torch.arange(begin, begin + n))
        begin += n
        newest = slice(max(0, begin - 7), begin)
        torch.testing.assert_close(queue.keys, keys[newest])
        assert queue.labels.tolist() == list(range(40))[newest]
        assert len(queue) == min(begin, 7)
        assert queue.is_full == (begin >= 7)


def test_rows_that_others_empty_count_no_more():
    """By a write into `valid`, a state that is copied in, or buffers put in its place."""
    query, positive = unit(3, 4), unit(3, 4)
    empty = {name: value.clone() for name, value in codir_fast.MemoryQueue(5, 4).named_buffers()}

    def loss(queue):
        return codir_fast.ContrastiveLoss()(query, positive, queue)

    queue = queue_of(5, unit(5, 4))
    assert queue.is_full and loss(queue) > 0
    queue.valid.zero_()
    assert not queue.is_full and len(queue) == 0 and loss(queue) == 0
    queue.enqueue(unit(4, 4))  # a whole turn has passed, and one row is empty
    assert not queue.is_full and len(queue) == 4
    queue.enqueue(unit(2, 4))
    assert queue.is_full
    for name, buffer in queue.named_buffers():
        buffer.copy_(empty[name])
    assert not queue.is_full and loss(queue) == 0

    model = torch.nn.ModuleDict({"queue": queue_of(5, unit(5, 4))})
    model.forward = lambda: loss(model["queue"])
    poisoned = {f"queue.{name}": value.clone() for name, value in empty.items()}
    poisoned["queue.rows"].fill_(torch.nan)
    assert torch.func.functional_call(model, poisoned, ()) == 0
    assert model["queue"].is_full and model() > 0
    assert model.to(torch.float64)["queue"].is_full
    assert copy.deepcopy(model["queue"]).is_full
    model["queue"].valid[2] = False
    assert not copy.deepcopy(model["queue"]).is_full


def test_queue_that_is_written_under_a_transform_is_copied_and_saved():
    queue, keys = queue_of(5, unit(5, 4)), unit(2, 4)

    def enqueue(scale):
        buffers = {name: value.clone() for name, value in queue.named_buffers()}
        torch.func.functional_call(queue, buffers, (scale * keys,))
        return scale.sum()

    queue.forward = queue.enqueue
    torch.func.grad(enqueue)(torch.ones(()))
    del queue.forward
    assert len(copy.deepcopy(queue)) == 5
    torch.save(queue, io.BytesIO())


def test_queue_normalises_and_detaches():
    keys = (5 * torch.randn(2, 4)).requires_grad_()
    queue = queue_of(3, keys)
    torch.testing.assert_close(queue.keys, F.normalize(keys.detach(), dim=1))
    assert not queue.keys.requires_grad and queue.rows.grad_fn is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: codir_fast.MemoryQueue(4, 3, with_labels=True),
        lambda: codir_fast.IndexedBank(4, 3, labels=torch.arange(4)),
    ],
)
def test_eval_mode_changes_nothing(make):
    bank = make()

    def write():
        if isinstance(bank, codir_fast.MemoryQueue):
            bank.enqueue(unit(2, 3), torch.tensor([1, 2]))
        else:
            bank.update(torch.tensor([0, 2]), unit(2, 3))

    write()
    kept = copy.deepcopy(bank.state_dict())
    bank.eval()
    write()
    assert all(torch.equal(value, kept[name]) for name, value in bank.state_dict().items())
    bank.train()
    write()
    assert not torch.equal(bank.rows, kept["rows"])


def test_indexed_bank_takes_the_first_key_and_then_mixes():
    first, second = unit(2, 5), unit(2, 5)
    bank = codir_fast.IndexedBank(6, 5, momentum=0.25)
    bank.update(torch.tensor([4, 1]), 3 * first)
    assert len(bank) == 2 and bank.valid.tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(bank.keys[[4, 1]], first)
    bank.update(torch.tensor([1, 4]), second)
    expected = F.normalize(0.25 * first.flip(0) + 0.75 * second, dim=1)
    torch.testing.assert_close(bank.keys[[1, 4]], expected)
    assert bank.keys[[0, 2, 3, 5]].eq(0).all() and not bank.is_full
    bank.update(torch.arange(6, dtype=torch.int32), unit(6, 5))
    assert bank.is_full and len(bank) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_survives_safetensors(tmp_path, dtype):
    queue = queue_of(5, unit(8, 3), with_labels=True, dtype=dtype)
    bank = codir_fast.IndexedBank(4, 3, dtype=dtype, labels=torch.tensor([0, 1, 0, 1]))
    bank.update(torch.tensor([2]), unit(1, 3))
    both = torch.nn.ModuleDict({"queue": queue, "bank": bank})
    save_file(both.state_dict(), tmp_path / "banks.safetensors")

    fresh = torch.nn.ModuleDict(
        {
            "queue": codir_fast.MemoryQueue(5, 3, with_labels=True, dtype=dtype),
            "bank": codir_fast.IndexedBank(4, 3, dtype=dtype, labels=torch.zeros(4).long()),
        }
    )
    fresh.load_state_dict(load_file(tmp_path / "banks.safetensors"))
    assert torch.equal(fresh["queue"].keys, queue.keys) and fresh["queue"].is_full
    assert torch.equal(fresh["bank"].labels, bank.labels) and not fresh["bank"].is_full
    more = unit(3, 3)
    for one in (queue, fresh["queue"]):
        one.enqueue(more, torch.tensor([7, 8, 9]))
    for one in (bank, fresh["bank"]):
        one.update(torch.tensor([2, 0, 2]), more)
    for name, value in both.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_state_loads_into_another_dtype():
    queue = queue_of(4, unit(3, 8))
    half = codir_fast.MemoryQueue(4, 8, dtype=torch.bfloat16)
    half.load_state_dict(queue.state_dict())
    assert half.keys.dtype == torch.bfloat16 and torch.equal(half.keys, queue.keys.bfloat16())


def test_state_loads_into_another_device():
    queue = codir_fast.MemoryQueue(4, 8).to("meta")
    queue.load_state_dict(queue_of(4, unit(4, 8)).state_dict(), assign=True)
    assert queue.keys.device.type == "cpu" and queue.is_full


def test_state_of_another_size_is_refused_and_changes_nothing():
    queue, other = queue_of(4, unit(3, 8)), queue_of(5, unit(2, 8))
    kept = copy.deepcopy(queue.state_dict())
    message = "rows must have shape (4, 8), the size of this MemoryQueue, got (5, 8)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        queue.load_state_dict(other.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in queue.state_dict().items())


def test_what_is_no_state_of_this_bank_is_refused():
    queue = queue_of(4, unit(3, 8), with_labels=True)
    with pytest.raises(RuntimeError, match="row_labels"):
        queue.load_state_dict(queue_of(4, unit(3, 8)).state_dict())
    with pytest.raises(RuntimeError, match="rows"):
        queue.load_state_dict({**queue.state_dict(), "rows": [[0.0] * 8] * 4})
    bank = codir_fast.IndexedBank(4, 8, labels=torch.arange(4))
    message = "row_labels must have shape (4,), the size of this IndexedBank, got (3,)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bank.load_state_dict({**bank.state_dict(), "row_labels": torch.arange(3)})


def test_conversion_touches_the_rows_alone():
    queue = queue_of(4, unit(3, 8), with_labels=True).half()
    dtypes = {name: value.dtype for name, value in queue.state_dict().items()}
    assert dtypes == {
        "rows": torch.float16,
        "valid": torch.bool,
        "row_labels": torch.int64,
        "position": torch.int64,
    }
    assert not list(queue.parameters())
    queue.enqueue(unit(2, 8), torch.tensor([5, 6]))
    assert queue.labels.tolist() == [1, 2, 5, 6]


def test_deepcopy_is_independent():
    queue = queue_of(4, unit(2, 8))
    other = copy.deepcopy(queue)
    other.enqueue(unit(2, 8))
    assert len(queue) == 2 and len(other) == 4 and not queue.is_full


def test_default_dtype():
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            assert codir_fast.MemoryQueue(2, 3).rows.dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    assert codir_fast.IndexedBank(2, 3, dtype=torch.float16).rows.dtype == torch.float16


def test_enqueue_and_update_compile(compile_whole):
    queue, bank = codir_fast.MemoryQueue(8, 4), codir_fast.IndexedBank(8, 4)
    plain_queue, plain_bank = copy.deepcopy(queue), copy.deepcopy(bank)

    def write(queue, bank, index, keys):
        queue.enqueue(keys)
        bank.update(index, keys)

    compiled = compile_whole(write)
    for _ in range(4):
        index, keys = torch.randint(0, 8, (3,)), torch.randn(3, 4)
        compiled(queue, bank, index, keys)
        write(plain_queue, plain_bank, index, keys)
    torch.testing.assert_close(queue.keys, plain_queue.keys)
    torch.testing.assert_close(bank.rows, plain_bank.rows)


def test_a_step_with_enqueue_compiles(compile_whole):
    queue = codir_fast.MemoryQueue(8, 4, with_labels=True)
    plain_queue = copy.deepcopy(queue)
    loss_fn = codir_fast.ContrastiveLoss()

    def step(queue, query, key, labels):
        loss = loss_fn(query, key, queue, labels=labels)
        queue.enqueue(key, labels)
        return loss

    compiled = compile_whole(step)
    for n in (3, 3, 5, 1, 4, 9):
        query = torch.randn(n, 4, requires_grad=True)
        key, labels = torch.randn(n, 4), torch.randint(0, 3, (n,))
        loss = compiled(queue, query, key, labels)
        expected = step(plain_queue, query, key, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, query), torch.autograd.grad(expected, query)
        )
    torch.testing.assert_close(queue.keys, plain_queue.keys)
    assert torch.equal(queue.labels, plain_queue.labels)


@pytest.mark.parametrize("momentum", [None, 0])
def test_a_write_reads_nothing_back(monkeypatch, momentum):
    """A tensor on meta has no value: what would wait for a GPU, or break a CUDA graph, raises."""
    monkeypatch.setitem(bank_update._OPS, "torch", bank_update._torch)
    keys, labels = torch.empty(5, 3, device="meta"), torch.zeros(5, device="meta").long()
    if momentum is None:
        codir_fast.MemoryQueue(4, 3, with_labels=True).to("meta").enqueue(keys, labels)
    else:
        codir_fast.IndexedBank(4, 3, momentum=momentum).to("meta").update(labels, keys)


def test_repr():
    assert repr(codir_fast.MemoryQueue(4, 8)) == (
        "MemoryQueue(4, 8, dtype=torch.float32, labels=False)"
    )
    bank = codir_fast.IndexedBank(4, 8, labels=torch.arange(4))
    assert "labels=True, momentum=0.5" in repr(bank)


Queue, Bank = codir_fast.MemoryQueue, codir_fast.IndexedBank
BAD = {
    "empty queue": (lambda: Queue(0, 4), ValueError, "`size` must be at least 1, got 0"),
    "empty bank": (lambda: Bank(0, 4), ValueError, "`num_rows` must be at least 1, got 0"),
    "no width": (lambda: Queue(4, 0), ValueError, "`dim` must be at least 1"),
    "float size": (lambda: Queue(4.0, 4), TypeError, "`size` must be an int, got float"),
    "int rows": (lambda: Queue(4, 4, dtype=torch.int8), TypeError, "`dtype` must be float32"),
    "momentum": (lambda: Bank(4, 4, momentum=1.5), ValueError, "`momentum` must be in [0, 1]"),
    "nan": (lambda: Bank(4, 4, momentum=float("nan")), ValueError, "`momentum` must be in [0, 1]"),
    "bank labels": (
        lambda: Bank(4, 4, labels=torch.arange(3)),
        ValueError,
        "`labels` must have shape (num_rows,) with num_rows=4, got (3,)",
    ),
    "keys rank": (
        lambda: Queue(4, 4).enqueue(torch.ones(4)),
        ValueError,
        "`keys` must have shape (N, D) with D=4, got (4,)",
    ),
    "keys width": (lambda: Queue(4, 4).enqueue(torch.ones(2, 3)), ValueError, "got (2, 3)"),
    "keys dtype": (
        lambda: Queue(4, 4).enqueue(torch.ones(2, 4).long()),
        TypeError,
        "`keys` must be float32, float64, bfloat16 or float16, got int64",
    ),
    "keys device": (
        lambda: Queue(4, 4).enqueue(torch.ones(2, 4, device="meta")),
        ValueError,
        "`keys` must be on the device of the bank, cpu, got meta",
    ),
    "keys type": (lambda: Queue(4, 4).enqueue([1.0]), TypeError, "`keys` must be a Tensor"),
    "labels missing": (
        lambda: Queue(4, 4, with_labels=True).enqueue(torch.ones(2, 4)),
        ValueError,
        "`labels` must be given",
    ),
    "labels unexpected": (
        lambda: Queue(4, 4).enqueue(torch.ones(2, 4), torch.tensor([1, 2])),
        ValueError,
        "with_labels=True",
    ),
    "labels length": (
        lambda: Queue(4, 4, with_labels=True).enqueue(torch.ones(2, 4), torch.tensor([1])),
        ValueError,
        "`labels` must have shape (N,) with N=2, got (1,)",
    ),
    "labels dtype": (
        lambda: Queue(4, 4, with_labels=True).enqueue(torch.ones(1, 4), torch.ones(1)),
        TypeError,
        "`labels` must be of an integer dtype, got float32",
    ),
    "index length": (
        lambda: Bank(4, 4).update(torch.tensor([1]), torch.ones(2, 4)),
        ValueError,
        "`index` must have shape (N,) with N=2, got (1,)",
    ),
    "index range": (
        lambda: Bank(4, 4).update(torch.tensor([1, 4]), torch.ones(2, 4)),
        ValueError,
        "`index` must be in [0, 4), got 4",
    ),
    "index negative": (
        lambda: Bank(4, 4).update(torch.tensor([-1, 1]), torch.ones(2, 4)),
        ValueError,
        "`index` must be in [0, 4), got -1",
    ),
    "index dtype": (
        lambda: Bank(4, 4).update(torch.tensor([1.0]), torch.ones(1, 4)),
        TypeError,
        "`index` must be of an integer dtype, got float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    act, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_bad_label_leaves_the_queue_as_it_was():
    queue = queue_of(4, unit(2, 3), with_labels=True)
    with pytest.raises(ValueError, match="`labels`"):
        queue.enqueue(unit(2, 3), torch.tensor([1, 2, 3]))
    assert len(queue) == 2


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_rows_from_elsewhere_are_checked(dtype):
    keys = torch.cat([5 * torch.randn(40, 24), torch.zeros(1, 24)])
    queue = queue_of(50, keys, dtype=dtype)
    bank = codir_fast.IndexedBank(60, 24, dtype=dtype)
    bank.update(torch.arange(41).repeat(2), torch.cat([keys, keys.flip(0)]))
    for good in (queue, bank):
        good.check_rows()
        factors = good.rows if good.row_scale is None else good.row_scale
        for change, message in ((1.5, "length 1, got 1.[45]"), (torch.nan, "finite")):
            changed = copy.deepcopy(good)
            (changed.rows if good.row_scale is None else changed.row_scale)[7] = factors[7] * change
            with pytest.raises(ValueError, match=message):
                changed.check_rows()


def test_numbers_of_numpy():
    queue = codir_fast.MemoryQueue(np.int64(5), np.int32(4))
    bank = codir_fast.IndexedBank(np.int64(5), np.int32(4), momentum=np.float32(0.5))
    assert type(queue.size) is type(bank.size) is type(queue.dim) is int
    assert type(bank.momentum) is float and bank.momentum == 0.5
    keys = torch.randn(3, 4)
    queue.enqueue(keys)
    bank.update(torch.arange(3), keys)
    assert torch.equal(queue.keys, bank.keys[:3])
    with pytest.raises(TypeError, match="`size` must be an int, got float"):
        codir_fast.MemoryQueue(np.float64(5), 4)
