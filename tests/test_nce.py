"""The NCE objective and `symmetric`: formula, Z and where it is kept, every form of negatives."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import codir_fast
from codir_fast import reference
from codir_fast.functional import contrastive_loss, estimate_log_partition

BACKENDS = ("cpu", "torch")
B, K, D, M, T = 6, 40, 9, 7, 0.2
LOG_Z, NUM_DATA = 3.0, 500


def unit(x):
    return F.normalize(x, dim=-1)


def pair(dtype=torch.float64):
    return tuple(torch.randn(B, D, dtype=dtype).requires_grad_() for _ in range(2))


def as_published(positive, negatives, Z, M, n, allowed=None):
    """The loss as its authors write it: probabilities of logits (B,) and (B, N), no logarithms
    saved.
    """
    c, eps = M / n, 1e-7
    log_d1 = torch.log(torch.exp(positive) / Z / (torch.exp(positive) / Z + c + eps))
    log_d0 = torch.log(c / (torch.exp(negatives) / Z + c + eps))
    return -log_d1 - (log_d0 if allowed is None else log_d0 * allowed).sum(1)


def assert_same(loss, expected, inputs):
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(loss, inputs, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, upstream))


OPTIONS = dict(temperature=T, objective="nce", reduction="none", log_partition=LOG_Z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_negatives(backend):
    q, p = pair()
    negatives = torch.randn(K, D, dtype=torch.float64).requires_grad_()
    t = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    labels, negative_labels = torch.randint(0, 3, (B,)), torch.randint(0, 3, (K,))
    loss = contrastive_loss(
        q,
        p,
        negatives,
        **OPTIONS | {"temperature": t},
        num_data=NUM_DATA,
        labels=labels,
        negative_labels=negative_labels,
        backend=backend,
    )
    expected = as_published(
        (unit(q) * unit(p)).sum(1) / t,
        unit(q) @ unit(negatives).T / t,
        math.exp(LOG_Z),
        *(K, NUM_DATA, labels[:, None] != negative_labels),
    )
    assert_same(loss, expected, [q, p, negatives, t])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_by_index_of_a_bank(backend):
    q, p = pair()
    bank = codir_fast.IndexedBank(K, D, dtype=torch.float64)
    bank.update(torch.arange(K), torch.randn(K, D, dtype=torch.float64))
    index = torch.randint(0, K, (B, M))
    loss = contrastive_loss(q, p, bank, negative_index=index, backend=backend, **OPTIONS)
    logits = torch.einsum("bd,bmd->bm", unit(q), bank.rows[index]) / T
    positive = (unit(q) * unit(p)).sum(1) / T
    assert_same(loss, as_published(positive, logits, math.exp(LOG_Z), M, K), [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_of_each_query(backend):
    q, p = pair()
    own = torch.randn(B, M, D, dtype=torch.float64).requires_grad_()
    loss = contrastive_loss(q, p, own, backend=backend, **OPTIONS)
    logits = torch.einsum("bd,bmd->bm", unit(q), unit(own)) / T
    positive = (unit(q) * unit(p)).sum(1) / T
    assert_same(loss, as_published(positive, logits, math.exp(LOG_Z), M, M), [q, p, own])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_batch(backend):
    q, p = pair()
    loss = contrastive_loss(q, p, backend=backend, **OPTIONS)
    logits = unit(q) @ unit(p).T / T
    others = ~torch.eye(B, dtype=torch.bool)
    expected = as_published(logits.diagonal(), logits, math.exp(LOG_Z), B - 1, B, others)
    assert_same(loss, expected, [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["shared", "index", "own", "in-batch", "masked"])
def test_partition_of_a_batch(form, backend):
    q, p = (x.detach() for x in pair())
    rows, index = torch.randn(K, D, dtype=torch.float64), torch.randint(0, K, (B, M))
    positive = (unit(q) * unit(p)).sum(1, keepdim=True) / T
    logits, allowed, options, negatives = unit(q) @ unit(rows).T / T, None, {}, rows
    if form == "index":
        logits, options = logits.gather(1, index), {"negative_index": index}
    elif form == "own":
        negatives = torch.randn(B, M, D, dtype=torch.float64)
        logits = torch.einsum("bd,bmd->bm", unit(q), unit(negatives)) / T
    elif form == "in-batch":
        negatives, logits = None, unit(q) @ unit(p).T / T
        allowed = ~torch.eye(B, dtype=torch.bool)
    elif form == "masked":
        labels, negative_labels = torch.randint(0, 2, (B,)), torch.randint(0, 2, (K,))
        options = {"labels": labels, "negative_labels": negative_labels}
        allowed = labels[:, None] != negative_labels
    log_z = estimate_log_partition(
        q, p, negatives, temperature=T, num_data=NUM_DATA, backend=backend, **options
    )
    kept = logits.flatten() if allowed is None else logits[allowed]
    expected = torch.cat([positive.flatten(), kept]).exp().mean() * NUM_DATA
    torch.testing.assert_close(log_z.exp(), expected)


def test_partition_of_very_cold_logits_does_not_overflow():
    q, p = pair(torch.float32)
    log_z = estimate_log_partition(q, p, torch.randn(K, D), temperature=1e-3)
    assert log_z.dtype == torch.float32 and 500 < log_z < 1010


def test_module_keeps_the_partition_of_its_first_batch_in_training():
    loss_fn = codir_fast.ContrastiveLoss(T, objective="nce", num_data=NUM_DATA)
    negatives = torch.randn(K, D)
    (q, p), (q2, p2) = pair(torch.float32), pair(torch.float32)
    own = dict(temperature=T, objective="nce", num_data=NUM_DATA)
    loss_fn.eval()
    torch.testing.assert_close(
        loss_fn(q2, p2, negatives), contrastive_loss(q2, p2, negatives, **own)
    )
    assert loss_fn.log_partition.isnan()
    loss_fn.train()
    first = loss_fn(q, p, negatives)
    log_z = estimate_log_partition(q, p, negatives, temperature=T, num_data=NUM_DATA)
    torch.testing.assert_close(loss_fn.log_partition, log_z.double())
    torch.testing.assert_close(first, contrastive_loss(q, p, negatives, **own))
    second = contrastive_loss(q2, p2, negatives, **own, log_partition=log_z)
    torch.testing.assert_close(loss_fn(q2, p2, negatives), second)

    resumed = codir_fast.ContrastiveLoss(T, objective="nce", num_data=NUM_DATA)
    resumed.load_state_dict(loss_fn.state_dict())
    assert torch.equal(resumed(q2, p2, negatives), loss_fn(q2, p2, negatives))
    fresh = copy.deepcopy(resumed)
    fresh.load_state_dict({"log_partition": torch.tensor(math.nan)})
    fresh(q2, p2, negatives)
    assert not fresh.log_partition.isnan() and fresh.log_partition != loss_fn.log_partition


def test_a_batch_of_no_query_fixes_nothing():
    loss_fn = codir_fast.ContrastiveLoss(objective="nce", reduction="sum")
    assert loss_fn(torch.ones(0, D), torch.ones(0, D), torch.randn(K, D)) == 0
    assert loss_fn.log_partition.isnan()
    assert estimate_log_partition(*torch.ones(2, 0, D), torch.randn(K, D)) == -math.inf


def test_a_batch_that_meets_no_negatives_fixes_nothing():
    """Of positives alone, Z would be too large for good: a queue is empty in its first step."""
    loss_fn = codir_fast.ContrastiveLoss(objective="nce")
    q, p = (x.detach() for x in pair(torch.float32))
    queue, bank = codir_fast.MemoryQueue(K, D), codir_fast.IndexedBank(K, D)
    for empty in (queue, bank, torch.ones(0, D), torch.ones(B, 0, D)):
        assert loss_fn(q, p, empty).isfinite()
    assert loss_fn(q[:1], p[:1]).isfinite()
    assert loss_fn.log_partition.isnan()
    queue.enqueue(p)
    loss_fn(q, p, queue)
    expected = estimate_log_partition(q, p, queue)
    torch.testing.assert_close(loss_fn.log_partition, expected.double())


def test_a_partition_written_into_the_buffer_is_kept():
    """As DistributedDataParallel does, and who averages models."""
    loss_fn = codir_fast.ContrastiveLoss(objective="nce")
    for buffer in loss_fn.buffers():
        buffer.fill_(LOG_Z)
    q, p = pair(torch.float32)
    torch.testing.assert_close(
        loss_fn(q, p), contrastive_loss(q, p, objective="nce", log_partition=LOG_Z)
    )
    assert loss_fn.log_partition == LOG_Z


def test_a_partition_stays_in_float64():
    loss_fn = codir_fast.ContrastiveLoss(objective="nce", log_partition=18.944)
    for cast in (loss_fn.half, loss_fn.bfloat16, loss_fn.float):
        assert cast() is loss_fn and loss_fn.log_partition.item() == 18.944
    state = loss_fn.state_dict()
    on_meta = loss_fn.half().to("meta")
    assert on_meta.log_partition.dtype == torch.float64
    on_meta.load_state_dict(state, assign=True)
    assert on_meta.log_partition.item() == 18.944


def test_module_with_a_given_partition():
    loss_fn = codir_fast.ContrastiveLoss(T, objective="nce", log_partition=LOG_Z)
    q, p = pair(torch.float32)
    expected = contrastive_loss(q, p, temperature=T, objective="nce", log_partition=LOG_Z)
    torch.testing.assert_close(loss_fn(q, p), expected)
    assert loss_fn.log_partition == LOG_Z


@pytest.mark.parametrize("negatives", [torch.ones(0, D), torch.ones(B, 0, D)], ids=str)
def test_without_negatives_the_positive_stays(negatives):
    q, p = pair(torch.float32)
    loss = contrastive_loss(q, p, negatives, **OPTIONS)
    positive = (unit(q) * unit(p)).sum(1) / T
    assert_same(loss, F.softplus(LOG_Z + math.log1p(1e-7) - positive), [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetric_in_batch_is_the_loss_of_clip(backend):
    q, p = pair()
    options = dict(temperature=T, symmetric=True, reduction="none", backend=backend)
    logits, own = unit(q) @ unit(p).T / T, torch.arange(B)
    both = (F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T))
    assert_same(contrastive_loss(q, p, **options), sum(both) / 2, [q, p])


@pytest.mark.parametrize("objective", ["infonce", "nce"])
@pytest.mark.parametrize("form", ["in-batch", "shared", "own"])
def test_symmetric_is_the_mean_of_both_directions(form, objective):
    q, p = pair()
    shape = {"shared": (K, D), "own": (B, M, D)}.get(form)
    negatives = torch.randn(shape, dtype=torch.float64).requires_grad_() if shape else None
    options = dict(temperature=T, objective=objective, reduction="none")
    if objective == "nce":
        log_z = estimate_log_partition(q, p, negatives, temperature=T, symmetric=True)
        one_way = [
            estimate_log_partition(*pair, negatives, temperature=T).exp()
            for pair in [(q, p), (p, q)]
        ]
        torch.testing.assert_close(log_z.exp(), sum(one_way) / 2)
        torch.testing.assert_close(
            contrastive_loss(q, p, negatives, symmetric=True, **options),
            contrastive_loss(q, p, negatives, symmetric=True, log_partition=log_z, **options),
        )
        options["log_partition"] = log_z
    loss = contrastive_loss(q, p, negatives, symmetric=True, **options)
    expected = sum(contrastive_loss(*pair, negatives, **options) for pair in [(q, p), (p, q)]) / 2
    assert_same(loss, expected, [q, p] if negatives is None else [q, p, negatives])


def test_reference_is_the_published_formula():
    q, p = pair()
    bank, log_z = torch.randn(K, D, dtype=torch.float64), torch.tensor(LOG_Z)
    loss = reference.bank_contrast(q, p, bank, 1 / T, log_partition=log_z, num_data=100)
    positive, logits = (q * p).sum(1) / T, q @ bank.T / T
    torch.testing.assert_close(loss, as_published(positive, logits, math.exp(LOG_Z), 1, 100))
