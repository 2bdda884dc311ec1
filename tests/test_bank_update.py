"""bank_update: every backend against the float64 reference."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from codir_fast import reference
from codir_fast.ops import bank_update as module
from codir_fast.ops.registration import overload

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(backend, K, N, D, dtype, momentum, with_filled, assert_accurate):
    bank = F.normalize(torch.randn(K, D), dim=1).to(dtype)
    keys = torch.randn(N, D, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    index = torch.randint(0, max(K, 1), (N,))
    filled = torch.rand(K) < 0.5 if with_filled else None
    exact, _ = reference.bank_update(bank.double(), index, keys.double(), momentum, filled)
    eager, eager_filled = reference.bank_update(bank, index, keys, momentum, filled)
    module.bank_update(bank, index, keys, momentum, filled, backend=backend)
    rounds = max(torch.bincount(index).max().item() if N else 1, 1)  # roundings to the bank's dtype
    assert_accurate([bank], [eager], [exact], condition=rounds, name=backend)
    if with_filled:
        assert torch.equal(filled, eager_filled)


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 3), (11, 40, 17), (257, 64, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("with_filled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_reference(backend, with_filled, momentum, dtype, size, assert_accurate):
    K, N, D = size
    check(backend, K, N, D, dtype, momentum, with_filled, assert_accurate)


@given(
    K=st.integers(1, 30),
    N=st.integers(0, 40),
    D=st.integers(1, 70),
    momentum=st.floats(0, 0.9),
    with_filled=st.booleans(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, assert_accurate, K, N, D, momentum, with_filled):
    check(backend, K, N, D, torch.float32, momentum, with_filled, assert_accurate)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_rows_are_applied_in_order(backend):
    bank = torch.tensor([[1.0, 0.0, 0.0]])
    keys = torch.eye(3)[[1, 2, 1]]
    expected, _ = reference.bank_update(bank, torch.zeros(3, dtype=torch.int64), keys, 0.5)
    module.bank_update(bank, torch.zeros(3, dtype=torch.int64), keys, 0.5, backend=backend)
    torch.testing.assert_close(bank, expected)
    module.bank_update(bank, torch.zeros(3, dtype=torch.int64), keys, 0.0, backend=backend)
    torch.testing.assert_close(bank, keys[-1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_keep_their_bits(backend):
    bank = torch.randn(20, 5)
    kept = bank.clone()
    module.bank_update(bank, torch.tensor([3, 7]), torch.randn(2, 5), 0.5, backend=backend)
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(bank[others], kept[others])
    assert (bank[[3, 7]] != kept[[3, 7]]).any(1).all()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_unfilled_row_holds_does_not_count(backend, momentum):
    bank = torch.full((2, 4), torch.nan)
    filled = torch.zeros(2, dtype=torch.bool)
    keys = torch.randn(3, 4)
    index = torch.tensor([0, 1, 0])
    module.bank_update(bank, index, keys, momentum, filled, backend=backend)
    assert bank.isfinite().all() and filled.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_key_gives_a_zero_row(backend):
    bank = torch.ones(1, 4)
    module.bank_update(bank, torch.tensor([0]), torch.zeros(1, 4), 0.0, backend=backend)
    assert bank.eq(0).all()


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_index_out_of_range_changes_nothing(backend, momentum, bad):
    bank, filled = torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)
    kept = bank.clone()
    with pytest.raises(RuntimeError, match=r"`index` must be in \[0, 4\)"):
        module.bank_update(
            bank, torch.tensor([0, bad]), torch.randn(2, 3), momentum, filled, backend=backend
        )
    assert torch.equal(bank, kept) and not filled.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    bank, keys, index = torch.randn(9, 4), torch.randn(6, 8)[::2, ::2], torch.arange(6)[::2]
    expected, _ = reference.bank_update(bank, index, keys, 0.5)
    module.bank_update(bank, index, keys, 0.5, backend=backend)
    torch.testing.assert_close(bank, expected)


@pytest.mark.parametrize("with_filled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_as_an_in_place_change(backend, with_filled):
    bank, filled = torch.randn(4, 3), torch.zeros(4, dtype=torch.bool)
    versions = bank._version, filled._version
    module.bank_update(
        bank,
        torch.tensor([1]),
        torch.randn(1, 3),
        0.5,
        filled if with_filled else None,
        backend=backend,
    )
    assert bank._version == versions[0] + 1 and filled._version == versions[1] + with_filled


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("with_filled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, with_filled, momentum):
    filled = torch.tensor([True, False, True, False]) if with_filled else None
    args = (torch.randn(4, 3), torch.tensor([1, 3, 1]), torch.randn(3, 3), momentum, filled)
    torch.library.opcheck(overload("bank_update", backend), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend, compile_whole):
    def write(bank, index, keys):
        module.bank_update(bank, index, keys, 0.5, backend=backend)
        return bank.sum()

    bank, index, keys = torch.randn(4, 3), torch.tensor([1, 1]), torch.randn(2, 3)
    expected, _ = reference.bank_update(bank, index, keys, 0.5)
    total = compile_whole(write)(bank, index, keys)
    torch.testing.assert_close(bank, expected)
    torch.testing.assert_close(total, expected.sum())
