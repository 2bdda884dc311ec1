"""contrastive_loss on a grid of cases, loss and each gradient against float64, on every backend.

The grid is the product of AXES without what would be too large for a dense truth (_LARGEST), and of
that, the smallest first: each case that brings a pair of values of two axes together for the first
time, and of the rest those whose name's checksum is a multiple of _STEPS at that size. In-batch
negatives have no K: a grid of their own. Temperatures, masks, weights, reductions and the rest are
drawn per case, from the checksum of its name.
"""

import itertools
import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import Call, check, truth
from torch import Tensor

from codir_fast import IndexedBank, MemoryQueue, reference

BACKENDS = ("cpu", "torch")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
AXES = {
    "objective": ("infonce", "nce"),
    "dtype": tuple(DTYPES),
    "B": (1, 2, 3, 31, 32, 33, 127, 257),
    "K": (0, 1, 15, 1023, 1025, 65536),
    "D": (1, 7, 64, 100, 128, 768),
    "form": ("shared", "gradient", "bank", "own", "index"),
}
# B * K * D; the dense truth of the last two forms makes as many rows.
_LARGEST = {"shared": 1 << 26, "gradient": 1 << 26, "bank": 1 << 26, "own": 1 << 22}
_LARGEST["index"] = _LARGEST["own"]
_STEPS = ((1 << 15, 2), (1 << 17, 4), (1 << 19, 8), (1 << 22, 32), (1 << 26, 512))


class Case(NamedTuple):
    objective: str
    dtype: str
    B: int
    K: int
    D: int
    form: str

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.dtype}-B{self.B}-K{self.K}-D{self.D}-{self.form}"

    @property
    def size(self) -> int:
        return self.B * max(self.K, 1) * self.D

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.name.encode())


def pairs(case: Case) -> Iterator[tuple]:
    return itertools.combinations(enumerate(case), 2)


def thinned() -> list[Case]:
    chosen, seen = [], set()
    product = itertools.starmap(Case, itertools.product(*AXES.values()))
    for case in sorted(product, key=lambda case: case.size):
        if case.size > _LARGEST[case.form]:
            continue
        step = next(step for largest, step in _STEPS if case.size <= largest)
        if case.checksum % step == 0 or not seen.issuperset(pairs(case)):
            chosen.append(case)
            seen.update(pairs(case))
    return chosen


GRID = thinned()
IN_BATCH = [
    Case(objective, dtype, B, B, D, "in-batch")
    for objective, dtype, B, D in itertools.product(
        AXES["objective"], AXES["dtype"], AXES["B"], AXES["D"]
    )
]


def make_call(case: Case) -> Call:
    choose = random.Random(case.checksum)
    torch.manual_seed(case.checksum)
    dtype, normalize = DTYPES[case.dtype], choose.random() < 0.8
    wide = torch.promote_types(dtype, torch.float32)
    length = case.D**0.5 if normalize else choose.choice([0.5, 2.0])
    query = length * F.normalize(torch.randn(case.B, case.D, dtype=wide), dim=1)
    positive = query + 0.5 * length / case.D**0.5 * torch.randn_like(query)
    t = choose.choice([0.05, 0.07, 0.2, 1.0, 8.0])
    temperature = torch.tensor(t, dtype=wide, requires_grad=True) if choose.random() < 0.8 else t
    reduction = choose.choice(["none", "none", "mean", "sum"])
    options = {
        "objective": case.objective,
        "normalize": normalize,
        "reduction": reduction,
        "symmetric": choose.random() < 0.2,
    }
    if choose.random() < 0.3:
        options["weight"] = torch.rand(case.B, dtype=wide).requires_grad_()
    upstream = torch.randn(case.B if reduction == "none" else (), dtype=torch.float64)
    negatives = None
    if case.form != "in-batch":
        negatives = make_negatives(case, choose, length, query, dtype)
    call = Call(
        query.to(dtype).requires_grad_(),
        positive.to(dtype).requires_grad_(),
        negatives,
        temperature,
        upstream,
        options,
    )
    add_masks(case, choose, call)
    if case.objective == "nce":
        add_partition(case, choose, call)
    return call


def make_negatives(
    case: Case, choose: random.Random, length: float, query: Tensor, dtype: torch.dtype
) -> Tensor | MemoryQueue | IndexedBank:
    """Rows near a query here and there, the rest random, or in 64 clusters."""
    shape = (case.B, case.K, case.D) if case.form == "own" else (case.K, case.D)
    rows = torch.randn(shape, dtype=query.dtype)
    if choose.random() < 0.3:
        centres = torch.randn(64, case.D, dtype=query.dtype)
        rows = centres[torch.arange(case.K) % 64] + 0.02 * rows
    rows = rows.mul_(length / case.D**0.5)
    if case.K:
        near = query if case.form == "own" else query[: case.K]
        at = torch.randint(case.K, near.shape[:1])
        rows[(torch.arange(case.B), at) if case.form == "own" else at] += near
    if case.form == "bank" or (case.form == "index" and choose.random() < 0.3):
        return make_bank(case, choose, rows)
    needs = case.form == "gradient" or (case.form != "shared" and choose.random() < 0.7)
    return rows.to(dtype).requires_grad_(needs)


