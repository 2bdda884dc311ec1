"""codir_fast.compat.NTXentLoss beside the formula of lightly's (which imports torchvision, so that
it is not installed for tests).
"""

import copy
import inspect
import math
import re

import numpy as np
import originals
import pytest
import torch
from originals import assert_same

from codir_fast.compat import NTXentLoss

B, D = 6, 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def views(dtype=torch.float32, rows=B):
    return [torch.randn(rows, D, dtype=dtype, requires_grad=True) for _ in range(2)]


def with_bank(size, **options):
    """Ours and the original, with the same random bank."""
    torch.manual_seed(1)
    ours = NTXentLoss(memory_bank_size=size, **options)
    if isinstance(size, int):
        return ours, None
    torch.manual_seed(1)
    return ours, originals.LightlyNTXentLoss(memory_bank_size=size, **options)


def test_signature():
    parameters = inspect.signature(NTXentLoss).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {"temperature": 0.5, "memory_bank_size": 0, "gather_distributed": False}


@DTYPES
@pytest.mark.parametrize("t", [0.5, 0.05])
def test_between_views(t, dtype):
    given = views(dtype)
    assert_same(NTXentLoss(t)(*given), originals.simclr(*given, t), given)


def test_one_image_has_no_negative():
    given = views(rows=1)
    loss = NTXentLoss()(*given)
    loss.backward()
    assert loss == 0 and not given[0].grad.any() and not given[1].grad.any()


@DTYPES
@pytest.mark.parametrize("size", [6, 20, 23])
def test_bank_over_many_steps(size, dtype):
    ours, original = with_bank((size, D), temperature=0.2)
    for _ in range(12):
        given = views(dtype)
        assert_same(ours(*given), original(*given), given)
        torch.testing.assert_close(ours.memory_bank.rows, original.bank)
        assert int(ours.memory_bank.position) == original.pointer


def test_a_batch_larger_than_the_bank():
    ours, original = with_bank((4, D))
    for _ in range(3):
        given = views()
        assert_same(ours(*given), original(*given), given)


def test_the_bank_enters_after_the_loss_and_only_with_a_gradient():
    loss_fn, _ = with_bank((20, D))
    before = loss_fn.memory_bank.rows.clone()
    given = views()
    loss_fn(given[0].detach(), given[1])
    assert torch.equal(loss_fn.memory_bank.rows, before)
    loss_fn.eval()(*given)
    assert torch.equal(loss_fn.memory_bank.rows, before)
    loss_fn.train()(*given)
    assert not torch.equal(loss_fn.memory_bank.rows, before)
    assert torch.equal(loss_fn.memory_bank.rows[B:], before[B:])


def test_bank_of_a_size_alone_takes_its_width_from_the_first_batch():
    torch.manual_seed(1)
    loss_fn = NTXentLoss(memory_bank_size=20)
    assert loss_fn.memory_bank is None and not loss_fn.state_dict()
    original = originals.LightlyNTXentLoss(memory_bank_size=(20, D))
    torch.manual_seed(1)
    given = [view.detach().requires_grad_() for view in torch.zeros(2, B, D) + 1]
    loss_fn(*given)
    torch.testing.assert_close(loss_fn.memory_bank.rows[B:], original.bank[B:])


def test_state_resumes():
    loss_fn, _ = with_bank((20, D))
    loss_fn(*views())
    again = NTXentLoss(memory_bank_size=(20, D))
    again.load_state_dict(copy.deepcopy(loss_fn.state_dict()))
    given = views()
    assert torch.equal(again(*given), loss_fn(*given))
    assert torch.equal(again.memory_bank.rows, loss_fn.memory_bank.rows)


def test_autocast():
    x = views()
    weight = torch.randn(D, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = NTXentLoss(memory_bank_size=(20, D))(x[0] @ weight, x[1] @ weight)
        loss = loss + NTXentLoss()(x[0] @ weight, x[1] @ weight)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x[0].grad.isfinite().all()


def test_numbers_of_numpy():
    ours = NTXentLoss(np.float32(0.5), memory_bank_size=(np.int64(20), np.int64(D)))
    assert ours.memory_bank.rows.shape == (20, D)
    given = views()
    torch.testing.assert_close(NTXentLoss(np.float32(0.5))(*given), NTXentLoss()(*given))


@pytest.mark.parametrize("size", [0, (20, D)])
def test_views_are_named(size):
    loss_fn = NTXentLoss(memory_bank_size=size)
    x, y = views()
    for given, message in (
        ((x[:4], y[:3]), "`out1` must have shape (B, D) with B=4, D=9 as `out0`, got (3, 9)"),
        ((x[0], y[0]), "`out0` must have shape (B, D) with D at least 1, got (9,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            loss_fn(*given)
    with pytest.raises(TypeError, match="`out1` must be a Tensor, got list"):
        loss_fn(x, [1.0])
    with pytest.raises(ValueError, match="`out1` must have the dtype of `out0`, float32, got fl"):
        loss_fn(x, y.double())


def test_views_of_another_width_than_the_bank():
    message = "`out0` must have shape (B, D) with D=9, the width of the bank, got (6, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        NTXentLoss(memory_bank_size=(20, D))(torch.ones(B, 8), torch.ones(B, 8))


def test_views_of_less_precision_than_the_bank():
    loss_fn = NTXentLoss(memory_bank_size=(5, 4)).double()
    with pytest.raises(ValueError, match="`out0` must be float64, as the bank is, got torch.float"):
        loss_fn(torch.randn(2, 4), torch.randn(2, 4))
    assert loss_fn(*torch.randn(2, 2, 4, dtype=torch.float64)).dtype == torch.float64


def test_refusals():
    with pytest.raises(NotImplementedError, match="`gather_distributed=True` is not supported"):
        NTXentLoss(gather_distributed=True)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        NTXentLoss(0.0)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        NTXentLoss(math.nan)
    for size in (-1, (4, -2), (4, 5, 6), ("4",)):
        with pytest.raises(ValueError, match="`memory_bank_size` must be a number of rows or"):
            NTXentLoss(memory_bank_size=size)
