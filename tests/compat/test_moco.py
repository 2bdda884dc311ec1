"""codir_fast.compat.memory_queue_from_moco: MoCo's queue, and training goes on with it."""

import re

import numpy as np
import originals
import pytest
import torch
import torch.nn.functional as F
from originals import assert_same

import codir_fast
from codir_fast.compat import memory_queue_from_moco

B, D, K = 4, 9, 20
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def pair(dtype=torch.float32):
    return torch.randn(B, D, dtype=dtype, requires_grad=True), torch.randn(B, D, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("steps", [0, 3, 5])
def test_training_goes_on(steps, dtype):
    moco = originals.MoCo(D, K, T=0.2)
    moco.queue = moco.queue.to(dtype)
    for _ in range(steps):
        moco(*pair(dtype))
    queue = memory_queue_from_moco(moco.queue, moco.queue_ptr)
    assert len(queue) == K and queue.is_full and queue.rows.dtype == dtype
    loss_fn = codir_fast.ContrastiveLoss(0.2)
    for _ in range(2 * K // B):
        q, k = pair(dtype)
        loss = loss_fn(q, k, queue)
        queue.enqueue(k)
        assert_same(loss, F.cross_entropy(*moco(q, k)), [q])
    torch.testing.assert_close(queue.rows, moco.queue.T)
    assert int(queue.position) == int(moco.queue_ptr)


def test_dtype_and_pointer():
    columns = torch.randn(D, K)
    queue = memory_queue_from_moco(columns, 7, dtype=torch.bfloat16)
    assert queue.rows.dtype == torch.bfloat16 and int(queue.position) == 7
    expected = F.normalize(columns, dim=0).T.bfloat16()
    assert torch.equal(queue.rows, expected)
    assert torch.equal(queue.keys, expected.roll(-7, 0))
    assert int(memory_queue_from_moco(columns, np.int64(7)).position) == 7
    columns.zero_()
    assert queue.rows.any(), "the queue has rows of its own"


@pytest.mark.parametrize(
    ("queue", "pointer", "error", "message"),
    [
        ([1.0], 0, TypeError, "`queue` must be a Tensor, got list"),
        (torch.ones(K), 0, ValueError, "`queue` must have shape (D, K), got (20,)"),
        (torch.ones(D, K).int(), 0, TypeError, "`queue` must be float32"),
        (torch.ones(D, K), K, ValueError, "`queue_ptr` must be in [0, 20), got 20"),
        (torch.ones(D, K), torch.tensor([-1]), ValueError, "`queue_ptr` must be in [0, 20)"),
        (torch.ones(D, K), torch.tensor([1, 2]), ValueError, "`queue_ptr` must be one integer"),
        (torch.ones(D, K), 2.7, TypeError, "`queue_ptr` must be an int, got float"),
        (torch.ones(D, K), True, TypeError, "`queue_ptr` must be an int, got bool"),
        (torch.ones(D, K), torch.tensor(2.7), TypeError, "`queue_ptr` must be of an integer dtype"),
    ],
)
def test_refusals(queue, pointer, error, message):
    with pytest.raises(error, match=re.escape(message)):
        memory_queue_from_moco(queue, pointer)
