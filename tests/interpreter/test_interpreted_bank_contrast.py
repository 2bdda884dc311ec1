"""bank_contrast's Triton kernels on CPU tensors, against the float64 reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from codir_fast.kernels import work_split
from codir_fast.kernels.bank_contrast import bank_contrast
from codir_fast.kernels.bank_contrast_backward import bank_contrast_backward
from codir_fast.kernels.problem import Problem

from codir_fast import reference

MASKS = ("scale", "labels", "exclude", "valid")
# Rows of 8 and 128 elements go through descriptors, the others are loaded by address; those wider
# than 128 in float32 and 512 in half precision take two products.
SIZES = [(1, 1, 1), (3, 7, 5), (17, 131, 31), (2, 70, 200), (4, 300, 128), (33, 40, 264)]
EMPTY = [(0, 5, 4), (4, 0, 8), (0, 0, 3), (2, 0, 600)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_case(
    B, K, D, *, dtype=torch.float32, bank_dtype=None, temperature=0.07, masks=(), nce=False
):
    query, positive, bank = (
        F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1).to(dtype) for n in (B, B, K)
    )
    case = {
        "query": query,
        "positive": positive,
        "bank": bank.to(bank_dtype or dtype),
        "inv_temperature": torch.tensor(1 / temperature, dtype=torch.float64),
    }
    if "scale" in masks:
        case["bank_scale"] = torch.rand(K) + 0.5
    if "labels" in masks:  # in no 32 bits
        high = torch.tensor([7, 7 + (1 << 32), -7])
        case["labels"], case["bank_labels"] = (high[torch.randint(0, 3, (n,))] for n in (B, K))
    if "exclude" in masks:
        case["exclude_index"] = torch.randint(-1, max(K, 1), (B,))
    if "valid" in masks:
        case["valid"] = torch.rand(K) < 0.7
    if nce:
        case["log_partition"] = torch.tensor(2.5, dtype=torch.float64)
        case["num_data"] = 1000
    return case


def ours(case, upstream):
    """Loss, and the gradients of query, positive, bank and 1/t; lse as the last. All but that to
    the bank are float32; here in the query's dtype.
    """
    loss, lse, dquery, dpositive, dinv_temperature = bank_contrast(**case)
    assert lse.dtype == torch.float64
    assert all(t.dtype == torch.float32 for t in (loss, dquery, dpositive, dinv_temperature))
    others = {name: value for name, value in case.items() if name != "positive"}
    dbank = bank_contrast_backward(upstream, lse=lse, **others)
    assert dbank.dtype == case["bank"].dtype
    rows, dtype = upstream[:, None], case["query"].dtype
    found = [loss, rows * dquery, rows * dpositive, dbank, (upstream * dinv_temperature).sum(), lse]
    return [value if value is dbank else value.to(dtype) for value in found]


def plain(case, upstream, dtype=None):
    case = dict(case)
    dtype = dtype or case["query"].dtype
    names = ("query", "positive", "bank", "inv_temperature")
    for name in (*names, "bank_scale"):
        if name in case:
            case[name] = case[name].detach().to(dtype).requires_grad_(name in names)
    inputs = dict(case)
    if inputs.pop("normalize", False):
        inputs |= {name: F.normalize(case[name], dim=1) for name in ("query", "positive")}
    loss = reference.bank_contrast(**inputs)
    gradients = torch.autograd.grad(loss, [case[name] for name in names], upstream.to(loss.dtype))
    positive_logit = (inputs["query"] * inputs["positive"]).sum(1) * inputs["inv_temperature"]
    lse = (loss + positive_logit).detach()
    if "log_partition" in case:
        offset = case["log_partition"] + math.log(1 / case["num_data"] + reference.NCE_EPS)
        lse = offset.expand(len(loss))
    return [value.to(dtype) for value in (loss.detach(), *gradients, lse)]


def check(assert_accurate, case):
    upstream = torch.randn(len(case["query"]))
    found, eager = ours(case, upstream), plain(case, upstream)
    eager[3] = eager[3].to(found[3].dtype)
    exact = plain(case, upstream, torch.float64)
    # A rounding of a logit s is a relative error of eps * |s| in its weight.
    inv_t = case["inv_temperature"].item()
    largest = exact[2].abs().max().item() if len(upstream) else 0.0
    scales = [0, largest, 0, 0, largest * len(upstream) / inv_t, 0]
    longest = case["bank"].double().nan_to_num().norm(dim=1).max() if len(case["bank"]) else 1
    condition = max(1.0, 1.5 * float(longest) * inv_t)
    assert_accurate(found, eager, exact, condition=condition, scales=scales)
    return found


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, size, assert_accurate):
    check(assert_accurate, make_case(*size, dtype=dtype))


@pytest.mark.parametrize("D", [600, 1030], ids=str)
@pytest.mark.parametrize("nce", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_products_over_several_chunks(dtype, nce, D, monkeypatch, assert_accurate):
    monkeypatch.setattr(work_split, "_CHUNK_BYTES", 1)  # a block of rows is a chunk
    masks = MASKS if nce else ("scale",)
    size = (3, 70, D) if dtype == torch.float32 else (3, 290, D)
    check(assert_accurate, make_case(*size, dtype=dtype, masks=masks, nce=nce))


@pytest.mark.parametrize("which", ["query", "bank"])
@pytest.mark.parametrize("D", [24, 600], ids=str)
def test_tensors_that_no_copy_engine_takes(which, D, assert_accurate):
    """They begin where no multiple of 16 bytes is, as a slice may: they are loaded by address."""
    case = make_case(3, 140, D, dtype=torch.bfloat16)
    room = torch.empty(case[which].numel() + 1, dtype=torch.bfloat16)
    case[which] = room[1:].view(case[which].shape).copy_(case[which])
    assert case[which].data_ptr() % 16 != 0
    check(assert_accurate, case)


@pytest.mark.parametrize("size", [(5, 40, 24), (3, 40, 1030)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype, size, assert_accurate):
    case = make_case(*size, dtype=dtype)
    case |= {"query": 3 * case["query"], "positive": case["positive"] / 4, "normalize": True}
    check(assert_accurate, case)
    case["query"][1] = 0
    loss, dquery, *_ = ours(case, torch.ones(size[0]))
    assert loss.isfinite().all() and dquery[1].abs().max() > 1e3  # divided by 1e-12


@pytest.mark.parametrize(
    "masks",
    [masks for n in range(5) for masks in itertools.combinations(MASKS, n)],
    ids=lambda masks: "+".join(masks) or "none",
)
def test_masks(masks, assert_accurate):
    check(assert_accurate, make_case(3, 70, 9, masks=masks))


@pytest.mark.parametrize("nce", [False, True])
def test_labels_of_many_queries(nce, assert_accurate):
    check(assert_accurate, make_case(150, 40, 16, masks=("labels", "exclude"), nce=nce))


@pytest.mark.parametrize("B", [0, 1, 31, 128, 129, 256, 300])
@pytest.mark.parametrize("different", [1, 3, 1000])
def test_labels_as_numbers(B, different):
    """Equal exactly where the labels are, on both sides of where labels are sorted."""
    values = torch.cat([torch.tensor([-(1 << 63), (1 << 63) - 1, 0]), torch.randint(-9, 9, (997,))])
    values[3:] += (1 << 32) * torch.arange(997)
    labels, bank_labels = (values[torch.randint(0, different, (n,))] for n in (B, 517))
    query, bank = torch.randn(B, 8), torch.randn(517, 8)
    masks = (None, labels, bank_labels, None, None)
    problem = Problem(query, bank, torch.tensor(1.0), *masks, None, 1, 1, normalize=False)
    _, (_, numbers, bank_numbers, _, _) = problem.prepare()
    assert numbers.dtype == bank_numbers.dtype == torch.int32
    same = labels[:, None] == bank_labels
    assert torch.equal(numbers[:, None] == bank_numbers, same)
    assert torch.equal(bank_numbers == -1, ~same.any(0))
    assert ((numbers >= 0) & (numbers < B)).all()


@pytest.mark.parametrize("D", [16, 600], ids=str)
def test_masks_in_half_precision(D, assert_accurate):
    check(assert_accurate, make_case(18, 150, D, dtype=torch.bfloat16, masks=MASKS))


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
def test_nce(size, assert_accurate):
    check(assert_accurate, make_case(*size, masks=MASKS, nce=True))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_nce_at_any_temperature(temperature, assert_accurate):
    check(assert_accurate, make_case(3, 70, 9, temperature=temperature, nce=True))


@pytest.mark.parametrize("bank_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bank_dtypes(dtype, bank_dtype, assert_accurate):
    case = make_case(3, 70, 24, dtype=dtype, bank_dtype=bank_dtype, masks=MASKS)
    check(assert_accurate, case)


@pytest.mark.parametrize("masks", [("scale",), MASKS], ids=str)
@pytest.mark.parametrize("D", [16, 31, 600], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_bank(dtype, D, masks):
    """As a bank of the same values in the query's dtype, which holds all of float8."""
    case = make_case(5, 150, D, dtype=dtype, masks=masks)
    float8 = (100 * case["bank"].float()).to(torch.float8_e4m3fn)
    case["bank_scale"] = case["bank_scale"] / 100
    case["bank"] = float8.to(dtype)
    expected = bank_contrast(**case)
    case["bank"] = float8
    for ours, right in zip(bank_contrast(**case), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-4)
    others = {name: value for name, value in case.items() if name != "positive"}
    with pytest.raises(ValueError, match="`bank` must be bfloat16 or float16 or float32"):
        bank_contrast_backward(torch.ones(5), lse=expected[1], **others)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_any_temperature(temperature, assert_accurate):
    check(assert_accurate, make_case(3, 70, 9, temperature=temperature))


