"""contrastive_loss as users call it, on a GPU, and the unit rows that it makes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import EPSILON

import codir_fast
from codir_fast.functional import contrastive_loss
from codir_fast.ops.unit_rows import unit_rows

B, D, TEMPERATURE = 150, 64, 0.1
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
RUNS = [
    *itertools.product(("triton", "torch"), FLOATS),
    *itertools.product(("cuda",), HALVES),  # it takes no other
]


def results(loss_of, vectors, upstream, dtype):
    vectors = [x.detach().to(dtype).requires_grad_() for x in vectors]
    loss = loss_of(*vectors)
    return [loss.detach(), *torch.autograd.grad(loss, vectors, upstream.to(loss.dtype))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
def test_in_batch(device, needs_cuda_backend, backend, dtype, normalize, symmetric):
    """Beside cross-entropy over all pairs, in float64 and as PyTorch has it in the same dtype."""
    if backend == "cuda":
        needs_cuda_backend("bank_contrast")

    def plain(query, key):
        if normalize:
            query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        logits, own = query @ key.T / TEMPERATURE, torch.arange(B, device=device)
        loss = F.cross_entropy(logits, own, reduction="none")
        other = F.cross_entropy(logits.T, own, reduction="none")
        return (loss + other) / 2 if symmetric else loss

    def ours(query, key):
        how = {"normalize": normalize, "symmetric": symmetric, "backend": backend}
        return contrastive_loss(query, key, temperature=TEMPERATURE, reduction="none", **how)

    vectors = [F.normalize(torch.randn(B, D, device=device), dim=1).to(dtype) for _ in range(2)]
    upstream = torch.randn(B, device=device)
    got, eager = (results(loss_of, vectors, upstream, dtype) for loss_of in (ours, plain))
    exact = results(plain, vectors, upstream, torch.float64)
    for name, a, b, c in zip(("loss", "query", "key"), got, eager, exact, strict=True):
        error, eager_error = (float((x.double() - c).abs().max()) for x in (a, b))
        scale = float(c.abs().max())
        allowed = 2 * eager_error + 4 * EPSILON[dtype] * scale
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}, of {scale:.3g}"


@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
def test_nce_estimates_its_constant(device, needs_cuda_backend, backend, dtype):
    if backend == "cuda":
        needs_cuda_backend("bank_contrast")
    queue = codir_fast.MemoryQueue(500, D, dtype=dtype).to(device)
    queue.enqueue(torch.randn(500, D, device=device))
    query, key = (torch.randn(B, D, device=device).to(dtype) for _ in range(2))
    how = {"temperature": TEMPERATURE, "objective": "nce", "num_data": 1000}
    found = contrastive_loss(query, key, queue, backend=backend, **how)
    exact = (x.double() for x in (query, key, queue.keys))
    expected = contrastive_loss(*exact, backend="torch", **how)
    torch.testing.assert_close(found.double(), expected, rtol=5 * EPSILON[dtype], atol=0)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queue_and_loss_by_default(device, dtype, with_labels):
    """What a user writes: no backend is named, the queue fills up and turns round."""
    how = {"dtype": dtype, "with_labels": with_labels}
    queue = codir_fast.MemoryQueue(1000, 64, **how).to(device)
    mirror = codir_fast.MemoryQueue(1000, 64, **how)
    loss_fn = codir_fast.ContrastiveLoss()
    # Unit queries are rounded to their dtype, and logits are 1/t times as large.
    allowed = 1e-4 if dtype == torch.float32 else 10 * EPSILON[dtype]
    for _ in range(5):
        query, key = (torch.randn(300, 64).to(dtype) for _ in range(2))
        labels = torch.randint(0, 4, (300,)) if with_labels else None
        far_labels = labels.to(device) if with_labels else None
        on_device = [x.to(device, copy=True).requires_grad_() for x in (query, key)]
        loss = loss_fn(*on_device, queue, labels=far_labels)
        loss.backward()
        on_host = [x.float().requires_grad_() for x in (query, key)]
        expected = loss_fn(*on_host, mirror, labels=labels)
        expected.backward()
        assert abs(float(loss) - float(expected)) <= allowed * float(expected)
        for ours, right in zip(on_device, on_host, strict=True):
            error = (ours.grad.cpu().float() - right.grad).abs().max()
            assert error <= allowed * right.grad.abs().max()
        queue.enqueue(key.to(device), far_labels)
        mirror.enqueue(key, labels)
    torch.testing.assert_close(queue.keys.cpu(), mirror.keys)
    assert queue.is_full
    assert not with_labels or torch.equal(queue.labels.cpu(), mirror.labels)


@pytest.mark.parametrize(("N", "D"), [(1, 1), (70, 31), (5000, 128), (3, 4096)])
@pytest.mark.parametrize(
    ("dtype", "out"), [*itertools.product(FLOATS, repeat=2), (torch.float64, torch.float64)]
)
def test_unit_rows(device, N, D, dtype, out):
    rows = torch.randn(N, D, device=device).to(dtype)
    grad = torch.randn(N, D, device=device).to(out)
    rows[N // 2] = 0 if dtype in (torch.float32, torch.float64) else rows[N // 2]
    found = []
    for function, leaf in (
        (lambda x: unit_rows(x, out, "auto"), rows.detach().clone()),
        (lambda x: F.normalize(x, dim=1), rows.double().clone()),
    ):
        unit = function(leaf.requires_grad_())
        found.append((unit.detach(), *torch.autograd.grad(unit, leaf, grad.to(unit.dtype))))
    length = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True).clamp_min(1e-12)
    # Where a row has one element, its gradient is nothing but what is lost.
    scales = (1.0, grad.double().abs().amax(1, keepdim=True) / length)
    for ours, exact, scale in zip(*found, scales, strict=True):
        error = float(((ours.double() - exact) / scale).abs().max())
        assert error <= 4 * max(EPSILON.get(x, 1e-13) for x in (dtype, out))
