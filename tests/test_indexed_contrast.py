"""indexed_contrast: every backend against the float64 reference, and the loss that calls it."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import codir_fast
from codir_fast import reference
from codir_fast.functional import contrastive_loss
from codir_fast.ops.indexed_contrast import indexed_contrast
from codir_fast.ops.registration import overload

BACKENDS = ("cpu", "torch")
# Here the index is put in the order of the bank: L2 does not hold it, and rows are named again.
IN_ORDER = (5, 5501, 1201, 97)
SIZES = [(1, 1, 1, 1), (3, 9, 5, 7), (2, 300, 131, 64), (17, 100, 63, 129), (33, 50, 65, 128)]
SIZES += [IN_ORDER]
EMPTY = [(0, 5, 3, 4), (4, 5, 0, 4), (2, 0, 0, 3)]
DIFFERENTIABLE = ("query", "positive", "bank", "inv_temperature")


@dataclass
class Case:
    query: Tensor
    positive: Tensor
    bank: Tensor
    inv_temperature: Tensor
    index: Tensor
    bank_scale: Tensor | None = None
    labels: Tensor | None = None
    bank_labels: Tensor | None = None
    exclude_index: Tensor | None = None
    valid: Tensor | None = None

    def args(self) -> list[Tensor | None]:
        return list(vars(self).values())


def make_case(B, K, M, D, *, dtype=torch.float32, bank_dtype=None, temperature=0.07, masks=True):
    rows = [F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1) for n in (B, B, K)]
    case = Case(
        rows[0].to(dtype),
        rows[1].to(dtype),
        rows[2].to(bank_dtype or dtype),
        torch.tensor(1 / temperature, dtype=torch.float64),
        torch.randint(0, max(K, 1), (B, M)),
    )
    if masks:
        case.bank_scale = torch.rand(K, dtype=dtype) + 0.5
        case.labels, case.bank_labels = torch.randint(0, 3, (B,)), torch.randint(0, 3, (K,))
        case.exclude_index = torch.randint(-1, max(K, 1), (B,))
        case.valid = torch.rand(K) < 0.7
        case.bank[~case.valid] = torch.nan  # nothing may depend on what is there
    return case


def results(function, case, upstream, dtype=None, needs=DIFFERENTIABLE):
    """Loss, and the gradient of each differentiable input; in `dtype`, if given."""
    case = replace(case)
    for name in (*DIFFERENTIABLE, "bank_scale"):
        value = getattr(case, name)
        if value is not None:
            value = (value if dtype is None else value.to(dtype)).clone()
            setattr(case, name, value.requires_grad_(name in needs))
    loss = function(*case.args())
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(getattr(case, name).grad for name in needs)]


def assert_close(ours, exact, epsilon, condition):
    for got, expected in zip(ours, exact, strict=True):
        assert not got.isnan().any()
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=8 * epsilon * condition * max(scale, 1.0)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("size", SIZES + EMPTY)
@pytest.mark.parametrize(
    ("dtype", "bank_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_value_and_gradients(backend, masks, size, dtype, bank_dtype):
    case = make_case(*size, dtype=dtype, bank_dtype=bank_dtype, masks=masks, temperature=0.3)
    upstream = torch.randn(size[0], dtype=torch.float64)
    ours = results(lambda *args: indexed_contrast(*args, backend=backend), case, upstream)
    exact = results(reference.indexed_contrast, case, upstream, torch.float64)
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(bank_dtype).eps)
    assert_close(ours, exact, epsilon, condition=1 / 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 1.0, 1e2])
def test_temperatures(backend, temperature):
    case = make_case(5, 200, 100, 16, temperature=temperature)
    upstream = torch.randn(5, dtype=torch.float64)
    ours = results(lambda *args: indexed_contrast(*args, backend=backend), case, upstream)
    exact = results(reference.indexed_contrast, case, upstream, torch.float64)
    assert_close(ours, exact, torch.finfo(torch.float32).eps, condition=max(1, 2 / temperature))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_opcheck(backend):
    case = make_case(3, 11, 7, 5, dtype=torch.float64, temperature=0.5)
    case.bank[~case.valid] = 0.25
    for name in DIFFERENTIABLE:
        getattr(case, name).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *args: indexed_contrast(*args, *case.args()[4:], backend=backend), case.args()[:4]
    )
    torch.library.opcheck(overload("indexed_contrast", backend), tuple(case.args()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_by_index_are_the_dense_pass(backend):
    case = make_case(6, 40, 40, 9, masks=False)
    case.index = torch.stack([torch.randperm(40) for _ in range(6)])
    torch.testing.assert_close(
        indexed_contrast(*case.args(), backend=backend),
        reference.bank_contrast(*case.args()[:4]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [(33, 500, 300, 64), IN_ORDER])
def test_repeated_runs_are_bit_equal(size):
    case = make_case(*size)
    upstream = torch.randn(size[0])
    runs = [
        results(lambda *args: indexed_contrast(*args, backend="cpu"), case, upstream)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


@pytest.mark.parametrize("size", [(4, 500, 3000, 33), (4, 9001, 30000, 33)])
def test_gradients_of_a_clustered_bank(size):
    """Rows that are alike: a running sum in float32 would stagnate."""
    B, K, M, D = size
    case = make_case(B, K, M, D, masks=False)
    centres = torch.randn(64, D)[torch.arange(K) % 64]
    case.bank = F.normalize(centres + 0.01 * torch.randn(K, D), dim=1)
    upstream = torch.rand(B) + 0.5
    ours = results(lambda *args: indexed_contrast(*args, backend="cpu"), case, upstream)
    exact = results(reference.indexed_contrast, case, upstream, torch.float64)
    assert_close(ours, exact, torch.finfo(torch.float32).eps, condition=1 / 0.07)


def test_index_out_of_range_is_refused_by_the_operator():
    case = make_case(2, 5, 3, 4, masks=False)
    case.index[1, 2] = 5
    with pytest.raises(RuntimeError, match=r"`index` must be in \[0, 5\), got 5"):
        indexed_contrast(*case.args(), backend="cpu")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_loss_with_sampled_and_own_negatives(normalize, needs_grad):
    B, K, M, D = 6, 30, 8, 12
    query, key = torch.randn(2, B, D, requires_grad=True).unbind()
    bank = torch.randn(K, D, requires_grad=needs_grad)
    index, labels = torch.randint(0, K, (B, M)), torch.randint(0, 3, (B,))
    bank_labels, exclude = torch.randint(0, 3, (K,)), torch.randint(-1, K, (B,))
    loss = contrastive_loss(
        query,
        key,
        bank,
        normalize=normalize,
        reduction="none",
        labels=labels,
        negative_labels=bank_labels,
        negative_index=index,
        exclude_index=exclude,
    )

    def unit(x):
        return F.normalize(x.double(), dim=-1) if normalize else x.double()

    masks = {"labels": labels, "bank_labels": bank_labels, "exclude_index": exclude}
    exact = reference.indexed_contrast(unit(query), unit(key), unit(bank), 1 / 0.07, index, **masks)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)
    inputs = [query, bank] if needs_grad else [query]
    upstream = torch.randn(B)
    ours = torch.autograd.grad(loss, inputs, upstream)
    expected = torch.autograd.grad(exact, inputs, upstream.double())
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

    del masks["exclude_index"]
    own = bank[index]  # the same rows, given per query
    masks = {"labels": labels, "negative_labels": bank_labels[index]}
    given = contrastive_loss(query, key, own, normalize=normalize, reduction="none", **masks)
    masks = {"labels": labels, "negative_labels": bank_labels, "negative_index": index}
    named = contrastive_loss(query, key, bank, normalize=normalize, reduction="none", **masks)
    torch.testing.assert_close(given, named, rtol=1e-4, atol=1e-4)
    if needs_grad:
        pairs = (torch.autograd.grad(x, [bank], upstream)[0] for x in (given, named))
        torch.testing.assert_close(*pairs, rtol=1e-3, atol=1e-3)


def test_sampled_rows_of_a_bank_that_is_not_full():
    bank = codir_fast.IndexedBank(20, 8, labels=torch.arange(20) % 3)
    bank.update(torch.arange(10), torch.randn(10, 8))
    query, key = torch.randn(4, 8), torch.randn(4, 8)
    index = torch.randint(0, 20, (4, 12))
    labels = torch.arange(4) % 3
    loss = contrastive_loss(query, key, bank, labels=labels, negative_index=index, reduction="none")
    exact = reference.indexed_contrast(
        F.normalize(query.double(), dim=1),
        F.normalize(key.double(), dim=1),
        bank.rows.double(),
        1 / 0.07,
        index,
        labels=labels,
        bank_labels=bank.labels,
        valid=bank.valid,
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_compiles_in_one_graph():
    case = make_case(5, 40, 9, 8, masks=False)
    compiled = torch.compile(contrastive_loss, fullgraph=True)
    arguments = (case.query.requires_grad_(), case.positive, case.bank)
    loss = compiled(*arguments, negative_index=case.index)
    torch.testing.assert_close(loss, contrastive_loss(*arguments, negative_index=case.index))
    loss.backward()
