"""indexed_contrast's Triton kernels on CPU tensors, against the float64 reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from codir_fast.kernels.indexed_contrast import indexed_contrast
from codir_fast.kernels.indexed_contrast_backward import indexed_contrast_backward

from codir_fast import reference

MASKS = ("scale", "labels", "exclude", "valid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1, 1), (3, 9, 5, 7), (2, 40, 131, 64), (3, 20, 33, 300)]  # B, K, M, D
EMPTY = [(0, 5, 3, 4), (4, 5, 0, 4), (2, 0, 0, 3)]


def make_case(B, K, M, D, *, dtype=torch.float32, masks=(), nce=False, temperature=0.07):
    query, positive, bank = (
        F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1).to(dtype) for n in (B, B, K)
    )
    case = {
        "query": query,
        "positive": positive,
        "bank": bank,
        "inv_temperature": torch.tensor(1 / temperature, dtype=torch.float64),
        "index": torch.randint(0, max(K, 1), (B, M)),
    }
    if "scale" in masks:
        case["bank_scale"] = torch.rand(K) + 0.5
    if "labels" in masks:
        case["labels"], case["bank_labels"] = (torch.randint(0, 3, (n,)) for n in (B, K))
    if "exclude" in masks:
        case["exclude_index"] = torch.randint(-1, max(K, 1), (B,))
    if "valid" in masks:
        case["valid"] = torch.rand(K) < 0.7
        bank[~case["valid"]] = torch.nan
    if nce:
        case["log_partition"] = torch.tensor(2.5, dtype=torch.float64)
        case["num_data"] = 1000
    return case


def ours(case, upstream):
    loss, lse, dquery, dpositive, dinv_temperature = indexed_contrast(**case)
    others = {name: value for name, value in case.items() if name != "positive"}
    dbank = indexed_contrast_backward(upstream, lse=lse, **others)
    rows, dtype = upstream[:, None], case["query"].dtype
    found = [loss, rows * dquery, rows * dpositive, dbank, (upstream * dinv_temperature).sum(), lse]
    return [value.to(dtype) for value in found]


def plain(case, upstream, dtype=None):
    case, dtype = dict(case), dtype or case["query"].dtype
    names = ("query", "positive", "bank", "inv_temperature")
    for name in (*names, "bank_scale"):
        if name in case:
            case[name] = case[name].detach().to(dtype).requires_grad_(name in names)
    loss = reference.indexed_contrast(**case)
    gradients = torch.autograd.grad(loss, [case[name] for name in names], upstream.to(loss.dtype))
    positive_logit = (case["query"] * case["positive"]).sum(1) * case["inv_temperature"]
    lse = (loss + positive_logit).detach()
    if "log_partition" in case:
        M = case.get("num_noise", 1)
        offset = case["log_partition"] + math.log(M / case["num_data"] + reference.NCE_EPS)
        lse = offset.expand(len(loss))
    return [value.to(dtype) for value in (loss.detach(), *gradients, lse)]


def check(assert_accurate, case):
    upstream = torch.randn(len(case["query"]))
    exact = plain(case, upstream, torch.float64)
    inv_t = case["inv_temperature"].item()
    largest = exact[2].abs().max().item() if len(upstream) else 0.0
    scales = [0, largest, 0, 0, largest * len(upstream) / inv_t, 0]
    found, eager = ours(case, upstream), plain(case, upstream)
    assert_accurate(found, eager, exact, condition=max(1.0, 1.5 * inv_t), scales=scales)


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, size, assert_accurate):
    check(assert_accurate, make_case(*size, dtype=dtype))


@pytest.mark.parametrize("nce", [False, True])
@pytest.mark.parametrize(
    "masks",
    [masks for n in range(5) for masks in itertools.combinations(MASKS, n)],
    ids=lambda masks: "+".join(masks) or "none",
)
def test_masks(masks, nce, assert_accurate):
    check(assert_accurate, make_case(3, 12, 40, 9, masks=masks, nce=nce))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_bank(dtype):
    case = make_case(3, 12, 40, 24, dtype=dtype, masks=("scale", "labels"))
    float8 = (100 * case["bank"].float()).to(torch.float8_e4m3fn)
    case["bank_scale"] = case["bank_scale"] / 100
    case["bank"] = float8.to(dtype)
    expected = indexed_contrast(**case)
    case["bank"] = float8
    for ours, right in zip(indexed_contrast(**case), expected, strict=True):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_any_temperature(temperature, assert_accurate):
    check(assert_accurate, make_case(3, 12, 40, 9, temperature=temperature))


def test_normalize(assert_accurate):
    case = make_case(3, 12, 40, 9)
    expected = indexed_contrast(**case)
    case["query"] = 4 * case["query"]
    loss, lse, dquery, *_ = indexed_contrast(**case, normalize=True)
    torch.testing.assert_close([loss, lse], list(expected[:2]))
    unit, wanted = case["query"] / 4, expected[2]
    wanted = (wanted - (wanted * unit).sum(1, keepdim=True) * unit) / 4
    torch.testing.assert_close(dquery, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 12, 1 << 40])
def test_an_index_out_of_range_is_seen_and_not_read(bad):
    case = make_case(3, 12, 40, 9)
    case["index"][1, 7] = bad
    loss, *_ = indexed_contrast(**case)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.zeros(2, 4).long()}, r"`index` must be int64 of shape \(3, 4\)"),
        ({"index": torch.zeros(3, 4).int()}, "`index` must be int64"),
        ({"query": torch.ones(3, 9).double()}, "`query` must be bfloat16 or float16 or float32"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        indexed_contrast(**{**make_case(3, 12, 40, 9), **changes})
