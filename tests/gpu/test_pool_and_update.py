"""masked_pool and bank_update on a GPU, by backend; unit rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import codir_fast
from codir_fast import reference
from codir_fast.ops.bank_update import bank_update
from codir_fast.ops.unit_rows import unit_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3, torch.float64: 1e-12}


# Each is a kernel of its own, which takes a second or two to compile.
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *itertools.product(DTYPES, [(13, 8, 65, 384)]),
        *itertools.product(DTYPES[:2], [(1, 1, 1, 1), (2, 3, 17, 40), (25, 2, 130, 130)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_masked_pool(device, needs_cuda_backend, backend, dtype, mode, size):
    if backend == "cuda":
        needs_cuda_backend("masked_pool")
    L, B, T, H = size
    states = [torch.randn(B, T, H, device=device).to(dtype) for _ in range(L)]
    mask = torch.rand(B, T, device=device) < 0.6
    mask[0] = False
    upstream = torch.randn(B, L * H, device=device)

    def run(pool, dtype):
        leaves = [state.to(dtype).requires_grad_() for state in states]
        pooled = pool(leaves)
        return [pooled, *torch.autograd.grad(pooled, leaves, upstream.to(pooled.dtype))]

    got = run(lambda x: codir_fast.pool_hidden_states(x, mask, mode=mode, backend=backend), dtype)
    exact = run(lambda x: reference.masked_pool(x, mask, mode), torch.float64)
    for ours, right in zip(got, exact, strict=True):
        largest = float(right.abs().max()) or 1.0
        assert float((ours.double() - right).abs().max()) <= EPSILON[dtype] * largest


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("with_filled", [False, True])
@pytest.mark.parametrize("D", [1, 100, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_bank_update(device, dtype, D, with_filled, momentum):
    K, N = 50, 400
    bank, keys = torch.randn(K, D).to(dtype), torch.randn(N, D)
    index = torch.randint(0, K, (N,))
    filled = torch.rand(K) < 0.5 if with_filled else None
    on_device = [None if x is None else x.to(device) for x in (bank, index, keys, filled)]
    bank_update(bank, index, keys, momentum, filled, backend="cpu")
    bank_update(*on_device[:3], momentum, on_device[3], backend="triton")
    torch.testing.assert_close(on_device[0].cpu(), bank, rtol=0, atol=EPSILON[dtype])
    assert filled is None or torch.equal(on_device[3].cpu(), filled)


@pytest.mark.parametrize(("N", "D"), [(1, 1), (70, 31), (5000, 128), (3, 4096)])
@pytest.mark.parametrize(
    ("dtype", "out"), [*itertools.product(DTYPES[:3], repeat=2), (torch.float64, torch.float64)]
)
def test_unit_rows(device, N, D, dtype, out):
    rows = torch.randn(N, D, device=device).to(dtype)
    grad = torch.randn(N, D, device=device).to(out)
    rows[N // 2] = 0 if dtype in (torch.float32, torch.float64) else rows[N // 2]
    found = []
    for function, leaf in (
        (lambda x: unit_rows(x, out), rows.detach().clone()),
        (lambda x: F.normalize(x, dim=1), rows.double().clone()),
    ):
        unit = function(leaf.requires_grad_())
        found.append((unit.detach(), *torch.autograd.grad(unit, leaf, grad.to(unit.dtype))))
    length = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True).clamp_min(1e-12)
    # Where a row has one element, its gradient is nothing but what is lost.
    scales = (1.0, grad.double().abs().amax(1, keepdim=True) / length)
    for ours, exact, scale in zip(*found, scales, strict=True):
        error = float(((ours.double() - exact) / scale).abs().max())
        assert error <= max(EPSILON[dtype], EPSILON[out])
