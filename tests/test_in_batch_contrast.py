"""in_batch_contrast on the CPU: against the float64 reference, and against bank_contrast in each
direction, which backend "torch" takes.
"""

from dataclasses import dataclass, replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from peak_memory import needs_proc, peaks_of
from torch import Tensor

import codir_fast
from codir_fast import reference
from codir_fast.functional import contrastive_loss
from codir_fast.ops import in_batch_contrast as ops
from codir_fast.ops.registration import overload

in_batch_contrast = partial(ops.in_batch_contrast, backend="cpu")
SIZES = [(1, 1), (2, 3), (3, 128), (16, 17), (33, 64), (70, 129), (130, 40), (257, 31), (600, 8)]
DIFFERENTIABLE = ("query", "positive", "inv_temperature")
FORMS = [(False, False), (False, True), (True, False), (True, True)]
forms = pytest.mark.parametrize(("symmetric", "labelled"), FORMS, ids=str)


@dataclass
class Case:
    query: Tensor
    positive: Tensor
    inv_temperature: Tensor
    labels: Tensor | None = None
    symmetric: bool = False

    def args(self) -> list:
        return list(vars(self).values())


def make_case(B, D, symmetric=False, labelled=False, *, dtype=torch.float32, temperature=0.07):
    query, positive = F.normalize(torch.randn(2, B, D, dtype=torch.float64), dim=2).to(dtype)
    inv_temperature = torch.tensor(1 / temperature, dtype=torch.float64)
    labels = torch.randint(0, 3, (B,)) << 33 if labelled else None
    return Case(query, positive, inv_temperature, labels, symmetric)


def gradients(function, case, upstream, dtype=None, needs=DIFFERENTIABLE):
    """Loss per query, and the gradient of each differentiable input; in `dtype`, if given."""
    case = replace(case)
    for name in DIFFERENTIABLE:
        value = getattr(case, name)
        value = (value if dtype is None else value.to(dtype)).detach().clone()
        setattr(case, name, value.requires_grad_(name in needs))
    loss = function(*case.args())
    if needs:
        loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(getattr(case, name).grad for name in DIFFERENTIABLE)]


def check(assert_accurate, case, needs=DIFFERENTIABLE):
    upstream = torch.randn(len(case.query))
    exact = gradients(reference.in_batch_contrast, case, upstream, torch.float64, needs)
    eager = gradients(reference.in_batch_contrast, case, upstream, None, needs)
    got = gradients(in_batch_contrast, case, upstream, None, needs)
    # Gradients are differences of terms as large as upstream * |p| / t.
    reach = case.inv_temperature.item() * max(
        (x.double().norm(dim=1).max().item() for x in (case.query, case.positive) if len(x)),
        default=0.0,
    )
    largest = upstream.abs().max().item() * reach if len(upstream) else 0.0
    scales = [0, largest, largest, largest * len(upstream) / case.inv_temperature.item()]
    assert_accurate(got, eager, exact, condition=max(1.0, reach), scales=scales)


