"""codir_fast.compat.pytorch_metric_learning beside the package itself."""

import re

import numpy as np
import originals
import peers
import pytest
import torch
from originals import assert_same
from torch import Tensor

from codir_fast.compat import NTXentLoss as LightlyLoss
from codir_fast.compat.pytorch_metric_learning import CrossBatchMemory, NTXentLoss

B, R, D = 12, 20, 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(scope="module")
def losses():
    return peers.pytorch_metric_learning()


def embeddings(rows=B, dtype=torch.float32):
    return torch.randn(rows, D, dtype=dtype, requires_grad=True)


def labels(rows=B, classes=4):
    return torch.randint(0, classes, (rows,))


@DTYPES
@pytest.mark.parametrize("t", [0.07, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 40])
def test_all_pairs(losses, classes, t, dtype):
    x, y = embeddings(dtype=dtype), labels(classes=classes)
    y[0] = y[1]  # at least one positive pair
    assert_same(NTXentLoss(t)(x, y), losses.NTXentLoss(t)(x, y), [x])


@DTYPES
def test_all_pairs_by_formula(dtype):
    x, y = embeddings(dtype=dtype), labels()
    assert_same(NTXentLoss()(x, y), originals.nt_xent(x, y, 0.07), [x])


@DTYPES
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_reference_embeddings(losses, needs_gradient, dtype):
    x, y = embeddings(dtype=dtype), labels()
    rows = embeddings(R, dtype).requires_grad_(needs_gradient)
    rows = rows if needs_gradient else rows.detach()
    given = dict(labels=y, ref_emb=rows, ref_labels=labels(R))
    inputs = [x, rows] if needs_gradient else [x]
    assert_same(NTXentLoss()(x, **given), losses.NTXentLoss()(x, **given), inputs)


def test_the_same_labels_leave_out_the_diagonal(losses):
    x, rows, y = embeddings(), embeddings(), labels()
    ours, original = NTXentLoss(), losses.NTXentLoss()
    for ref_labels in (y, y.clone()):
        given = dict(labels=y, ref_emb=rows, ref_labels=ref_labels)
        assert_same(ours(x, **given), original(x, **given), [x, rows])
    assert ours(x, y, ref_emb=rows, ref_labels=y) != ours(x, y, ref_emb=rows, ref_labels=y.clone())


@DTYPES
@pytest.mark.parametrize("kind", ["triplets", "pairs", "repeated", "other anchors"])
@pytest.mark.parametrize("has_reference", [False, True])
def test_indices_tuple(losses, has_reference, kind, dtype):
    x, y = embeddings(dtype=dtype), labels()
    rows = embeddings(R, dtype)
    count = R if has_reference else B
    a, p, n = torch.randint(0, B, (30,)), *torch.randint(0, count, (2, 30))
    indices = {
        "triplets": (a, p, n),
        "pairs": (a, p, torch.randint(0, B, (50,)), torch.randint(0, count, (50,))),
        "repeated": (a.repeat(2), p.repeat(2), a, n),
        "other anchors": (a % 3, p, 3 + a % 3, n),  # positives without a negative
    }[kind]
    given = dict(indices_tuple=indices)
    if has_reference:
        given |= dict(ref_emb=rows, ref_labels=labels(R))
    inputs = [x, rows] if has_reference else [x]
    for use in (dict(labels=y), {}):
        assert_same(NTXentLoss()(x, **given, **use), losses.NTXentLoss()(x, **given, **use), inputs)


def test_no_pair(losses):
    x = embeddings()
    none = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(3, dtype=torch.int64)
    for given in (
        dict(labels=torch.arange(B)),  # no positive pair
        dict(labels=torch.zeros(B, dtype=torch.int64)),  # no negative pair
        dict(indices_tuple=(none, none, one, one)),
        dict(indices_tuple=(one, one, none, none)),
    ):
        loss = NTXentLoss()(x, **given)
        assert_same(loss, losses.NTXentLoss()(x, **given), [x])
        assert loss == 0 and loss.requires_grad


def test_an_anchor_without_negatives(losses):
    x, rows = embeddings(2), embeddings(3)
    y, row_labels = torch.tensor([0, 1]), torch.tensor([1, 1, 1])
    given = dict(labels=y, ref_emb=rows, ref_labels=row_labels)
    assert_same(NTXentLoss()(x, **given), losses.NTXentLoss()(x, **given), [x, rows])


