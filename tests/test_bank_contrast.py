"""bank_contrast: every backend against the float64 reference, as value, gradient and citizen of
PyTorch.
"""

import itertools
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from peak_memory import needs_proc, peaks_of
from torch import Tensor

from codir_fast import reference
from codir_fast.ops import bank_contrast as module
from codir_fast.ops.registration import overload

BACKENDS = ("cpu", "torch")
SIZES = [(1, 1, 1), (3, 7, 5), (2, 130, 8), (13, 257, 31), (32, 1031, 128), (70, 300, 129)]
EMPTY = [(0, 5, 4), (4, 0, 8), (0, 0, 3)]


@dataclass
class Case:
    query: Tensor
    positive: Tensor
    bank: Tensor
    inv_temperature: Tensor
    bank_scale: Tensor | None = None
    labels: Tensor | None = None
    bank_labels: Tensor | None = None
    exclude_index: Tensor | None = None
    valid: Tensor | None = None

    def args(self) -> list[Tensor | None]:
        return list(vars(self).values())


def make_case(B, K, D, *, dtype=torch.float32, bank_dtype=None, temperature=0.07, masks=()):
    unit = [F.normalize(torch.randn(n, D, dtype=torch.float64), dim=1) for n in (B, B, K)]
    inv_temperature = torch.tensor(1 / temperature, dtype=torch.float64)
    query, positive = unit[0].to(dtype), unit[1].to(dtype)
    case = Case(query, positive, unit[2].to(bank_dtype or dtype), inv_temperature)
    if "scale" in masks:
        case.bank_scale = torch.rand(K, dtype=dtype) + 0.5
    if "labels" in masks:
        case.labels, case.bank_labels = torch.randint(0, 3, (B,)), torch.randint(0, 3, (K,))
    if "exclude" in masks:
        case.exclude_index = torch.randint(-1, max(K, 1), (B,))
    if "valid" in masks:
        case.valid = torch.rand(K) < 0.7
    return case


def gradients(function, case: Case, needs: str, upstream: Tensor, dtype=None):
    """Loss per query, and the gradient of each of the four differentiable inputs named in
    `needs`.
    """
    case = replace(case)
    for name in ("query", "positive", "bank", "inv_temperature", "bank_scale"):
        value = getattr(case, name)
        if value is None:
            continue
        if dtype is not None:
            value = value.to(dtype)
        value = value.detach().clone()
        setattr(case, name, value.requires_grad_(name in needs.split()))
    loss = function(case)
    if needs:
        loss.backward(upstream.to(loss.dtype))
    names = ("query", "positive", "bank", "inv_temperature")
    return [loss.detach(), *(getattr(case, name).grad for name in names)]


def ours(backend):
    return lambda case: module.bank_contrast(*case.args(), backend=backend)


def plain(case: Case) -> Tensor:
    return reference.bank_contrast(*case.args())


ALL = "query positive bank inv_temperature"


def check(assert_accurate, backend, case, needs=ALL, condition=None):
    upstream = torch.randn(len(case.query))
    exact = gradients(plain, case, needs, upstream, torch.float64)
    eager = gradients(plain, case, needs, upstream)
    got = gradients(ours(backend), case, needs, upstream)
    # A rounding of a logit s is a relative error of eps * |s| in its weight.
    rows = case.bank.double() if case.bank_scale is None else case.bank.double() * 2
    rows = rows if case.valid is None else rows[case.valid]
    longest = (rows.norm(dim=1).max() if len(rows) else torch.ones(())).item()
    condition = condition or max(1.0, longest * case.inv_temperature.item())
    # Gradients of query and temperature are differences of terms as large as the positive's.
    everything = gradients(plain, case, ALL, upstream, torch.float64)
    largest = everything[2].abs().max().item() if len(upstream) else 0.0
    scales = [0, largest, 0, 0, largest * len(upstream) / case.inv_temperature.item()]
    assert_accurate(got, eager, exact, condition=condition, scales=scales, name=backend)


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients(backend, dtype, size, assert_accurate):
    check(assert_accurate, backend, make_case(*size, dtype=dtype))


