"""in_batch_contrast's Triton kernels on CPU tensors, against the float64 reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from codir_fast.kernels import in_batch_contrast as kernels
from codir_fast.kernels import tiles, work_split
from codir_fast.kernels.in_batch_contrast import in_batch_contrast, in_batch_contrast_backward

from codir_fast import reference
from codir_fast.ops.registration import overload

# Up to 512 columns in half precision and 128 in float32 are held whole, wider ones in pieces.
SIZES = [(1, 1), (2, 3), (5, 128), (17, 31), (70, 20), (3, 300), (40, 600)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORM = ("symmetric", "labelled")


def make_case(B, D, symmetric, labelled, *, dtype=torch.float32, temperature=0.07, normalize=False):
    query, positive = F.normalize(torch.randn(2, B, D, dtype=torch.float64), dim=2).to(dtype)
    case = {
        "query": query,
        "positive": positive,
        "inv_temperature": torch.tensor(1 / temperature, dtype=torch.float64),
        "symmetric": symmetric,
    }
    if labelled:  # in no 32 bits
        case["labels"] = torch.tensor([7, 7 + (1 << 32), -7])[torch.randint(0, 3, (B,))]
    if normalize:
        case |= {"query": 3 * query, "positive": positive / 4, "normalize": True}
    return case


def ours(case, upstream):
    """Loss, the gradients of query, positive and 1/t, and lse, in the query's dtype."""
    loss, lse = in_batch_contrast(**case)
    dquery, dpositive, of_each = in_batch_contrast_backward(upstream, lse=lse, **case)
    assert lse.dtype == torch.float64 and loss.dtype == of_each.dtype == torch.float32
    assert dquery.dtype == case["query"].dtype and dpositive.dtype == case["positive"].dtype
    dtype = dquery.dtype
    return [loss.to(dtype), dquery, dpositive, of_each.sum().to(dtype), lse.to(dtype)]


def plain(case, upstream, dtype=None):
    dtype = dtype or case["query"].dtype
    leaves = [
        case[name].detach().to(dtype).requires_grad_()
        for name in ("query", "positive", "inv_temperature")
    ]
    *pair, inv_t = leaves
    if case.get("normalize"):
        pair = [F.normalize(x, dim=1) for x in pair]
    labels = case.get("labels")
    ways = [tuple(pair), tuple(pair[::-1])][: 1 + case["symmetric"]]
    each = torch.stack([reference.in_batch_contrast(q, p, inv_t, labels) for q, p in ways])
    loss = each.mean(0)
    gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    lse = (each + (pair[0] * pair[1]).sum(1) * inv_t).detach()
    return [value.to(dtype) for value in (loss.detach(), *gradients, lse)]


def check(case, upstream=None):
    """Results, whose distance from the truth, as vectors, is a few roundings of products and of
    logits, and what eager PyTorch gives away too where it makes unit rows.
    """
    if upstream is None:
        upstream = torch.randn(len(case["query"]))
    found, exact = ours(case, upstream), plain(case, upstream, torch.float64)
    assert_near(case, upstream, found, exact)
    return found


def assert_near(case, upstream, found, exact):
    inv_t = case["inv_temperature"].item()
    rounding = 4 * torch.finfo(case["query"].dtype).eps + 8 * inv_t * torch.finfo(torch.float32).eps
    eager = plain(case, upstream) if case.get("normalize") else exact
    # Each query's part of the gradient to 1/t is at most twice what comes in; loss and lse are kept
    # in float32 and rounded here.
    floors = [0, 0, 0, upstream.double().norm(), 0]
    for ours_, theirs, right, floor in zip(found, eager, exact, floors, strict=True):
        error, of_eager = ((x.double() - right).norm() for x in (ours_, theirs))
        assert error <= 2 * of_eager + rounding * max(right.norm(), floor) + 1e-30


