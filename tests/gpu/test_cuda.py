"""The hand-written bank_contrast on a Hopper GPU, against float64."""

import itertools

import pytest
import torch
from cases import DIFFERENTIABLE, assert_right, make_case, results

from codir_fast.ops.bank_contrast import bank_contrast

DTYPES = (torch.bfloat16, torch.float16)
NO_SCALE = [(), ("exclude",), ("labels",), ("labels", "exclude", "valid")]
# B, K, D: consumers that alternate and that do not, tails of queries, of the bank and of columns,
# several items a block, more tiles than the ring has stages; wide rows, alone and in clusters.
SIZES = [
    *itertools.product([1, 63, 64, 65, 127, 200], [1, 79, 1023], [8, 64, 104, 128, 256]),
    (1, 65536, 128),
    (64, 100003, 128),
    (1000, 20001, 64),
    (1025, 9999, 128),
    (4096, 16384, 256),
    (30000, 300, 128),
    *((1, 1, 264), (65, 79, 384), (128, 1023, 512), (200, 5001, 320), (64, 20001, 512)),
    *((1000, 20001, 384), (4096, 16384, 512)),
]
QUERY_ONLY = ("query", "positive", "inv_temperature")


@pytest.fixture(autouse=True)
def hopper(needs_cuda_backend):
    needs_cuda_backend("bank_contrast")


@pytest.mark.parametrize("size", [*SIZES, (4, 0, 8), (0, 5, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(device, dtype, size):
    assert_right(make_case(device, *size, dtype=dtype), "cuda", QUERY_ONLY)


@pytest.mark.parametrize(
    ("masks", "nce", "B", "D"),
    [
        *itertools.product(NO_SCALE, [False, True], [20, 150, 700], [64, 128, 200]),
        *itertools.product(NO_SCALE, [False, True], [128, 700], [384, 512]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(device, dtype, masks, nce, B, D):
    assert_right(make_case(device, B, 4999, D, dtype=dtype, masks=masks, nce=nce), "cuda")


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("masks", [(), ("exclude", "valid")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_against_a_long_bank(device, dtype, masks, D):
    """Consumers take a hundred tiles of a ring in turn: one must not take another's for its own."""
    case = make_case(device, 32, 1 << 20, D, dtype=dtype, masks=masks)
    assert_right(case, "cuda", QUERY_ONLY)


@pytest.mark.parametrize("D", [24, 128, 256, 488])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(device, dtype, D):
    assert_right(make_case(device, 150, 3000, D, dtype=dtype, normalize=True), "cuda")


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.02, 0.0231, 0.03, 1.0, 100.0])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(device, dtype, on_device, temperature):
    case = make_case(device, 70, 1500, 128, dtype=dtype, temperature=temperature)
    if on_device:
        case.inv_temperature = case.inv_temperature.to(device)
    assert_right(case, "cuda", QUERY_ONLY)


@pytest.mark.parametrize(("B", "D"), [(40, 128), (300, 128), (128, 384)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_unit_vectors(device, dtype, B, D):
    """Sums of a fixed shift overflow, or vanish."""
    case = make_case(device, B, 3000, D, dtype=dtype)
    case.bank *= 30
    upstream = torch.ones(B, device=device)
    found = results(case, upstream, "cuda", QUERY_ONLY)
    for ours, theirs in zip(found, results(case, upstream, "torch", QUERY_ONLY), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256, 512])
def test_clustered_bank(device, dtype, D):
    """64 clusters: sums of many like terms, in which a running float32 sum loses its digits."""
    assert_right(make_case(device, 64, 65536, D, dtype=dtype, clusters=64), "cuda", QUERY_ONLY)


@pytest.mark.parametrize(("B", "D"), [(64, 128), (700, 128), (700, 512)])
@pytest.mark.parametrize("masks", [(), ("labels", "exclude")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_20_runs_are_equal_bit_by_bit(device, dtype, masks, B, D):
    case = make_case(device, B, 9000, D, dtype=dtype, masks=masks)
    upstream = torch.randn(B, device=device)
    first = results(case, upstream, "cuda", DIFFERENTIABLE)
    for _ in range(19):
        again = results(case, upstream, "cuda", DIFFERENTIABLE)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_query_that_begins_anywhere(device):
    """A slice at an odd address is brought to where the copy engine can read it."""
    case = make_case(device, 70, 1500, 64)
    wide = torch.zeros(70 * 64 + 1, dtype=case.query.dtype, device=device)
    wide[1:] = case.query.flatten()
    case.query = wide[1:].view(70, 64)
    assert_right(case, "cuda", QUERY_ONLY)


def test_a_bank_that_the_copy_engine_cannot_read(device):
    case = make_case(device, 70, 1500, 64)
    wide = torch.zeros(1500 * 64 + 1, dtype=case.bank.dtype, device=device)
    case.bank = wide[1:].view(1500, 64)
    with pytest.raises(RuntimeError, match="`bank` must begin at a multiple of 16 bytes"):
        bank_contrast(**case.arguments(), backend="cuda")