def test_one_pair_of_each_is_a_loss():
    x, rows = embeddings(1, torch.float64), embeddings(2, torch.float64)
    y, row_labels = torch.tensor([0]), torch.tensor([0, 1])
    expected = originals.nt_xent(x, y, 0.07, rows, row_labels)
    assert_same(NTXentLoss()(x, y, ref_emb=rows, ref_labels=row_labels), expected, [x, rows])
    zero, one = torch.tensor([0]), torch.tensor([1])
    listed = NTXentLoss()(x, indices_tuple=(zero, zero, one), ref_emb=rows)
    torch.testing.assert_close(listed, expected)


@pytest.mark.parametrize("t", [0.001, 0.01, 100.0])
def test_temperatures(t):
    x, y = embeddings(dtype=torch.float64), labels()
    assert_same(NTXentLoss(t)(x, y), originals.nt_xent(x, y, t), [x])
    close = x.detach().float().requires_grad_()
    loss = NTXentLoss(t)(close, y)
    loss.backward()
    assert close.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), originals.nt_xent(x, y, t), rtol=1e-5, atol=1e-5)


def test_zero_embedding(losses):
    x, y = embeddings(), labels()
    with torch.no_grad():
        x[2] = 0
    torch.testing.assert_close(NTXentLoss()(x, y), losses.NTXentLoss()(x, y))


def test_half_precision():
    x, y = embeddings().detach().bfloat16().requires_grad_(), labels()
    loss = NTXentLoss()(x, y)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, originals.nt_xent(x.detach().float(), y, 0.07))


def test_no_pair_in_half_precision():
    """The sum of the embeddings, times 0, would be infinite times 0."""
    x = torch.full((512, 512), 0.5, dtype=torch.float16, requires_grad=True)
    loss = NTXentLoss()(x, torch.arange(512))
    assert loss == 0 and loss.dtype == torch.float32
    assert not torch.autograd.grad(loss, x)[0].any()


def test_mined_pairs_under_detect_anomaly():
    """Most embeddings are no anchor of a negative pair: no gradient is NaN on its way."""
    x, y = embeddings(), labels()
    mined = tuple(torch.tensor(n) for n in ([0, 1], [2, 3], [0, 1], [4, 5]))
    with torch.autograd.detect_anomaly(check_nan=True):
        NTXentLoss()(x, y, mined).backward()
    assert x.grad.isfinite().all()


@DTYPES
@pytest.mark.parametrize("memory_size", [12, 20, 31])
def test_memory_over_many_steps(losses, memory_size, dtype):
    ours = CrossBatchMemory(NTXentLoss(), D, memory_size)
    original = losses.CrossBatchMemory(losses.NTXentLoss(), D, memory_size)
    assert list(ours.state_dict()) == list(original.state_dict())
    for step in range(10):
        rows = (5, B, 7)[step % 3]
        x, y = embeddings(rows, dtype), labels(rows)
        assert_same(ours(x, y), original(x, y), [x])
        assert torch.equal(ours.embedding_memory, original.embedding_memory)
        assert torch.equal(ours.label_memory, original.label_memory)
        assert ours.queue_idx == original.queue_idx
        assert ours.has_been_filled == original.has_been_filled


@DTYPES
def test_enqueue_mask(losses, dtype):
    ours = CrossBatchMemory(NTXentLoss(), D, 31)
    original = losses.CrossBatchMemory(losses.NTXentLoss(), D, 31)
    for _ in range(8):
        x, y = embeddings(2 * B, dtype), labels(2 * B)
        mask = torch.arange(2 * B) % 2 == 0
        assert_same(ours(x, y, enqueue_mask=mask), original(x, y, enqueue_mask=mask), [x])


def test_loads_the_state_of_the_original(losses):
    original = losses.CrossBatchMemory(losses.NTXentLoss(), D, R)
    original(embeddings(), labels())
    ours = CrossBatchMemory(NTXentLoss(), D, R)
    ours.load_state_dict(original.state_dict())
    assert torch.equal(ours.embedding_memory, original.embedding_memory)
    original.load_state_dict(ours.state_dict())


def test_reset_queue():
    loss_fn = CrossBatchMemory(NTXentLoss(), D, R)
    x, y = embeddings(), labels()
    first = loss_fn(x, y)
    loss_fn(embeddings(), labels())
    loss_fn.reset_queue()
    assert loss_fn.queue_idx == 0 and not loss_fn.embedding_memory.any()
    assert loss_fn(x, y) == first


