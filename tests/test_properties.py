"""contrastive_loss on whatever hypothesis thinks of, against float64, and what must hold without a
truth to compare with.

The profile says how many examples: 25 of `repeatable` are more than 2,000 in this file,
`--hypothesis-profile=thorough` is ten times that.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accuracy import Call, check, truth
from hypothesis import given, settings
from torch import Tensor

from codir_fast import ContrastiveLoss, IndexedBank, MemoryQueue
from codir_fast.functional import contrastive_loss

BACKENDS = ("cpu", "torch")
EXAMPLES = settings.default.max_examples
SHARES = {"any": 64, "module": 4, "property": 4}  # of each test, times EXAMPLES


def examples(kind: str) -> settings:
    return settings(max_examples=SHARES[kind] * EXAMPLES)


MODULE_OPTIONS = ("objective", "normalize", "reduction", "symmetric")
FORMS = ("in-batch", "shared", "own", "index", "queue", "bank", "queue by index", "bank by index")
LAYOUTS = ("contiguous", "transposed", "sliced", "unaligned", "equal rows", "equal columns")
LABELS = {  # low, high
    "few": (0, 3),
    "negative": (-3, 0),
    "equal": (7, 8),
    "huge": (2**62, 2**62 + 3),
    "hugely negative": (-(2**62), 3 - 2**62),
}
# Names of choices, so that a failing example reads as a sentence.
PLANS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "B": st.integers(0, 9) | st.sampled_from([16, 33, 70]),
        "K": st.integers(0, 20) | st.sampled_from([63, 130, 515]),
        "M": st.integers(0, 12),
        "D": st.integers(1, 20) | st.sampled_from([31, 64, 129]),
        "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        "form": st.sampled_from(FORMS),
        "bank_dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        "objective": st.sampled_from(["infonce", "nce"]),
        "log10_temperature": st.floats(-3, 2),
        "temperature": st.sampled_from([None, torch.float32, torch.float64]),
        "log_partition": st.none() | st.floats(-20, 20),
        "log_partition_as": st.sampled_from([None, torch.float32, torch.float64]),
        "num_data": st.none() | st.integers(1, 10**9),
        "normalize": st.booleans(),
        "log10_norm": st.floats(-4, 4),
        "layouts": st.tuples(*3 * [st.sampled_from(LAYOUTS)]),
        "repeats": st.booleans(),  # rows of the bank that are a query's positive
        "labels": st.none() | st.sampled_from(list(LABELS)),
        "labels_as": st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]),
        "exclude": st.booleans(),
        "weight": st.sampled_from([None, "positive", "signed", "zero"]),
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "symmetric": st.booleans(),
        "needs": st.sets(
            st.sampled_from(["query", "positive", "negatives", "temperature", "weight"])
        ),
    }
)


def make_call(plan: dict) -> Call:
    torch.manual_seed(plan["seed"])
    B, D, dtype = plan["B"], plan["D"], plan["dtype"]
    wide = torch.promote_types(dtype, torch.float32)
    norm = 10 ** plan["log10_norm"]

    def rows(*shape: int) -> Tensor:
        # No length of more than `norm`, and none that a half-precision row would lose.
        unit = F.normalize(torch.randn(*shape, D, dtype=wide), dim=-1)
        return unit * (norm * torch.empty(*shape, 1, dtype=wide).uniform_(0.5, 1))

    def finish(x: Tensor, layout: str, name: str) -> Tensor:
        return lay_out(x.to(dtype), layout).requires_grad_(name in plan["needs"])

    query, positive = rows(B), rows(B)
    negatives = None
    if plan["form"] != "in-batch":
        shape = (B, plan["M"]) if plan["form"] == "own" else (plan["K"],)
        negatives = rows(*shape)
        if plan["repeats"]:
            source = positive[:, None] if negatives.ndim == 3 else positive
            count = min(source.shape[-2], negatives.shape[-2])
            negatives[..., :count, :] = source[..., :count, :]
    query, positive = (
        finish(x, layout, name)
        for x, layout, name in zip(
            (query, positive), plan["layouts"], ("query", "positive"), strict=False
        )
    )
    if plan["form"] in ("shared", "own", "index"):
        negatives = finish(negatives, plan["layouts"][2], "negatives")
    elif negatives is not None:
        negatives = make_bank(plan, negatives)
    return Call(query, positive, negatives, temperature(plan), *options(plan, negatives))


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":  # every second row and element of something larger, NaN between
        larger = x.new_full((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), torch.nan)
        part = larger[..., ::2, ::2]
        return part.copy_(x)
    if layout == "unaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "equal rows" and x.shape[-2]:
        return x[..., :1, :].expand(x.shape)
    if layout == "equal columns":
        return x[..., :1].expand(x.shape)
    return x


def temperature(plan: dict) -> float | Tensor:
    t = 10 ** plan["log10_temperature"]
    if plan["temperature"] is None:
        return t
    return torch.tensor(t, dtype=plan["temperature"], requires_grad="temperature" in plan["needs"])


def make_bank(plan: dict, rows: Tensor) -> MemoryQueue | IndexedBank:
    K, D = rows.shape
    empty = plan["M"] if K else plan["M"] + 1
    low, high = LABELS[plan["labels"] or "few"]
    if plan["form"].startswith("queue"):
        queue = MemoryQueue(K + empty, D, dtype=plan["bank_dtype"], with_labels=True)
        queue.enqueue(rows, torch.randint(low, high, (K,)))
        return queue
    labels = torch.randint(low, high, (K + empty,))
    bank = IndexedBank(K + empty, D, dtype=plan["bank_dtype"], labels=labels)
    bank.update(torch.randint(K + empty, (K,)), rows)
    return bank


def options(plan: dict, negatives: Tensor | MemoryQueue | IndexedBank | None) -> tuple:
    """What comes into the result, and the keyword arguments."""
    B, given = plan["B"], {name: plan[name] for name in ("objective", "normalize", "reduction")}
    given["symmetric"] = plan["symmetric"]
    explicit = isinstance(negatives, Tensor)
    if plan["labels"] is not None:
        low, high = LABELS[plan["labels"]]
        fits = high - 1 <= torch.iinfo(plan["labels_as"]).max
        fits = fits and low >= torch.iinfo(plan["labels_as"]).min
        dtype = plan["labels_as"] if fits else torch.int64
        given["labels"] = torch.randint(low, high, (2 * B,)).to(dtype)[::2]
        if explicit:
            given["negative_labels"] = torch.randint(low, high, negatives.shape[:-1])
    if plan["form"] not in ("in-batch", "own"):
        K = (negatives if explicit else negatives.rows).shape[0]
        if "index" in plan["form"]:
            width = plan["M"] if K else 0
            given["negative_index"] = torch.randint(max(K, 1), (width, B)).T.to(torch.int32)
        if plan["exclude"]:
            given["exclude_index"] = torch.randint(-1, K, (B,))
    if plan["objective"] == "nce":
        if (log_z := plan["log_partition"]) is not None:
            dtype = plan["log_partition_as"]
            given["log_partition"] = log_z if dtype is None else torch.tensor(log_z, dtype=dtype)
        if plan["num_data"] is not None:
            given["num_data"] = plan["num_data"]
    if plan["weight"] is not None:
        weight = torch.rand(B) if plan["weight"] == "positive" else torch.randn(B)
        weight *= plan["weight"] != "zero"
        given["weight"] = weight.requires_grad_("weight" in plan["needs"])
    upstream = torch.randn(B if plan["reduction"] == "none" else (), dtype=torch.float64)
    return upstream, given


@examples("any")
@given(plan=PLANS)
def test_any_call(plan):
    check(make_call(plan), BACKENDS, "")


@examples("module")
@given(plan=PLANS, log10_temperature=st.floats(-2, 2), backend=st.sampled_from(BACKENDS))
def test_learnt_temperature(plan, log10_temperature, backend):
    """The module is the function at its temperature, and log(1/t) gets -t times t's gradient."""
    t = min(max(10**log10_temperature, 0.01), 100.0)
    call = make_call(plan | {"log10_temperature": 0.0, "temperature": None})
    if "log_partition" in call.options:
        call.options["log_partition"] = float(call.options["log_partition"])
    loss_fn = ContrastiveLoss(
        t,
        learnable_temperature=True,
        backend=backend,
        **{
            name: call.options[name]
            for name in (*MODULE_OPTIONS, "log_partition", "num_data")
            if name in call.options
        },
    )
    masks = ("labels", "negative_labels", "negative_index", "exclude_index", "weight")
    loss = loss_fn(
        call.query,
        call.positive,
        call.negatives,
        **{name: call.options[name] for name in masks if name in call.options},
    )
    (got,) = torch.autograd.grad(
        loss, loss_fn.log_inv_temperature, call.upstream.to(loss.dtype), allow_unused=True
    )
    call.temperature = loss_fn.temperature.detach().requires_grad_()
    exact = truth(call)
    at = 1 + call.needs().index("temperature")
    tolerance = 16 * torch.finfo(torch.float32).eps * (1 + exact.logit)
    torch.testing.assert_close(
        loss.detach().double(),
        exact.results[0],
        rtol=1e-6,
        atol=tolerance * exact.scales[0] + 1e-30,
        equal_nan=True,
    )
    t = float(call.temperature.detach())
    torch.testing.assert_close(
        got.double(),
        -t * exact.results[at],
        rtol=1e-6,
        atol=tolerance * exact.scales[at] * t + 1e-30,
        equal_nan=True,
    )


