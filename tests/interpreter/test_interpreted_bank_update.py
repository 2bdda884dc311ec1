"""bank_update's Triton kernel on CPU tensors, against the C++ operator, which has its own tests."""

import pytest
import torch
from codir_fast.kernels.bank_update import bank_update

EPSILON = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.001}


@pytest.mark.parametrize("with_filled", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_against_the_cpu(dtype, momentum, with_filled):
    K, N, D = 7, 40, 19
    bank, keys = torch.randn(K, D).to(dtype), torch.randn(N, D)
    index = torch.randint(0, K - 1, (N,))  # the last row stays as it is
    filled = torch.rand(K) < 0.5 if with_filled else None
    if filled is not None:
        bank[~filled] = torch.nan
    expected, expected_filled = bank.clone(), None if filled is None else filled.clone()
    torch.ops.codir_fast.bank_update(expected, index, keys, momentum, expected_filled)
    bank_update(bank, index, keys, momentum, filled)
    torch.testing.assert_close(bank, expected, rtol=0, atol=EPSILON[dtype], equal_nan=True)
    assert filled is None or torch.equal(filled, expected_filled)


def test_no_key_changes_nothing():
    bank = torch.randn(3, 4)
    before = bank.clone()
    bank_update(bank, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 0.5)
    assert torch.equal(bank, before)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_index_out_of_range_stops(bad):
    bank = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"`index` must be in \[0, 3\)"):
        bank_update(bank, torch.tensor([0, bad]), torch.randn(2, 4), 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4).double(), torch.zeros(2).long(), torch.ones(2, 4)), "`bank` must be"),
        ((torch.ones(4, 3).T, torch.zeros(2).long(), torch.ones(2, 4)), "must be contiguous"),
        ((torch.ones(3, 4), torch.zeros(2), torch.ones(2, 4)), "`index` must be int64"),
        ((torch.ones(3, 4), torch.zeros(2).long(), torch.ones(2, 5)), "`keys` must be float32 of"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        bank_update(*arguments, 0.5)
