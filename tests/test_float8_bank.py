"""Banks of float8 rows: what is kept, what it costs in accuracy, where it can't be used."""

import pytest
import torch
import torch.nn.functional as F

import codir_fast
from codir_fast import reference
from codir_fast.bank_rows import FLOAT8

K, D = 300, 128


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_queue_keeps_directions_and_unit_length():
    queue, exact = codir_fast.MemoryQueue(K, D, dtype=FLOAT8), codir_fast.MemoryQueue(K, D)
    for _ in range(7):  # turns round
        keys = 3 * torch.randn(64, D)
        queue.enqueue(keys)
        exact.enqueue(keys)
    assert queue.rows.dtype == FLOAT8 and queue.row_scale.shape == (K,) and queue.is_full
    assert queue.keys.dtype == torch.float32
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(K))
    assert (queue.keys * exact.keys).sum(1).min() > 0.999


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_indexed_bank_takes_repeated_rows_in_order(momentum):
    banks = [
        codir_fast.IndexedBank(20, D, momentum=momentum, dtype=dtype)
        for dtype in (FLOAT8, torch.float32)
    ]
    for _ in range(5):
        index, keys = torch.randint(0, 19, (30,)), torch.randn(30, D)
        for bank in banks:
            bank.update(index, keys)
    filled = banks[1].valid
    assert torch.equal(banks[0].valid, filled) and not filled[19]
    assert (banks[0].keys * banks[1].keys).sum(1)[filled].min() > 0.995
    assert banks[0].keys[19].eq(0).all()


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_at_007(dtype, by_index):
    """What the docstring says: gradients right to about 1 % of their largest element."""
    rows, query, key = unit(20000, D), unit(32, D), unit(32, D)
    queue = codir_fast.MemoryQueue(20000, D, dtype=FLOAT8)
    queue.enqueue(rows)
    index = torch.randint(0, 20000, (32, 5000)) if by_index else None
    leaf = query.to(dtype).requires_grad_()
    loss_fn = codir_fast.ContrastiveLoss(0.07, reduction="none")
    loss = loss_fn(leaf, key.to(dtype), queue, negative_index=index)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    exact_leaf = query.to(dtype).double().requires_grad_()
    given = (F.normalize(exact_leaf, dim=1), key.to(dtype).double(), rows.double(), 1 / 0.07)
    exact = (
        reference.indexed_contrast(*given, index) if by_index else reference.bank_contrast(*given)
    )
    (right,) = torch.autograd.grad(exact.sum(), exact_leaf)
    assert (loss - exact).abs().max() < 0.005
    assert (gradient - right).abs().max() < 0.01 * right.abs().max()


def test_masks_and_a_bank_that_is_not_full():
    queue = codir_fast.MemoryQueue(50, 16, dtype=FLOAT8, with_labels=True)
    exact = codir_fast.MemoryQueue(50, 16, with_labels=True)
    keys, labels = torch.randn(30, 16), torch.randint(0, 3, (30,))
    for bank in (queue, exact):
        bank.enqueue(keys, labels)
    query, key, own = torch.randn(8, 16), torch.randn(8, 16), torch.randint(0, 3, (8,))
    losses = [
        codir_fast.ContrastiveLoss(0.2, objective=objective)(query, key, bank, labels=own)
        for objective in ("infonce", "nce")
        for bank in (queue, exact)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(losses[2], losses[3], rtol=0.02, atol=0.02)


def test_states_of_other_precisions_load():
    queue, exact = codir_fast.MemoryQueue(9, D, dtype=FLOAT8), codir_fast.MemoryQueue(9, D)
    exact.enqueue(torch.randn(6, D))
    queue.load_state_dict(exact.state_dict())
    assert queue.rows.dtype == FLOAT8 and len(queue) == 6
    assert (queue.keys * exact.keys).sum(1).min() > 0.999
    again = codir_fast.MemoryQueue(9, D, dtype=FLOAT8)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.keys, queue.keys)
    exact.load_state_dict(queue.state_dict())
    torch.testing.assert_close(exact.keys, queue.keys)


def test_conversion_of_the_module_keeps_the_rows():
    queue = codir_fast.MemoryQueue(9, D, dtype=FLOAT8)
    queue.enqueue(torch.randn(6, D))
    before = queue.keys
    for dtype in (torch.float64, torch.bfloat16):
        queue.to(dtype)
        assert (F.normalize(queue.keys, dim=1) * before[: len(queue)]).sum(1).min() > 0.999
    keys = torch.randn(9, D)
    queue.enqueue(keys)
    assert (F.normalize(queue.keys, dim=1) * F.normalize(keys, dim=1)).sum(1).min() > 0.999
    assert codir_fast.ContrastiveLoss()(keys, keys, queue).isfinite()


def test_where_it_cannot_be_used():
    queue = codir_fast.MemoryQueue(9, 8, dtype=FLOAT8)
    queue.enqueue(torch.randn(9, 8))
    query = torch.randn(3, 8)
    with pytest.raises(ValueError, match="`temperature` must be at least 0.07 with a float8 bank"):
        codir_fast.ContrastiveLoss(0.05)(query, query, queue)
    with pytest.raises(RuntimeError, match="'cpu' can't run .* it has no float8 banks"):
        codir_fast.ContrastiveLoss(0.07, backend="cpu")(query, query, queue)
    with pytest.raises(TypeError, match="`negative_keys` must be float32"):
        codir_fast.ContrastiveLoss()(query, query, torch.randn(9, 8).to(FLOAT8))
    assert codir_fast.ContrastiveLoss(0.07)(query, query, queue).isfinite()