def test_own_copy_is_left_out_of_a_batch_of_one():
    loss_fn = CrossBatchMemory(NTXentLoss(), D, R)
    y = torch.arange(B)
    loss_fn(embeddings(), y)
    x = embeddings(1)
    assert loss_fn(x, torch.tensor([B])) == 0
    memory, memory_labels = loss_fn.embedding_memory[:B], torch.arange(B)
    expected = originals.nt_xent(x, torch.tensor([2]), 0.07, memory, memory_labels)
    original_rows = loss_fn.embedding_memory.clone()
    loss = loss_fn.eval()(x, torch.tensor([2]))
    assert torch.equal(loss_fn.embedding_memory, original_rows)
    rows = torch.cat([memory, loss_fn.embedding_memory[B : B + 1]])
    expected = originals.nt_xent(x, torch.tensor([2]), 0.07, rows, torch.arange(B + 1))
    torch.testing.assert_close(loss, expected)


def test_empty_memory_in_eval_mode():
    assert CrossBatchMemory(NTXentLoss(), D, R).eval()(embeddings(), labels()) == 0


def test_memory_may_change_between_forward_and_backward():
    loss_fn = CrossBatchMemory(NTXentLoss(), D, R)
    x, y = embeddings(), labels()
    (expected,) = torch.autograd.grad(loss_fn(x, y), x)
    loss_fn.reset_queue()
    loss = loss_fn(x, y)
    loss_fn(embeddings(), labels())
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