@pytest.mark.parametrize(FORM, [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize("size", [*SIZES, (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, size, symmetric, labelled):
    check(make_case(*size, symmetric, labelled, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_wrong_is_seen(dtype):
    """No gradient, its opposite and half of it are farther from the truth than is allowed."""
    for temperature, normalize in ((0.07, True), (1e-3, False)):
        case = make_case(20, 40, True, False, dtype=dtype, temperature=temperature)
        case["normalize"] = normalize
        upstream = torch.randn(20)
        found, exact = ours(case, upstream), plain(case, upstream, torch.float64)
        for position in range(5):
            for factor in (0, -1, 0.5):
                spoilt = [x * factor if n == position else x for n, x in enumerate(found)]
                with pytest.raises(AssertionError):
                    assert_near(case, upstream, spoilt, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_sm_80(dtype, monkeypatch):
    """Without a copy engine."""
    monkeypatch.setattr(tiles, "architecture", lambda device: 80)
    for B, D in ((5, 128), (70, 20)):
        check(make_case(B, D, True, True, dtype=dtype))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_widest(symmetric):
    check(make_case(3, 4096, symmetric, False, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "B", "D", "symmetric"),
    [
        (torch.bfloat16, 150, 16, True),
        (torch.bfloat16, 70, 600, False),
        (torch.float32, 70, 16, False),
        (torch.float32, 40, 300, True),
    ],
    ids=str,
)
def test_several_splits(dtype, B, D, symmetric, monkeypatch):
    """Of a tile each, and the last without a whole one; more of them than are merged at a time."""
    monkeypatch.setattr(work_split, "split", lambda *args: args[4]["BLOCK_K"])
    monkeypatch.setattr(
        kernels, "pair_tile", lambda BLOCK_D, _: {"BLOCK_S": 2, "BLOCK_D": BLOCK_D, "num_warps": 1}
    )
    check(make_case(B, D, symmetric, True, dtype=dtype))


@pytest.mark.parametrize(FORM, [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("size", [(9, 24), (5, 600)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize(dtype, size, symmetric, labelled):
    case = make_case(*size, symmetric, labelled, dtype=dtype, normalize=True)
    check(case)
    case["query"][1] = 0
    loss, dquery, *_ = ours(case, torch.ones(size[0]))
    assert loss.isfinite().all() and (labelled or dquery[1].abs().max() > 1e3)  # over 1e-12


@pytest.mark.parametrize("temperature", [1e-3, 100.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(dtype, symmetric, temperature):
    check(make_case(40, 16, symmetric, False, dtype=dtype, temperature=temperature))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_for_all_comes_in(symmetric):
    """As the mean's gradient does, of stride 0; small enough to vanish in float16's weights."""
    for dtype in DTYPES:
        case = make_case(9, 16, symmetric, True, dtype=dtype)
        case["positive"] = case["positive"].float()  # and so is its gradient
        expected = ours(case, torch.full((9,), 1e-6))
        found = ours(case, torch.tensor(1e-6).expand(9))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        usual = ours(case, torch.ones(9))
        roundings = 8 * torch.finfo(dtype).eps  # of weights
        torch.testing.assert_close(found[2] * 1e6, usual[2], rtol=0, atol=roundings)


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_loss_keeps_its_digits(symmetric):
    rows = torch.eye(20)
    case = {"query": rows, "positive": rows, "inv_temperature": torch.tensor(40.0)}
    loss, dquery, *_ = ours({**case, "symmetric": symmetric}, torch.ones(20))
    exact = 19 * torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), exact.expand(20), rtol=1e-5, atol=0)
    expected = 40 * exact / 19 * (1 - 20 * rows.double())
    torch.testing.assert_close(dquery.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pairs_that_are_alike(symmetric, size):
    """What negatives take of float16's weights is little, whatever size comes in."""
    case = make_case(60, 64, symmetric, False, dtype=torch.float16, temperature=0.04)
    rows = F.normalize(case["query"].float() + 0.1 * torch.randn(60, 64), dim=1)
    check({**case, "positive": rows.half()}, size * torch.rand(60))


def test_what_comes_in_is_not_finite():
    """For one query: the others' gradients stay what they are, one way."""
    for dtype, value in itertools.product(DTYPES, (torch.nan, torch.inf)):
        case, upstream = make_case(9, 16, False, False, dtype=dtype), torch.rand(9)
        others = [i for i in range(9) if i != 3]
        expected = ours(case, upstream)[1][others]
        upstream[3] = value
        dquery = ours(case, upstream)[1]
        assert not dquery[3].isfinite().any()
        torch.testing.assert_close(dquery[others], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_logits_whose_rounding_is_huge(symmetric):
    """e to what the products of the two passes differ by does not overflow."""
    for size, allowed in ((10, 1e-4), (100, 1e-2), (1e6, 1.0)):
        case = make_case(40, 8, symmetric, False)
        case |= {name: size * case[name] for name in ("query", "positive")}
        upstream = torch.rand(40)
        found, truth = ours(case, upstream), plain(case, upstream, torch.float64)
        for value, exact in zip(found, truth, strict=True):
            assert (value.double() - exact).norm() < allowed * exact.norm()


def test_a_nan_is_not_in_the_loss_of_who_does_not_look_at_it():
    """One way, among rows of its own label."""
    case = make_case(9, 16, False, False)
    case["labels"] = torch.zeros(9, dtype=torch.int64)
    case["positive"][3] = torch.nan
    loss, dquery, *_ = ours(case, torch.ones(9))
    others = [i for i in range(9) if i != 3]
    assert loss[3].isnan() and (loss[others] == 0).all()
    assert dquery[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat_and_strides_do_not_matter(dtype):
    case, upstream = make_case(70, 24, True, True, dtype=dtype), torch.randn(70)
    first = ours(case, upstream)
    case |= {name: case[name].T.contiguous().T for name in ("query", "positive")}
    again = ours(case, torch.stack([upstream, upstream], 1)[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_positive_of_another_dtype():
    """Products run in the query's, gradients come in each one's own."""
    case = make_case(9, 24, True, False, normalize=True)
    expected = ours({**case, "query": case["query"].bfloat16()}, torch.ones(9))
    assert expected[1].dtype == torch.bfloat16 and expected[2].dtype == torch.float32
    exact = plain(case, torch.ones(9), torch.float64)
    assert (expected[2].double() - exact[2]).norm() < 2e-2 * exact[2].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    """Of what backend "triton" registers: fakes tell what comes out, and how it lies in memory."""
    case = make_case(5, 6, True, True, dtype=dtype)
    case |= {name: case[name].T.contiguous().T for name in ("query", "positive")}
    given = [case[name] for name in ("query", "positive", "inv_temperature", "labels")]
    given[1] = given[1].float()
    run, backward = (
        overload(name, "triton") for name in ("in_batch_contrast", "in_batch_contrast_backward")
    )
    lse = run(*given, True, True)[1]
    torch.library.opcheck(backward, (torch.randn(5), *given[:3], lse, given[3], True, True))
    for x in given[:3]:
        x.requires_grad_()
    torch.library.opcheck(run, (*given, True, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(5)}, r"`query` must have shape \(B, D\) with D at most 4096"),
        ({"query": torch.ones(5, 4097)}, "at most 4096, got"),
        ({"query": torch.ones(5, 6).double()}, "`query` must be bfloat16 or float16 or float32"),
        ({"positive": torch.ones(4, 6)}, r"`positive` must be .* of shape \(5, 6\)"),
        ({"labels": torch.zeros(5)}, r"`labels` must be int64 of shape \(5,\)"),
        ({"inv_temperature": torch.ones(2)}, "`inv_temperature` must be"),
    ],
)
def test_what_it_does_not_take(change, message):
    with pytest.raises(ValueError, match=message):
        in_batch_contrast(**{**make_case(5, 6, True, False), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_loss": torch.ones(4)}, r"`grad_loss` must be float32 of shape \(5,\)"),
        ({"lse": torch.ones(1, 5).double()}, r"`lse` must be float64 of shape \(2, 5\)"),
    ],
)
def test_what_its_backward_does_not_take(change, message):
    given = {"grad_loss": torch.ones(5), "lse": torch.ones(2, 5).double()}
    with pytest.raises(ValueError, match=message):
        in_batch_contrast_backward(**{**make_case(5, 6, True, False), **given, **change})