def test_rows_that_are_not_unit_vectors_do_not_overflow(assert_accurate):
    """Their weights overflow under the fixed shift: the kernel starts over with the maximum."""
    case = make_case(3, 70, 9)
    case["bank"] *= 100
    assert all(result.isfinite().all() for result in check(assert_accurate, case))


@pytest.mark.parametrize("peak", [69.0, 87.0, 88.0, 89.0])
def test_sums_of_rows_do_not_overflow_before_the_weights_do(peak, assert_accurate):
    """Of a row whose other elements are not small."""
    case = make_case(2, 70, 9, temperature=1.0)
    case["query"] = torch.eye(9)[:1].repeat(2, 1)
    case["bank"] = torch.zeros(70, 9)
    case["bank"][0, :2] = torch.tensor([peak, 8.0])
    assert all(result.isfinite().all() for result in check(assert_accurate, case))


@pytest.mark.parametrize("masks", [(), ("labels", "exclude", "valid")])
def test_rows_that_are_not_unit_vectors_do_not_vanish(masks, assert_accurate):
    """All logits lie so far below the fixed shift that its weights are 0: the positive's too, so
    that they count.
    """
    case = make_case(3, 70, 9, masks=masks)
    along = F.normalize(torch.ones(9), dim=0)
    case["query"] = along + 0.01 * torch.randn(3, 9)
    case["bank"] = -12 * along + 0.1 * torch.randn(70, 9)
    case["positive"] = -20 * along.expand(3, 9).contiguous()
    loss, *_ = check(assert_accurate, case)
    assert loss.min() > 50


