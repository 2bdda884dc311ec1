"""masked_pool and bank_update on a GPU, by backend."""

import itertools

import pytest
import torch

import codir_fast
from codir_fast import reference
from codir_fast.ops.bank_update import bank_update

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
