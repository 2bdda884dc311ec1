"""bank_contrast and indexed_contrast on a GPU, by backend, against float64."""

import itertools

import pytest
import torch
from cases import DIFFERENTIABLE, assert_right, make_case, results

BACKENDS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MASKS = ("scale", "labels", "exclude", "valid")
USES = [
    (),
    ("exclude",),
    ("labels", "exclude"),
    ("labels", "exclude", "valid"),
    ("scale",),
    ("scale", "labels", "exclude"),
    MASKS,
]
# B, K, D: one-pass tiles of 16 to 128 queries, two products, rows that no copy engine can take.
SIZES = [
    (1, 1, 1),
    (1, 4096, 128),
    (3, 129, 31),
    (16, 1000, 64),
    (17, 4097, 128),
    (33, 2049, 100),
    (64, 8192, 128),
    (65, 3001, 256),
    (200, 5000, 64),
    (256, 8192, 128),
    (129, 1025, 384),
    (40, 3000, 512),
    (70, 2500, 768),
    (5, 700, 1030),
    (9, 300, 4096),
]
EMPTY = [(0, 5, 4), (4, 0, 8), (0, 0, 3), (2, 0, 600)]


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(device, backend, dtype, size):
    assert_right(make_case(device, *size, dtype=dtype), backend)


# Each combination is kernels of its own, which take a second or two to compile: all of them for one
# dtype, some for the others.
@pytest.mark.parametrize(
    ("dtype", "masks"),
    [
        *itertools.product(DTYPES[:1], USES),
        *itertools.product(DTYPES[1:], [("scale",), ("labels", "exclude", "valid")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("nce", [False, True])
@pytest.mark.parametrize(("B", "D"), [(20, 64), (150, 64), (150, 200), (20, 640)])
def test_masks(device, dtype, masks, nce, B, D):
    assert_right(make_case(device, B, 1999, D, dtype=dtype, masks=masks, nce=nce), "triton")


@pytest.mark.parametrize("D", [24, 128, 900])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_normalize(device, backend, dtype, D):
    assert_right(make_case(device, 50, 1000, D, dtype=dtype, normalize=True), backend)


@pytest.mark.parametrize(("dtype", "bank_dtype"), itertools.product(DTYPES, DTYPES), ids=str)
@pytest.mark.parametrize("D", [128, 768])
def test_bank_dtypes(device, dtype, bank_dtype, D):
    assert_right(make_case(device, 50, 1500, D, dtype=dtype, bank_dtype=bank_dtype), "triton")


@pytest.mark.parametrize(
    ("dtype", "D"),
    [*itertools.product(DTYPES[:1], [24, 256, 512]), *itertools.product(DTYPES, [128, 768])],
    ids=str,
)
def test_float8_bank(device, dtype, D):
    """As a bank of the same values in the query's dtype, which holds all of float8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("float8 needs sm_89")
    needs = ("query", "positive", "inv_temperature")
    for M in (None, 300):
        masks = ("scale", "labels", "exclude")
        case = make_case(device, 50, 1500, D, M=M, dtype=dtype, masks=masks)
        float8 = (100 * case.bank.float()).to(torch.float8_e4m3fn)
        case.bank_scale = case.bank_scale / 100
        upstream = torch.randn(50, device=device)
        found = []
        for bank in (float8.to(dtype), float8):
            case.bank = bank
            found.append(results(case, upstream, "triton", needs))
        for right, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, right, rtol=2e-2, atol=1e-3 * float(right.abs().max()))


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.02, 0.03, 1.0, 100.0])
@pytest.mark.parametrize("nce", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(device, dtype, nce, temperature):
    case = make_case(device, 70, 1500, 128, dtype=dtype, temperature=temperature, nce=nce)
    assert_right(case, "triton")


@pytest.mark.parametrize("D", [128, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_that_are_not_unit_vectors_do_not_overflow(device, dtype, D):
    case = make_case(device, 70, 1500, D, dtype=dtype)
    case.bank *= 60
    found = results(case, torch.ones(70, device=device), "triton")
    assert all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [128, 768])
def test_clustered_bank(device, dtype, D):
    """64 clusters: sums of many like terms, in which a running float32 sum loses its digits."""
    case = make_case(device, 64, 65536, D, dtype=dtype, clusters=64)
    assert_right(case, "triton", needs=("query", "positive", "inv_temperature"))


@pytest.fixture
def restore_tf32():
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.usefixtures("restore_tf32")
def test_tf32_is_used_where_pytorch_may(device):
    case = make_case(device, 64, 2000, 128, dtype=torch.float32)
    upstream = torch.ones(64, device=device)
    exact = results(case, upstream, "triton")[1]
    torch.backends.cuda.matmul.allow_tf32 = True
    rounded = results(case, upstream, "triton")[1]
    difference = (exact - rounded).abs().max() / exact.abs().max()
    assert difference < 5e-3
    assert difference > 1e-6 or device.type == "cpu"  # the interpreter multiplies in float32


@pytest.mark.parametrize(
    "size",
    [
        (1, 9, 5, 7),
        (4, 1000, 300, 128),
        (32, 5000, 1024, 64),
        (3, 500, 200, 768),
        (2, 64, 33, 4096),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "masks"),
    [
        *itertools.product(DTYPES[:1], [(), ("labels", "exclude", "valid"), MASKS]),
        *itertools.product(DTYPES[1:], [MASKS]),
    ],
    ids=str,
)
@pytest.mark.parametrize("nce", [False, True])
def test_by_index(device, dtype, masks, nce, size):
    B, K, M, D = size
    assert_right(make_case(device, B, K, D, M=M, dtype=dtype, masks=masks, nce=nce), "triton")


@pytest.mark.parametrize("size", [(0, 5, 3, 4), (4, 5, 0, 4), (2, 0, 0, 3)], ids=str)
def test_by_empty_index(device, size):
    B, K, M, D = size
    assert_right(make_case(device, B, K, D, M=M), "triton")


@pytest.mark.parametrize("M", [None, 700])
@pytest.mark.parametrize("D", [128, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_20_runs_are_equal_bit_by_bit(device, dtype, D, M):
    case = make_case(device, 70, 9000, D, M=M, dtype=dtype, masks=("labels", "exclude"))
    upstream = torch.randn(70, device=device)
    first = results(case, upstream, "triton", DIFFERENTIABLE)
    for _ in range(19 if device.type == "cuda" else 1):
        again = results(case, upstream, "triton", DIFFERENTIABLE)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