def test_long_sums_keep_their_digits(monkeypatch):
    """Equal terms add up: rounding each sum, always the same way, would show in the loss."""
    monkeypatch.setattr(work_split, "split", lambda B, K, *_: K)
    case = make_case(1, 32 * 300, 1, temperature=1.0)
    case["query"], case["positive"] = torch.ones(1, 1), torch.full((1, 1), 20.0)
    case["bank"] = torch.tensor([1.0] + [-1.0] * 31).repeat(300)[:, None]
    (loss,), *_ = bank_contrast(**case)
    (exact,) = plain(case, torch.ones(1), torch.float64)[0]
    assert abs(loss.item() / exact.item() - 1) < 4 * torch.finfo(torch.float32).eps


def test_no_negative_gives_loss_0_and_no_gradient():
    case = make_case(3, 40, 9)
    case["labels"], case["bank_labels"] = torch.tensor([1, 1, 2]), torch.ones(40).long()
    loss, dquery, dpositive, dbank, _, lse = ours(case, torch.ones(3))
    assert loss[:2].eq(0).all() and loss[2] > 0
    assert dquery[:2].eq(0).all() and dpositive[:2].eq(0).all() and dquery[2].ne(0).any()
    positive_logit = (case["query"] * case["positive"]).sum(1) * case["inv_temperature"]
    torch.testing.assert_close(lse[:2], positive_logit[:2].float())
    case["valid"] = torch.zeros(40, dtype=torch.bool)
    assert all(result.eq(0).all() for result in ours(case, torch.ones(3))[:5])


def test_invalid_rows_may_hold_anything(assert_accurate):
    case = make_case(3, 70, 9, masks=MASKS)
    case["bank"][~case["valid"]] = torch.nan
    case["bank_scale"][~case["valid"]] = torch.inf
    found = ours(case, torch.ones(3))
    case["bank"][~case["valid"]], case["bank_scale"][~case["valid"]] = 0, 1
    expected = ours(case, torch.ones(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_that_are_not_contiguous():
    case = make_case(3, 40, 9, masks=MASKS)
    wide = {
        name: torch.stack([value, value], dim=-1)[..., 0] if value.ndim else value
        for name, value in case.items()
    }
    upstream = torch.ones(1).expand(3)
    for a, b in zip(ours(wide, upstream), ours(case, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(3, 5000)}, "D at most 4096"),
        ({"query": torch.ones(3, 8)}, r"`bank` must be .* of shape \(40, 8\)"),
        ({"query": torch.ones(3, 9).double()}, "`query` must be bfloat16 or float16 or float32"),
        ({"positive": torch.ones(2, 9)}, r"`positive` must be bfloat16 or .* of shape \(3, 9\)"),
        (
            {"bank": torch.ones(40, 9).double()},
            "`bank` must be bfloat16 or float16 or float32 or float8_e4m3fn of",
        ),
        ({"inv_temperature": torch.ones(3)}, r"`inv_temperature` must be .* of shape \(\)"),
        ({"bank_scale": torch.ones(40).double()}, "`bank_scale` must be float32"),
        ({"labels": torch.ones(3).long()}, "`labels` and `bank_labels` must be given together"),
        ({"exclude_index": torch.ones(2).long()}, r"`exclude_index` must be .* of shape \(3,\)"),
        ({"valid": torch.ones(40)}, "`valid` must be bool"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        bank_contrast(**{**make_case(3, 40, 9), **changes})


def test_bad_input_of_the_backward():
    case = make_case(3, 40, 9)
    del case["positive"]
    with pytest.raises(ValueError, match=r"`grad_loss` must be float32 of shape \(3,\)"):
        bank_contrast_backward(torch.ones(2), lse=torch.ones(3), **case)
    with pytest.raises(ValueError, match=r"`lse` must be float64 of shape \(3,\)"):
        bank_contrast_backward(torch.ones(3), lse=torch.ones(3), **case)
