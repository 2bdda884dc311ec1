"""codir_fast.distributed.partial_sums: parts of the negatives make the loss over all of them."""

import re

import pytest
import torch

import codir_fast
from codir_fast.distributed import combine_partial_sums, partial_sums
from codir_fast.functional import contrastive_loss

B, D, K = 5, 12, 60
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# InfoNCE at a temperature where e^s overflows, and where all negatives lie far below the positive.
CASES = {
    "infonce": {"temperature": 0.2},
    "cold": {"temperature": 1e-3},
    "not normalised": {"temperature": 0.05, "normalize": False},
    "nce": {"objective": "nce", "temperature": 0.2, "log_partition": 4.0},
    "nce, not normalised": {
        "objective": "nce",
        "temperature": 0.5,
        "log_partition": 9.0,
        "normalize": False,
    },
}
CUTS = ([60], [20, 0, 40], [1] * 20 + [40])


def inputs(dtype):
    query, positive, rows = (torch.randn(n, D, dtype=dtype) for n in (B, B, K))
    query[0] = positive[0]
    query[1] = 0  # no length, no direction
    return query, positive, rows


def expected(query, positive, rows, temperature, **options):
    """Loss and gradients of each query, by autograd through the whole."""
    query = query.clone().requires_grad_()
    inverses = torch.full((B,), 1 / temperature, dtype=query.dtype, requires_grad=True)
    losses, grads = [], []
    for n in range(B):
        one = contrastive_loss(
            query[n : n + 1],
            positive[n : n + 1],
            rows,
            temperature=1 / inverses[n],
            reduction="sum",
            **options,
        )
        losses.append(one.detach())
        grads.append(torch.autograd.grad(one, (query, inverses)))
    return torch.stack(losses), sum(q for q, _ in grads), sum(t for _, t in grads)


def assert_near(got, expected, dtype):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12  # logits of 1000 are rounded at 6e-5
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{error:.1e}"


@DTYPES
@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("case", CASES)
def test_parts_make_the_whole(case, cuts, dtype):
    options = CASES[case]
    vectors = inputs(dtype)
    query, positive, rows = vectors
    counts = {"num_noise": K, "num_data": K} if "nce" in case and "info" not in case else {}
    parts = [partial_sums(query, positive, part, **options, **counts) for part in rows.split(cuts)]
    parts.append(partial_sums(query, positive, None, **options, **counts))
    got = combine_partial_sums(parts, objective=options.get("objective", "infonce"))
    for ours, theirs in zip(got, expected(*vectors, **options), strict=True):
        assert_near(ours, theirs, dtype)


def test_masks_of_a_part():
    query, positive, rows = inputs(torch.float64)
    labels, row_labels = torch.arange(B) % 3, torch.arange(K) % 3
    exclude = torch.tensor([4, 59, -1, 30, 31])
    index = torch.randint(0, K, (B, 9))
    whole = contrastive_loss(
        query,
        positive,
        rows,
        labels=labels,
        negative_labels=row_labels,
        exclude_index=exclude,
        reduction="none",
    )
    halves = []
    for start in (0, 30):
        part = slice(start, start + 30)
        there = exclude - start
        halves.append(
            partial_sums(
                query,
                positive,
                rows[part],
                labels=labels,
                negative_labels=row_labels[part],
                exclude_index=torch.where((there >= 0) & (there < 30), there, -1),
            )
        )
    torch.testing.assert_close(combine_partial_sums(halves).loss, whole)
    by_index = [
        partial_sums(query, positive, rows, negative_index=columns) for columns in index.split(4, 1)
    ]
    whole = contrastive_loss(query, positive, rows, negative_index=index, reduction="none")
    torch.testing.assert_close(combine_partial_sums(by_index).loss, whole)