@pytest.mark.parametrize("size", [(3, 7, 5), (13, 257, 31), (33, 2000, 64), (4, 0, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "masks",
    [("scale",), ("labels",), ("exclude",), ("valid",), ("scale", "labels", "exclude", "valid")],
    ids="+".join,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, masks, dtype, size, assert_accurate):
    check(assert_accurate, backend, make_case(*size, dtype=dtype, masks=masks))


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masks", [(), ("scale", "labels", "exclude", "valid")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bank_dtypes(backend, masks, dtype, bank_dtype, assert_accurate):
    for size in ((1, 1, 1), (13, 257, 31), (32, 515, 128)):
        case = make_case(*size, dtype=dtype, bank_dtype=bank_dtype, masks=masks)
        check(assert_accurate, backend, case)


@pytest.mark.parametrize(
    "needs",
    [" ".join(names) for n in range(5) for names in itertools.combinations(ALL.split(), n)],
    ids=lambda needs: needs or "none",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_subset_of_gradients(backend, needs, assert_accurate):
    check(assert_accurate, backend, make_case(9, 101, 17, masks=("labels", "valid")), needs)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.0229, 0.07, 1.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures(backend, temperature, assert_accurate):
    for masks in ((), ("exclude", "valid")):
        case = make_case(17, 400, 48, temperature=temperature, masks=masks)
        case.bank[3] = case.query[0]  # the largest logit there is, and a positive that is far off
        check(assert_accurate, backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_do_not_overflow(backend, assert_accurate):
    case = make_case(5, 300, 16)
    case.query *= 30
    case.bank *= 40
    check(assert_accurate, backend, case, condition=1200 / 0.07)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5, 1e7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_whose_rounding_is_huge(backend, size):
    """Beyond 2^31 the step from one float32 to the next is more nats than a weight has range."""
    for rows in (10, 300, 3000):
        case = make_case(9, rows, 8)
        case.query *= size
        case.bank *= size
        upstream = torch.rand(9)
        found = gradients(ours(backend), case, ALL, upstream)
        truth = gradients(plain, case, ALL, upstream, torch.float64)
        for value, exact in zip(found, truth, strict=True):
            assert (value.double() - exact).norm() < 1e-5 * exact.norm(), rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_of_huge_logits_keeps_its_digits(backend):
    """The largest logit is a negative's and all of lse, also where the positive's is as long: what
    is off there is e to that in the weight of its row.
    """
    case = make_case(64, 300, 8)
    for name in ("query", "positive", "bank"):
        setattr(case, name, getattr(case, name) * 1e7)
    upstream = torch.rand(64)
    dbank = gradients(ours(backend), case, "bank", upstream)[3]
    exact = gradients(plain, case, "bank", upstream, torch.float64)[3]
    assert (dbank.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clustered_bank(backend, assert_accurate):
    # 64 clusters: many large weights next to each other, where a running float32 sum stagnates.
    centres = F.normalize(torch.randn(64, 128), dim=1)
    noise = 0.02 * torch.randn(65536, 128)
    bank = F.normalize(centres.repeat_interleave(1024, 0) + noise, dim=1)
    query = F.normalize(centres[:8] + 0.02 * torch.randn(8, 128), dim=1)
    positive = F.normalize(query + 0.02 * torch.randn(8, 128), dim=1)
    case = Case(query, positive, bank, torch.tensor(1 / 0.07))
    check(assert_accurate, backend, case, "query positive inv_temperature")


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_loss_keeps_its_digits(backend):
    # lse - s+ would cancel to 0: the positive is 0.5 / t = 50 nats above all negatives.
    query = torch.eye(4, 8)
    bank = 0.5 * torch.eye(4, 8).roll(4, 1) + 0.5 * query.mean(0)
    case = Case(query, query.clone(), bank, torch.tensor(100.0))
    logits = query.double() @ bank.double().T * 100 - 100
    exact = torch.log1p(logits.exp().sum(1))
    torch.testing.assert_close(ours(backend)(case).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_negative_gives_zero(backend):
    case = make_case(4, 9, 6)
    case.labels, case.bank_labels = torch.tensor([0, 1, 0, 0]), torch.zeros(9, dtype=torch.int64)
    loss, *grads = gradients(ours(backend), case, ALL, torch.ones(4))
    assert loss[[0, 2, 3]].eq(0).all() and loss[1] > 0
    assert all(grad[[0, 2, 3]].eq(0).all() for grad in grads[:2])
    case.valid = torch.zeros(9, dtype=torch.bool)
    for value in gradients(ours(backend), case, ALL, torch.ones(4)):
        assert value.eq(0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_rows_are_never_read(backend, poison):
    case = make_case(6, 200, 12, masks=("valid", "scale"))
    clean = gradients(ours(backend), case, ALL, torch.ones(6))
    case.bank[~case.valid] = poison
    case.bank_scale[~case.valid] = poison
    poisoned = gradients(ours(backend), case, ALL, torch.ones(6))
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat(backend):
    case = make_case(33, 3000, 64, masks=("labels", "exclude"))
    upstream = torch.randn(33)
    first, again = (gradients(ours(backend), case, ALL, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_of_the_operator(backend):
    case = make_case(7, 50, 9, dtype=torch.float64, masks=("exclude",))
    loss, lse, dquery, dpositive, dinv_t = overload("bank_contrast", backend)(*case.args())
    exact = gradients(plain, case, ALL, torch.ones(7))
    positive_logit = (case.query * case.positive).sum(1) * case.inv_temperature
    torch.testing.assert_close(loss, exact[0])
    torch.testing.assert_close(lse, (exact[0] + positive_logit).double())
    torch.testing.assert_close(dquery, exact[1])
    torch.testing.assert_close(dpositive, exact[2])
    torch.testing.assert_close(dinv_t.sum(), exact[4])
    dbank = overload("bank_contrast_backward", backend)(
        torch.ones_like(loss), case.query, case.bank, case.inv_temperature, lse, *case.args()[4:]
    )
    torch.testing.assert_close(dbank, exact[3])


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    B=st.integers(0, 40),
    K=st.integers(0, 300),
    D=st.integers(1, 140),
    masks=st.sets(st.sampled_from(["scale", "labels", "exclude", "valid"])),
)
def test_any_shape(backend, assert_accurate, B, K, D, masks):
    check(assert_accurate, backend, make_case(B, K, D, masks=masks))


@pytest.mark.parametrize("masks", [(), ("scale", "labels", "exclude", "valid")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, masks):
    case = make_case(4, 11, 5, dtype=torch.float64, temperature=0.5, masks=masks)
    inputs = [case.query, case.positive, case.bank, case.inv_temperature]
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(
        lambda *first: module.bank_contrast(*first, *case.args()[4:], backend=backend), inputs
    )


@pytest.mark.parametrize("needs", ["", "query positive", ALL], ids=lambda needs: needs or "none")
@pytest.mark.parametrize("masks", [(), ("scale", "labels", "exclude", "valid")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, masks, needs):
    case = make_case(5, 23, 6, masks=masks)
    for name in needs.split():
        getattr(case, name).requires_grad_()
    torch.library.opcheck(overload("bank_contrast", backend), tuple(case.args()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward(backend):
    case = make_case(5, 23, 6, masks=("labels", "exclude"))
    args = (
        torch.randn(5),
        case.query,
        case.bank,
        case.inv_temperature,
        torch.randn(5).double() + 30,
    )
    op = overload("bank_contrast_backward", backend)
    torch.library.opcheck(op, (*args, *case.args()[4:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises(backend):
    case = make_case(4, 9, 6)
    case.query.requires_grad_()
    loss = ours(backend)(case).sum()
    (first,) = torch.autograd.grad(loss, case.query, create_graph=True)
    with pytest.raises(RuntimeError, match="bank_contrast has no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_of_a_retained_graph(backend):
    case = make_case(4, 9, 6)
    case.query.requires_grad_()
    case.bank.requires_grad_()
    loss = ours(backend)(case).sum()
    first = torch.autograd.grad(loss, [case.query, case.bank], retain_graph=True)
    again = torch.autograd.grad(loss, [case.query, case.bank])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bank_with_gradient_may_not_change_before_backward(backend):
    case = make_case(4, 9, 6)
    case.bank.requires_grad_()
    loss = ours(backend)(case).sum()
    with torch.no_grad():
        overload("bank_update", backend)(case.bank, torch.tensor([2]), torch.ones(1, 6), 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_has_no_gradient(backend):
    case = make_case(4, 9, 6, masks=("scale",))
    case.bank_scale.requires_grad_()
    with pytest.raises(RuntimeError, match="`bank_scale`"):
        ours(backend)(case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    case = make_case(4, 9, 6)
    expected = ours(backend)(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(backend)(case), expected)


MEMORY = """
import torch.nn.functional as F, codir_fast

backend, bank_dtype = sys.argv[1], getattr(torch, sys.argv[2])
loss_fn = codir_fast.ContrastiveLoss(backend=backend)
query = torch.randn(256, 128).to(bank_dtype).requires_grad_()
positive = torch.randn(256, 128).to(bank_dtype).requires_grad_()
negatives = F.normalize(torch.randn(65536, 128), dim=1).to(bank_dtype)
bank = codir_fast.MemoryQueue(65536, 128, dtype=bank_dtype)
bank.enqueue(negatives)


def step(negative_keys):
    query.grad = positive.grad = None
    loss_fn(query, positive, negative_keys).backward()


for negative_keys in (bank, negatives):
    for _ in range(3):  # library buffers and code that are made once
        step(negative_keys)
    print(min(peak_above(lambda: step(negative_keys))[0] for _ in range(5)))

if backend == "torch":
    sys.exit()
# By index, 16,384 of 131,072 rows for each of 32 queries: gathered, they would be 256 MiB.
rows = codir_fast.IndexedBank(131072, 128, dtype=bank_dtype)
rows.rows.copy_(F.normalize(torch.randn(131072, 128), dim=1))
rows.valid.fill_(True)
query, positive = (x.detach()[:32].clone().requires_grad_() for x in (query, positive))
index = torch.randint(0, 131072, (32, 16384))
for objective in ("infonce", "nce"):
    loss_fn = codir_fast.ContrastiveLoss(backend=backend, objective=objective)
    for _ in range(3):
        loss_fn(query, positive, rows, negative_index=index).backward()
    call = lambda: loss_fn(query, positive, rows, negative_index=index).backward()
    print(min(peak_above(call)[0] for _ in range(5)))
"""


@needs_proc
@pytest.mark.parametrize("bank_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory(backend, bank_dtype):
    """(256, 65536, 128), loss and backward: the logits alone would be 64 MiB. By index, the C++
    kernel stays under 2 MiB.
    """
    peaks = peaks_of(MEMORY, backend, bank_dtype)
    outputs = 2 * 256 * 128 * (4 if bank_dtype == "float32" else 2) // 1024  # the two gradients
    print(f"peak above inputs: {peaks} KiB")
    dense, by_index = peaks[:2], peaks[2:]
    assert len(dense) == 2 and all(peak - outputs < 4 * 1024 for peak in dense), f"{peaks} KiB"
    assert len(by_index) == (2 if backend == "cpu" else 0)
    assert all(peak < 2 * 1024 for peak in by_index), f"{peaks} KiB"


@pytest.mark.parametrize("has_triton", [False, True])
def test_gradient_of_the_bank_beside_the_hand_written_kernel(has_triton, monkeypatch):
    """It is Triton's, or PyTorch's where Triton is not installed."""
    monkeypatch.setattr(module, "has_triton", lambda: has_triton)
    monkeypatch.setattr(module, "_triton_backward", lambda *inputs: "triton")
    q, bank, lse = torch.randn(3, 8), torch.randn(7, 8), torch.full((3,), 9.0, dtype=torch.float64)
    given = (torch.randn(3), q, bank, torch.tensor(1.0), lse)
    found = module._cuda_backward(*given)
    if has_triton:
        assert found == "triton"
    else:
        torch.testing.assert_close(found, overload("bank_contrast_backward")(*given))
