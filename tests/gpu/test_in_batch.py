"""in_batch_contrast on a GPU: Triton's kernels against float64, and the loss beside the "torch"
backend, which takes each direction on its own.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_replays

from codir_fast import reference
from codir_fast.functional import contrastive_loss
from codir_fast.ops.in_batch_contrast import in_batch_contrast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# B, D: tiles of 16 to 128 rows held whole, of 512 columns, and wider ones in pieces.
SIZES = [
    (1, 1),
    (2, 3),
    (16, 64),
    (17, 31),
    (33, 128),
    (64, 384),
    (130, 100),
    (200, 256),
    (513, 512),
    (1024, 128),
    (70, 768),
    (300, 1030),
    (9, 4096),
]
FORMS = [(False, False), (False, True), (True, False), (True, True)]
forms = pytest.mark.parametrize(("symmetric", "labelled"), FORMS, ids=str)


def make_inputs(device, B, D, dtype, labelled=False, temperature=0.07):
    rows = torch.randn(2, B, D, device=device) * torch.rand(2, B, 1, device=device)
    labels = None
    if labelled:
        high = torch.tensor([7, 7 + (1 << 32), -7], device=device)
        labels = high[torch.randint(0, 3, (B,), device=device)]
    inv_t = torch.tensor(1 / temperature, device=device)
    return [*(x.to(dtype).requires_grad_() for x in rows), inv_t.requires_grad_()], labels


def dense(inputs, labels, symmetric, upstream, dtype, normalize=True):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    pair = [F.normalize(x, dim=1) if normalize else x for x in leaves[:2]]
    loss = reference.in_batch_contrast(*pair, leaves[2], labels, symmetric)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def assert_right(inputs, labels, symmetric, normalize=True):
    """The distance from the truth, as vectors, is a few roundings of products and of logits, and
    what eager PyTorch gives away too where it makes unit rows.
    """
    B, dtype = len(inputs[0]), inputs[0].dtype
    upstream = torch.randn(B, device=inputs[0].device)
    loss = in_batch_contrast(*inputs, labels, symmetric, normalize, backend="triton")
    found = [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]
    given = (inputs, labels, symmetric, upstream)
    exact = dense(*given, torch.float64, normalize)
    eager = dense(*given, dtype, normalize) if normalize else exact
    lengths = [float(x.detach().norm(dim=1).max()) for x in inputs[:2]]
    longest = 1.0 if normalize else lengths[0] * lengths[1]
    logit = float(inputs[2].detach()) * longest
    rounding = 4 * torch.finfo(dtype).eps + 8 * logit * torch.finfo(torch.float32).eps
    # Each query's part of the gradient to 1/t is at most twice what comes in, times its rows.
    floors = [0, 0, 0, float(upstream.norm()) * longest]
    names = ("loss", "query", "positive", "inv_temperature")
    for name, ours, right, plain, floor in zip(names, found, exact, eager, floors, strict=True):
        error, of_plain = (float((x.double() - right).norm()) for x in (ours, plain))
        allowed = 2 * of_plain + rounding * max(float(right.norm()), floor) + 1e-30
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@forms
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(device, dtype, size, symmetric, labelled):
    assert_right(*make_inputs(device, *size, dtype, labelled), symmetric)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(device, dtype, temperature):
    (*pair, inv_t), _ = make_inputs(device, 150, 64, dtype, temperature=temperature)
    pair = [F.normalize(x.detach().float(), dim=1).to(dtype).requires_grad_() for x in pair]
    assert_right([*pair, inv_t], None, True, normalize=False)


@pytest.mark.parametrize("D", [128, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_length(device, dtype, D):
    assert_right(*make_inputs(device, 90, D, dtype), True, normalize=False)


@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("D", [128, 512, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_are_alike_to_the_bit(device, dtype, D):
    inputs, labels = make_inputs(device, 700, D, dtype, labelled=True)
    upstream = torch.randn(700, device=device)

    def run():
        loss = in_batch_contrast(*inputs, labels, True, True, backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("B", [64, 2500])
def test_the_loss_is_that_of_each_direction(device, B, symmetric, reduction):
    """One way, many queries take bank_contrast."""
    (*pair, _), _ = make_inputs(device, B, 384, torch.bfloat16)
    temperature = torch.tensor(0.07, device=device, requires_grad=True)
    inputs = [*pair, temperature]
    upstream = torch.rand((B,) if reduction == "none" else (), device=device)
    found = []
    for backend in ("triton", "torch"):
        loss = contrastive_loss(
            *pair,
            temperature=temperature,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
        )
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs, upstream)])
    for ours, plain in zip(*found, strict=True):
        scale = float(plain.abs().max())
        torch.testing.assert_close(ours, plain, rtol=0, atol=2e-2 * scale)


@pytest.mark.usefixtures("needs_gpu")
@pytest.mark.parametrize("symmetric", [False, True])
def test_graph(device, symmetric):
    torch.use_deterministic_algorithms(False)
    inputs, _ = make_inputs(device, 64, 384, torch.bfloat16)
    inputs = inputs[:2]

    def run():
        loss = contrastive_loss(*inputs, symmetric=symmetric)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    assert_replays(run, inputs)


@pytest.mark.usefixtures("needs_gpu")
def test_compile(device):
    torch.use_deterministic_algorithms(False)
    inputs, _ = make_inputs(device, 40, 64, torch.bfloat16)

    def loss_of(query, key):
        return contrastive_loss(query, key, symmetric=True)

    compiled = torch.compile(loss_of, fullgraph=True)
    found, expected = (
        [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]
        for loss in (compiled(*inputs[:2]), loss_of(*inputs[:2]))
    )
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-4)