def test_a_bank_and_a_tensor_of_rows():
    query, positive, rows = inputs(torch.float32)
    queue = codir_fast.MemoryQueue(100, D)
    queue.enqueue(rows[:30])
    parts = [partial_sums(query, positive, part) for part in (queue, rows[30:])]
    loss, *_ = combine_partial_sums(parts)
    whole = contrastive_loss(query, positive, rows, reduction="none")
    torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_no_negatives(backend):
    query, positive, rows = inputs(torch.float32)
    for sums in (
        partial_sums(query, positive, rows[:0], backend=backend),
        partial_sums(query, positive, None, backend=backend),
        partial_sums(
            query,
            positive,
            rows[:0],
            backend=backend,
            objective="nce",
            log_partition=2.0,
            num_noise=1,
            num_data=1,
        ),
    ):
        assert not any(x.any() for x in sums)
    some = partial_sums(query, positive, rows, backend=backend)
    for ours, theirs in zip(combine_partial_sums([some, sums]), some, strict=True):
        torch.testing.assert_close(ours, theirs)


NCE = {"objective": "nce", "log_partition": 1.0, "num_noise": 5, "num_data": 9}
BAD = {
    "log_partition": ({"objective": "nce"}, '`log_partition` must be given for objective "nce"'),
    "for infonce": ({"log_partition": 1.0}, '`log_partition` must be given for objective "nce"'),
    "objective": ({"objective": "triplet"}, "`objective` must be one of"),
    "num_noise": (NCE | {"num_noise": 0}, "`num_noise` must be at least 1, got 0"),
    "num_data": (NCE | {"num_data": -1}, "`num_data` must be at least 1, got -1"),
    "no num_noise": (
        NCE | {"num_noise": None},
        "`num_noise` must be given for objective \"nce\" alone, got None for 'nce'",
    ),
    "no num_data": (
        NCE | {"num_data": None},
        "`num_data` must be given for objective \"nce\" alone, got None for 'nce'",
    ),
    "num_noise for infonce": (
        {"num_noise": 5},
        "`num_noise` must be given for objective \"nce\" alone, got 5 for 'infonce'",
    ),
    "num_data for infonce": (
        {"num_data": 9},
        "`num_data` must be given for objective \"nce\" alone, got 9 for 'infonce'",
    ),
    "labels": ({"labels": torch.arange(B)}, "`labels` with a tensor as `negative_keys` needs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        partial_sums(*inputs(torch.float32), **options)


@pytest.mark.parametrize("name", ["labels", "negative_labels", "negative_index", "exclude_index"])
@pytest.mark.parametrize("options", [{}, NCE], ids=["infonce", "nce"])
def test_the_positive_has_no_negatives_to_pick(options, name):
    query, positive, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=f"`{name}` needs `negative_keys`, got None: the positive"):
        partial_sums(query, positive, None, **options, **{name: torch.arange(B)})


def test_flags_and_counts_of_a_wrong_type():
    with pytest.raises(TypeError, match="`normalize` must be True or False, got str"):
        partial_sums(*inputs(torch.float32), normalize="no")
    with pytest.raises(TypeError, match="`num_noise` must be an int, got float"):
        partial_sums(*inputs(torch.float32), **NCE | {"num_noise": 5.0})


def test_parts_of_other_queries_can_not_be_combined():
    query, positive, rows = inputs(torch.float32)
    five, three = (partial_sums(query[:n], positive[:n], rows) for n in (5, 3))
    narrow = partial_sums(query[:, :4], positive[:, :4], rows[:, :4])
    for other, shape in ((three, (3, 12)), (narrow, (5, 4))):
        message = (
            "`parts` must be of the same queries, (B, D) with B=5, D=12 as part 0, "
            f"got {shape} as part 2"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            combine_partial_sums([five, five, other])


def test_what_can_not_be_combined():
    with pytest.raises(ValueError, match="`parts` must hold the sums of at least one part"):
        combine_partial_sums([])
    sums = partial_sums(*inputs(torch.float32))
    with pytest.raises(ValueError, match="`objective` must be one of"):
        combine_partial_sums([sums], objective="triplet")
