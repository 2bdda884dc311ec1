"""Small shapes of each operator for compute-sanitizer, forward and backward: `make test-gpu` runs
this file under memcheck and racecheck where the tool works.
"""

import pytest
import torch
from cases import make_case, results

import codir_fast
from codir_fast.functional import contrastive_loss

SHAPES = [
    (B, K, D, masks)
    for (B, K, D), masks in zip(
        [
            (1, 1, 1),
            (3, 129, 31),
            (16, 300, 64),
            (17, 257, 128),
            (33, 200, 100),
            (64, 512, 128),
            (65, 301, 256),
            (130, 300, 64),
            (129, 140, 384),
            (40, 300, 512),
            (70, 250, 768),
            (5, 70, 1030),
            (9, 30, 4096),
            (4, 0, 8),
        ],
        [(), ("labels", "exclude", "valid"), ("scale",), ("exclude",)] * 4,
        strict=False,
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bank_contrast(device, shape):
    *size, masks = shape
    case = make_case(device, *size, masks=masks, normalize=True)
    assert results(case, torch.ones(size[0], device=device), "triton")[0].isfinite().all()


@pytest.mark.parametrize(
    "size",
    [
        *((1, 1, 8), (64, 700, 64), (130, 500, 128), (65, 301, 256), (70, 0, 72)),
        *((128, 500, 384), (70, 300, 512)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", [(), ("labels", "exclude", "valid")], ids=str)
def test_bank_contrast_by_cuda(device, needs_cuda_backend, size, masks):
    needs_cuda_backend("bank_contrast")
    case = make_case(device, *size, masks=masks, normalize=True)
    needs = ("query", "positive")
    upstream = torch.ones(size[0], device=device)
    assert results(case, upstream, "cuda", needs)[0].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (140, 128), (70, 512), (40, 768)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_batch_contrast(device, symmetric, size):
    query, key = torch.randn(2, *size, device=device).bfloat16()
    inputs = [query.requires_grad_(), key.requires_grad_()]
    labels = torch.randint(0, 5, size[:1], device=device)
    loss = contrastive_loss(*inputs, symmetric=symmetric, labels=labels, backend="triton")
    assert torch.autograd.grad(loss, inputs)[0].isfinite().all()


@pytest.mark.parametrize("size", [(1, 9, 5, 7), (4, 100, 300, 128), (3, 50, 20, 768)], ids=str)
def test_indexed_contrast(device, size):
    B, K, M, D = size
    case = make_case(device, B, K, D, M=M, masks=("labels", "exclude", "valid"))
    assert results(case, torch.ones(B, device=device), "triton")[0].isfinite().all()


@pytest.mark.parametrize("mode", ["mean", "max", "last"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_masked_pool(device, needs_cuda_backend, backend, mode):
    if backend == "cuda":
        needs_cuda_backend("masked_pool")
    states = [torch.randn(3, 33, 130, device=device, requires_grad=True) for _ in range(5)]
    mask = torch.rand(3, 33, device=device) < 0.6
    pooled = codir_fast.pool_hidden_states(states, mask, mode=mode, backend=backend)
    assert torch.autograd.grad(pooled.sum(), states)[0].isfinite().all()