@forms
@pytest.mark.parametrize("size", [*SIZES, (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients(dtype, size, symmetric, labelled, assert_accurate):
    check(assert_accurate, make_case(*size, symmetric, labelled, dtype=dtype))


@given(
    B=st.integers(0, 150), D=st.integers(1, 140), symmetric=st.booleans(), labelled=st.booleans()
)
def test_any_shape(assert_accurate, B, D, symmetric, labelled):
    check(assert_accurate, make_case(B, D, symmetric, labelled))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_temperatures(symmetric, temperature, assert_accurate):
    check(assert_accurate, make_case(90, 16, symmetric, temperature=temperature))


@pytest.mark.parametrize("needs", [(), ("query",), ("positive",), ("inv_temperature",)], ids=str)
def test_every_gradient_alone(needs, assert_accurate):
    check(assert_accurate, make_case(20, 9, True), needs)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_logits_whose_rounding_is_huge(symmetric, size):
    for B in (9, 300):
        case = make_case(B, 8, symmetric)
        case.query *= size
        case.positive *= size
        upstream = torch.rand(B)
        found = gradients(in_batch_contrast, case, upstream)
        truth = gradients(reference.in_batch_contrast, case, upstream, torch.float64)
        for value, exact in zip(found, truth, strict=True):
            assert (value.double() - exact).norm() < 1e-5 * exact.norm(), B


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_loss_keeps_its_digits(symmetric):
    rows = torch.eye(20)
    case = Case(rows, rows.clone(), torch.tensor(40.0), None, symmetric)
    exact = torch.tensor(19.0, dtype=torch.float64) * torch.exp(torch.tensor(-40.0).double())
    loss, dquery, *_ = gradients(in_batch_contrast, case, torch.ones(20))
    torch.testing.assert_close(loss.double(), exact.expand(20), rtol=1e-5, atol=0)
    # d loss / d q_i = 40 * e^-40 * (sum of the others - 19 p_i), of both directions the mean.
    expected = 40 * exact / 19 * (1 - 20 * rows.double())
    torch.testing.assert_close(dquery.double(), expected, rtol=1e-5, atol=0)


@forms
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize, symmetric, labelled):
    case = make_case(5, 4, symmetric, labelled, dtype=torch.float64, temperature=0.5)
    inputs = [x.requires_grad_() for x in case.args()[:3]]
    assert torch.autograd.gradcheck(
        lambda *first: in_batch_contrast(*first, case.labels, symmetric, normalize), inputs
    )


@forms
@pytest.mark.parametrize("needs", [(), DIFFERENTIABLE], ids=str)
def test_opcheck(needs, symmetric, labelled):
    case = make_case(5, 6, symmetric, labelled)
    for name in needs:
        getattr(case, name).requires_grad_()
    torch.library.opcheck(overload("in_batch_contrast"), (*case.args(), True))


@forms
def test_opcheck_backward(symmetric, labelled):
    case = make_case(5, 6, symmetric, labelled)
    lse = overload("in_batch_contrast")(*case.args(), True)[1]
    args = (torch.randn(5), *case.args()[:3], lse, *case.args()[3:], True)
    torch.library.opcheck(overload("in_batch_contrast_backward"), args)


def test_outputs_of_the_operator():
    case = make_case(7, 9, True, True, dtype=torch.float64)
    loss, lse = overload("in_batch_contrast")(*case.args())
    one_way, other_way = (
        reference.in_batch_contrast(q, p, case.inv_temperature, case.labels)
        for q, p in ((case.query, case.positive), (case.positive, case.query))
    )
    both_ways = torch.stack([one_way, other_way])
    positive = (case.query * case.positive).sum(1) * case.inv_temperature
    torch.testing.assert_close(lse, both_ways + positive)
    torch.testing.assert_close(loss, (one_way + other_way) / 2)


@forms
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_that_of_both_directions(
    dtype, normalize, reduction, weighted, symmetric, labelled
):
    case = make_case(37, 20, symmetric, labelled, dtype=dtype)
    upstream = torch.rand(37) if reduction == "none" else torch.rand(())
    weight = torch.rand(37) if weighted else None
    found = []
    for backend in ("cpu", "torch"):
        inputs = [(3 * x).requires_grad_() for x in (case.query, case.positive)]
        temperature = torch.tensor(0.1, requires_grad=True)
        loss = contrastive_loss(
            *inputs,
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            symmetric=symmetric,
            labels=case.labels,
            weight=weight,
            backend=backend,
        )
        loss.backward(upstream)
        assert all(x.grad.dtype == dtype for x in inputs)
        found.append([loss.detach(), *(x.grad for x in (*inputs, temperature))])
    for got, expected in zip(*found, strict=True):
        scale = expected.float().abs().max().item()
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=0, atol=500 * max(eps, 1e-7) * scale)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_repeat(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case, upstream = make_case(200, 64, True, True), torch.randn(200)
        first, again = (gradients(in_batch_contrast, case, upstream) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_second_derivative_raises():
    case = make_case(4, 6)
    case.query.requires_grad_()
    (grad,) = torch.autograd.grad(
        in_batch_contrast(*case.args()).sum(), case.query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="in_batch_contrast has no second derivative"):
        grad.sum().backward()


def test_inputs_may_not_change_before_backward():
    case = make_case(4, 6)
    case.query.requires_grad_()
    loss = in_batch_contrast(*case.args()).sum()
    case.positive.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("learnt", [False, True])
@forms
def test_inference_tensors(symmetric, labelled, learnt):
    """Keys, labels, or all, as a teacher or an evaluation makes them."""
    loss_fn = codir_fast.ContrastiveLoss(symmetric=symmetric, learnable_temperature=learnt)
    query = torch.randn(20, 8, requires_grad=True)
    with torch.inference_mode():
        key, labels = torch.randn(20, 8), torch.randint(0, 3, (20,)) if labelled else None
    found = torch.autograd.grad(loss_fn(query, key, labels=labels), query)
    usual = None if labels is None else labels.clone()
    expected = torch.autograd.grad(loss_fn(query, key.clone(), labels=usual), query)
    assert torch.equal(found[0], expected[0])
    assert loss_fn.eval()(key, key, labels=labels) > 0


def test_keys_without_gradient_may_change_before_backward():
    query, key = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
    (expected,) = torch.autograd.grad(contrastive_loss(query, key), query)
    loss = contrastive_loss(query, key)
    key.add_(1)
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_embeddings_that_are_alike(symmetric):
    """What is given to the negatives and what is taken from the positive cancel but for little."""
    torch.manual_seed(0)
    rows = F.normalize(1 + 0.03 * torch.randn(2, 256, 64), dim=2)
    case = Case(rows[0], rows[1], torch.tensor(1 / 0.07), None, symmetric)
    upstream = torch.full((256,), 1 / 256)
    exact = gradients(reference.in_batch_contrast, case, upstream, torch.float64)
    eager = gradients(reference.in_batch_contrast, case, upstream)
    got = gradients(in_batch_contrast, case, upstream)
    for ours, plain, truth in zip(got, eager, exact, strict=True):
        error, of_plain = (float((x.double() - truth).norm() / truth.norm()) for x in (ours, plain))
        assert error <= 2 * of_plain + 1e-6


def test_autocast_changes_nothing():
    case = make_case(4, 6, True)
    expected = in_batch_contrast(*case.args())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(in_batch_contrast(*case.args()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(5)}, r"`query` must be a \(B, D\) tensor"),
        ({"query": torch.randn(5, 0)}, "at least one column"),
        ({"query": torch.ones(5, 6, dtype=torch.int64)}, "`query` must be float32"),
        ({"positive": torch.randn(4, 6)}, r"`positive` must have shape \(5, 6, \)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"`labels` must have shape \(5, \)"),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, "`labels` must be int64"),
        ({"inv_temperature": torch.ones(2)}, "`inv_temperature` must be a scalar"),
    ],
)
def test_the_operator_refuses_what_it_can_not_read(change, message):
    case = replace(make_case(5, 6), **change)
    with pytest.raises(RuntimeError, match=message):
        overload("in_batch_contrast")(*case.args())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_loss": torch.ones(4)}, "`grad_loss` must have shape"),
        ({"grad_loss": torch.ones(5).double()}, "`grad_loss` must be float32"),
        ({"lse": torch.ones(1, 5).double()}, "`lse` must have shape"),
        ({"lse": torch.ones(2, 5)}, "`lse` must be float64"),
    ],
)
def test_the_backward_operator_refuses_likewise(change, message):
    case = make_case(5, 6, True)
    given = {"grad_loss": torch.ones(5), "lse": torch.ones(2, 5).double()}
    with pytest.raises(RuntimeError, match=message):
        overload("in_batch_contrast_backward")(**{**vars(case), **given, **change})