def make_bank(case: Case, choose: random.Random, rows: Tensor) -> MemoryQueue | IndexedBank:
    """K rows and as many again, or one, that are not filled."""
    K, dtype = case.K, choose.choice([DTYPES[case.dtype], torch.bfloat16, torch.float32])
    if rows.dtype != torch.float64 and dtype == torch.float64:
        dtype = torch.float32
    empty = 1 if K == 0 else choose.choice([0, 1, min(K, 100)])
    if choose.random() < 0.5:
        queue = MemoryQueue(K + empty, case.D, dtype=dtype, with_labels=True)
        queue.enqueue(rows, torch.randint(-2, 3, (K,)))
        return queue
    bank = IndexedBank(K + empty, case.D, dtype=dtype, labels=torch.randint(-2, 3, (K + empty,)))
    bank.update(torch.randperm(K + empty)[:K], rows)
    return bank


def add_masks(case: Case, choose: random.Random, call: Call) -> None:
    B, negatives = case.B, call.negatives
    K = negatives.rows.shape[0] if isinstance(negatives, (MemoryQueue, IndexedBank)) else case.K
    if choose.random() < 0.4:
        call.options["labels"] = torch.randint(-2, 3, (B,))
        if isinstance(negatives, Tensor):
            call.options["negative_labels"] = torch.randint(-2, 3, negatives.shape[:-1])
    if case.form == "index":
        width = min(case.K, choose.choice([1, 5, case.K]))
        call.options["negative_index"] = torch.randint(max(K, 1), (B, width))
    if case.form not in ("in-batch", "own") and choose.random() < 0.4:
        call.options["exclude_index"] = torch.randint(-1, K, (B,))


def add_partition(case: Case, choose: random.Random, call: Call) -> None:
    if choose.random() < 0.3:
        call.options["num_data"] = choose.choice([1, 100, 10**6])
    if choose.random() < 0.6:  # near what it would be, or not
        largest = 1 / float(torch.as_tensor(call.temperature).detach())
        log_z = choose.uniform(-2, 2) + choose.choice([0.0, largest, -largest])
        given = choose.random() < 0.5
        call.options["log_partition"] = torch.tensor(log_z).double() if given else log_z


@pytest.mark.parametrize("case", GRID + IN_BATCH, ids=lambda case: case.name)
def test_case(case):
    check(make_call(case), BACKENDS, case.name)


def test_the_grid_is_large_and_has_all_pairs():
    assert len(set(GRID)) == len(GRID) >= 3000
    seen = {pair for case in GRID for pair in pairs(case)}
    for one, other in itertools.combinations(range(len(AXES)), 2):
        values = list(AXES.values())
        for a, b in itertools.product(values[one], values[other]):
            assert ((one, a), (other, b)) in seen, f"no case has {a} and {b}"
    assert len(IN_BATCH) == 2 * 4 * 8 * 6


@pytest.mark.parametrize("form", ["shared", "bank", "own", "index", "in-batch"])
@pytest.mark.parametrize("objective", AXES["objective"])
def test_the_truth_is_the_specification(objective, form):
    """accuracy.py's formulas against codir_fast.reference, both in float64."""
    for seed in range(10):
        call = make_call(Case(objective, "float64", 5 + seed, 12, 8, form))
        call.options |= {"reduction": "none", "symmetric": False}
        call.upstream = torch.randn(len(call.query), dtype=torch.float64)
        call.options.pop("weight", None)
        loss = specified(call, objective)
        inputs = [call.tensors()[name] for name in call.needs()]
        gradients = torch.autograd.grad(loss, inputs, call.upstream)
        torch.testing.assert_close([loss.detach(), *gradients], truth(call).results)


def specified(call: Call, objective: str) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if call.options["normalize"] else x

    options, negatives, B = call.options, call.negatives, len(call.query)
    q, p, index = unit(call.query), unit(call.positive), options.get("negative_index")
    masks = {"labels": options.get("labels"), "exclude_index": options.get("exclude_index")}
    if negatives is None:
        rows, masks["bank_labels"] = p, masks["labels"]
        masks["exclude_index"] = torch.arange(B)
    elif isinstance(negatives, Tensor):
        rows, masks["bank_labels"] = unit(negatives), options.get("negative_labels")
    else:
        rows, masks["bank_labels"] = negatives.rows.double(), negatives.row_labels
        masks["valid"] = negatives.valid
    if rows.ndim == 3:
        index = torch.arange(rows.shape[0] * rows.shape[1]).view(rows.shape[:2])
        rows = rows.flatten(0, 1)
        if masks["bank_labels"] is not None:
            masks["bank_labels"] = masks["bank_labels"].flatten()
    if objective == "nce":
        offered = (
            len(p) - 1 if negatives is None else len(rows) if index is None else index.shape[1]
        )
        rows_of = (
            index.shape[1] if isinstance(negatives, Tensor) and negatives.ndim == 3 else len(rows)
        )
        counts = (offered, options.get("num_data", rows_of))
        masks["num_noise"], masks["num_data"] = (1, 1) if 0 in counts else counts
        if "log_partition" not in options:
            options["log_partition"] = 1.5
        masks["log_partition"] = torch.tensor(float(options["log_partition"]), dtype=torch.float64)
    if index is None:
        return reference.bank_contrast(q, p, rows, 1 / call.temperature, **masks)
    return reference.indexed_contrast(q, p, rows, 1 / call.temperature, index, **masks)