# What must hold whatever the truth is.
SMALL = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "B": st.integers(1, 9),
        "K": st.integers(1, 60),
        "D": st.integers(1, 40),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "temperature": st.sampled_from([0.05, 0.07, 0.3, 1.0, 20.0]),
        "objective": st.sampled_from(["infonce", "nce"]),
        "backend": st.sampled_from(BACKENDS),
    }
)


class Setting:
    """Random tensors of a plan of SMALL, and the loss of each query on them."""

    def __init__(self, plan: dict) -> None:
        torch.manual_seed(plan["seed"])
        self.__dict__.update(plan)
        self.query = torch.randn(self.B, self.D, dtype=self.dtype).requires_grad_()
        self.positive = torch.randn(self.B, self.D, dtype=self.dtype).requires_grad_()
        self.rows = torch.randn(self.K, self.D, dtype=self.dtype)
        self.upstream = torch.randn(self.B, dtype=self.dtype)
        self.tolerance = 32 * torch.finfo(self.dtype).eps * (1 + 1 / self.temperature)
        if self.objective == "nce":  # what is given can't depend on the rows
            self.tolerance *= self.K

    def loss(self, negatives, **options) -> Tensor:
        if self.objective == "nce":
            options = {"log_partition": 0.5} | options
        return contrastive_loss(
            options.pop("query", self.query),
            options.pop("positive", self.positive),
            negatives,
            temperature=self.temperature,
            objective=self.objective,
            reduction="none",
            backend=self.backend,
            **options,
        )

    def results(self, negatives, **options) -> list[Tensor]:
        """The loss, gradients of query and positive, and of the negatives if they need one."""
        inputs = [self.query, self.positive]
        if isinstance(negatives, Tensor) and negatives.requires_grad:
            inputs.append(negatives)
        loss = self.loss(negatives, **options)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, self.upstream)]

    def assert_close(self, ours: list[Tensor], expected: list[Tensor]) -> None:
        for a, b in zip(ours, expected, strict=True):
            atol = self.tolerance * max(1.0, 1 / self.temperature, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@examples("property")
@given(plan=SMALL)
def test_the_order_of_the_bank_does_not_matter(plan):
    s = Setting(plan)
    order, labels = torch.randperm(s.K), torch.randint(3, (s.K,))
    masks = {"labels": torch.randint(3, (s.B,))}
    rows = F.normalize(s.rows, dim=1)
    expected = s.results(rows.requires_grad_(), negative_labels=labels, **masks)
    shuffled = rows.detach()[order].requires_grad_()
    got = s.results(shuffled, negative_labels=labels[order], **masks)
    s.assert_close(got, [*expected[:3], expected[3][order]])


@examples("property")
@given(plan=SMALL, cut=st.floats(0, 1))
def test_parts_of_the_bank_combine(plan, cut):
    """InfoNCE: e^l - 1 is a sum over negatives; NCE: l without the positive's term is."""
    s = Setting(plan)
    at = round(cut * s.K)
    whole, first, second, none = (
        s.loss(rows).detach().double() for rows in (s.rows, s.rows[:at], s.rows[at:], s.rows[:0])
    )
    if s.objective == "nce":
        combined = first + second - none
    else:
        assert none.eq(0).all()
        combined = torch.log1p(first.expm1() + second.expm1())
    s.assert_close([whole], [combined])


@examples("property")
@given(plan=SMALL, log10_factor=st.floats(-6, 6))
def test_length_does_not_matter_when_normalised(plan, log10_factor):
    s = Setting(plan)
    factors = torch.rand(s.K, 1, dtype=s.dtype) + 0.5
    expected = s.loss(s.rows)
    scaled = s.loss(factors * s.rows, query=s.query * 10**log10_factor, positive=s.positive / 7)
    s.assert_close([scaled], [expected])


@examples("property")
@given(plan=SMALL, M=st.integers(0, 50))
def test_the_positive_among_the_negatives(plan, M):
    """M copies of it: ln(1 + M), whatever the temperature, and no direction to go."""
    s = Setting(plan | {"objective": "infonce"})
    copies = s.positive.detach()[:, None].expand(s.B, M, s.D)
    loss, dquery, dpositive = s.results(copies)
    s.assert_close([loss, dquery], [torch.full_like(loss, math.log1p(M)), torch.zeros_like(dquery)])
    pulled = -M / (1 + M) * s.upstream[:, None] * F.normalize(s.query.detach(), dim=1)
    unit, length = F.normalize(s.positive.detach(), dim=1), s.positive.detach().norm(dim=1)
    pulled = pulled - (pulled * unit).sum(1, keepdim=True) * unit
    s.assert_close([dpositive * length[:, None] * s.temperature], [pulled])


@examples("property")
@given(plan=SMALL, poison=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
@pytest.mark.parametrize("source", ["queue", "bank", "queue by index", "bank by index", "rows"])
def test_rows_that_are_not_used_may_hold_anything(source, plan, poison):
    s = Setting(plan)
    index = torch.randint(s.K, (s.B, 7))
    options = {"negative_index": index} if source.endswith("index") or source == "rows" else {}
    used = torch.zeros(s.K + 3, dtype=torch.bool)
    if source == "rows":
        used[index] = True
        negatives = torch.cat([s.rows, s.rows[:1].expand(3, -1)])
        rows = negatives
    else:
        make = MemoryQueue if source.startswith("queue") else IndexedBank
        negatives = make(s.K + 3, s.D, dtype=s.dtype)
        given = (s.rows,) if make is MemoryQueue else (torch.randperm(s.K + 3)[: s.K], s.rows)
        getattr(negatives, "enqueue" if make is MemoryQueue else "update")(*given)
        used, rows = negatives.valid, negatives.rows
        if options:
            options["negative_index"] = torch.randint(s.K + 3, (s.B, 7))
    clean = s.results(negatives, **options)
    rows[~used] = poison
    poisoned = s.results(negatives, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert all(x.isfinite().all() for x in poisoned)


@examples("property")
@given(plan=SMALL, by_index=st.booleans())
def test_a_used_nan_shows(plan, by_index):
    """In the loss of each query that uses it, and of no other."""
    s = Setting(plan)
    s.rows[s.K // 2] = torch.nan
    labels, negative_labels = torch.randint(3, (s.B,)), torch.randint(3, (s.K,))
    options = {"labels": labels, "negative_labels": negative_labels}
    uses = labels != negative_labels[s.K // 2]
    if by_index:
        options["negative_index"] = torch.randint(s.K, (s.B, 5))
        uses &= (options["negative_index"] == s.K // 2).any(1)
    loss, dquery, _ = s.results(s.rows, **options)
    assert torch.equal(loss.isnan(), uses)
    assert dquery[uses].isnan().all()


def test_there_are_enough_examples():
    parametrised = {"test_rows_that_are_not_used_may_hold_anything": 5}
    tests = [name for name, value in globals().items() if hasattr(value, "hypothesis")]
    share = {"test_any_call": "any", "test_learnt_temperature": "module"}
    total = sum(
        SHARES[share.get(name, "property")] * EXAMPLES * parametrised.get(name, 1) for name in tests
    )
    assert total >= 2000 or EXAMPLES < 25