@pytest.mark.parametrize("symmetric", [False, True])
def test_compiles_for_any_batch(symmetric, compile_whole):
    loss_fn = codir_fast.ContrastiveLoss(symmetric=symmetric, learnable_temperature=True)
    compiled = compile_whole(loss_fn)
    for B in (3, 40, 7):
        found = []
        for function in (loss_fn, compiled):
            query, positive = torch.randn(2, B, 8, generator=torch.Generator().manual_seed(B))
            inputs = [x.requires_grad_() for x in (query, positive)]
            wanted = [*inputs, loss_fn.log_inv_temperature]
            found.append(torch.autograd.grad(function(*inputs), wanted))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


MEMORY = """
import codir_fast

loss_fn = codir_fast.ContrastiveLoss(symmetric=True)
query, positive = (torch.randn(4096, 64).requires_grad_() for _ in range(2))


def step():
    query.grad = positive.grad = None
    loss_fn(query, positive).backward()


for _ in range(3):  # library buffers and code that are made once
    step()
print(min(peak_above(step)[0] for _ in range(5)))
"""


@needs_proc
def test_peak_memory():
    """(4096, 64), both ways and backward: the logits alone would be 64 MiB, and each matrix of
    queries is one.
    """
    (peak,) = peaks_of(MEMORY)
    print(f"peak above inputs: {peak} KiB")
    assert peak < 16 * 1024