x, y = torch.ones(B, D), torch.zeros(B, dtype=torch.int64)
BAD = {
    "distance": (lambda: NTXentLoss(distance=object()), NotImplementedError, "`distance` is not"),
    "reducer": (lambda: NTXentLoss(reducer=object()), NotImplementedError, "`reducer` is not"),
    "regularizer": (
        lambda: NTXentLoss(embedding_regularizer=object()),
        NotImplementedError,
        "`embedding_regularizer` is not supported",
    ),
    "weight": (
        lambda: NTXentLoss(embedding_reg_weight=2),
        NotImplementedError,
        "`embedding_reg_weight` is not supported",
    ),
    "stats": (lambda: NTXentLoss(collect_stats=True), NotImplementedError, "`collect_stats` is"),
    "unknown": (lambda: NTXentLoss(tau=1), TypeError, "unexpected argument `tau`"),
    "temperature": (lambda: NTXentLoss(0), ValueError, "`temperature` must be positive"),
    "nothing": (lambda: NTXentLoss()(x), ValueError, "`labels` or `indices_tuple` must be given"),
    "labels": (lambda: NTXentLoss()(x, y[:3]), ValueError, "`labels` must have shape (B,) with"),
    "labels dtype": (lambda: NTXentLoss()(x, y.float()), TypeError, "`labels` must be of an int"),
    "ref_labels": (lambda: NTXentLoss()(x, y, ref_labels=y), ValueError, "needs `ref_emb`"),
    "ref_emb": (lambda: NTXentLoss()(x, y, ref_emb=x), ValueError, "`ref_emb` needs `ref_labels`"),
    "ref_labels length": (
        lambda: NTXentLoss()(x, y, ref_emb=x, ref_labels=y[:2]),
        ValueError,
        "`ref_labels` must have shape",
    ),
    "tuple": (lambda: NTXentLoss()(x, y, (y, y)), ValueError, "`indices_tuple` must have 3 or 4"),
    "loss": (lambda: CrossBatchMemory(LightlyLoss(), D), TypeError, "`loss` must be codir_fast."),
    "no tensor": (lambda: NTXentLoss()([1], y), TypeError, "`embeddings` must be a Tensor, got l"),
    "a vector": (lambda: NTXentLoss()(x[0], y), ValueError, "`embeddings` must have shape (B, D)"),
    "integers": (lambda: NTXentLoss()(x.int(), y), TypeError, "`embeddings` must be float32, fl"),
    "labels list": (lambda: NTXentLoss()(x, [1]), TypeError, "`labels` must be a Tensor, got list"),
    "ref_emb width": (
        lambda: NTXentLoss()(x, y, ref_emb=x[:, :3], ref_labels=y),
        ValueError,
        "`ref_emb` must have shape (R, D) with D=9, as `embeddings`, got (12, 3)",
    ),
    "ref_emb dtype": (
        lambda: NTXentLoss()(x, y, ref_emb=x.double(), ref_labels=y),
        ValueError,
        "`ref_emb` must have the dtype of `embeddings`, float32, got float64",
    ),
    "tuple of lists": (
        lambda: NTXentLoss()(x, None, ([0], [1], [2])),
        TypeError,
        "`indices_tuple[0]` must be a Tensor, got list",
    ),
    "tuple of floats": (
        lambda: NTXentLoss()(x, None, (x[0], y, y)),
        TypeError,
        "`indices_tuple[0]` must be of an integer dtype, got float32",
    ),
    "tuple lengths": (
        lambda: NTXentLoss()(x, None, (y, y, y[:3], y)),
        ValueError,
        "`indices_tuple[3]` must have shape (3,), got (12,)",
    ),
    "tuple range": (
        lambda: NTXentLoss()(x, None, (y, y + B, y)),
        ValueError,
        "`indices_tuple[1]` must be in [0, 12), got 12",
    ),
    "memory width": (
        lambda: CrossBatchMemory(NTXentLoss(), 4)(x, y),
        ValueError,
        "`embeddings` must have shape (B, D) with D=4, the `embedding_size`, got (12, 9)",
    ),
    "mask of integers": (
        lambda: CrossBatchMemory(NTXentLoss(), D)(x, y, enqueue_mask=y),
        TypeError,
        "`enqueue_mask` must be of dtype bool, got torch.int64",
    ),
    "mask length": (
        lambda: CrossBatchMemory(NTXentLoss(), D)(x, y, enqueue_mask=y[:3] == 0),
        ValueError,
        "`enqueue_mask` must have shape (B,) with B=12, got (3,)",
    ),
    "mask list": (
        lambda: CrossBatchMemory(NTXentLoss(), D)(x, y, enqueue_mask=[True] * B),
        TypeError,
        "`enqueue_mask` must be a Tensor, got list",
    ),
    "miner": (
        lambda: CrossBatchMemory(NTXentLoss(), D, miner=object()),
        NotImplementedError,
        "`miner` is not supported: mine outside",
    ),
    "memory argument": (lambda: CrossBatchMemory(NTXentLoss(), D, size=3), TypeError, "`size`"),
    "memory_size": (lambda: CrossBatchMemory(NTXentLoss(), D, 0), ValueError, "`memory_size` must"),
    "embedding_size": (lambda: CrossBatchMemory(NTXentLoss(), 0), ValueError, "`embedding_size` m"),
    "memory tuple": (
        lambda: CrossBatchMemory(NTXentLoss(), D)(x, y, (y, y, y)),
        NotImplementedError,
        "`indices_tuple` is not supported by CrossBatchMemory",
    ),
    "too many": (
        lambda: CrossBatchMemory(NTXentLoss(), D, 5)(x, y),
        ValueError,
        "`embeddings` must have at most memory_size=5 rows, got 12",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy():
    given = embeddings(), labels()
    ours = CrossBatchMemory(NTXentLoss(np.float32(0.07)), np.int64(D), np.int64(R))
    assert type(ours.memory_size) is int
    torch.testing.assert_close(ours(*given), CrossBatchMemory(NTXentLoss(), D, R)(*given))


def test_a_bad_batch_leaves_the_memory_as_it_is():
    loss_fn = CrossBatchMemory(NTXentLoss(), D, R)
    with pytest.raises(TypeError, match="`enqueue_mask`"):
        loss_fn(x, y, enqueue_mask=y)
    assert loss_fn.queue_idx == 0 and not loss_fn.embedding_memory.any()


def test_defaults_may_be_spelled_out():
    NTXentLoss(distance=None, reducer=None, embedding_reg_weight=1, collect_stats=False)


def test_memory_of_the_pairs():
    """No B x R matrix: 512 anchors, 65,536 rows, 50,000 classes."""
    x = torch.randn(512, 32, requires_grad=True)
    loss_fn = CrossBatchMemory(NTXentLoss(), 32, 65536)
    loss_fn.embedding_memory.normal_()
    loss_fn.label_memory.random_(50000)
    loss_fn.has_been_filled = True
    sizes: list[int] = []

    def keep_size(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep_size, lambda saved: saved):
        loss_fn(x, torch.randint(0, 50000, (512,))).backward()
    assert max(sizes) < 65536 * 4
