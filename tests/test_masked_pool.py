"""masked_pool: every backend against the float64 reference, as value, gradient and citizen of
PyTorch.
"""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from codir_fast import reference
from codir_fast.ops import masked_pool as module
from codir_fast.ops.registration import overload

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (6, 4, 17, 96), (1, 2, 130, 33), (3, 0, 4, 5), (2, 3, 4, 0)]


def make_layers(L, B, T, H, dtype=torch.float32):
    return [torch.randn(B, T, H, dtype=torch.float64).to(dtype) for _ in range(L)]


def make_mask(kind, B, T):
    if kind == "none":
        return None
    length = torch.randint(0, T + 1, (B, 1))
    if kind == "right":
        return (torch.arange(T) < length).long()
    if kind == "left":
        return torch.arange(T) >= length
    return torch.randint(0, 2, (B, T)) * 3  # holes; not zero counts


def gradients(function, layers, upstream, needs, dtype=None):
    layers = [layer.detach().to(dtype or layer.dtype).clone() for layer in layers]
    for layer, need in zip(layers, needs, strict=True):
        layer.requires_grad_(need)
    pooled = function(layers)
    if any(needs):
        pooled.backward(upstream.to(pooled.dtype))
    return [pooled.detach(), *(layer.grad for layer in layers)]


def check(assert_accurate, backend, layers, mask, mode, needs=None):
    needs = needs or [True] * len(layers)
    upstream = torch.randn(layers[0].shape[0], len(layers) * layers[0].shape[2])

    def ours(given):
        return module.masked_pool(given, mask, mode, backend)

    def plain(given):
        return reference.masked_pool(given, mask, mode)

    exact = gradients(plain, layers, upstream.to(layers[0].dtype), needs, torch.float64)
    eager = gradients(plain, layers, upstream, needs)
    assert_accurate(gradients(ours, layers, upstream, needs), eager, exact, name=backend)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, mode, kind, dtype, size, assert_accurate):
    L, B, T, H = size
    check(assert_accurate, backend, make_layers(L, B, T, H, dtype), make_mask(kind, B, T), mode)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_subset_of_gradients(backend, mode, needs, assert_accurate):
    check(assert_accurate, backend, make_layers(3, 4, 6, 5), make_mask("right", 4, 6), mode, needs)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, mode):
    layers = make_layers(2, 4, 6, 10)
    mask = make_mask("holes", 4, 6)
    expected = module.masked_pool(layers, mask, mode, backend)
    spread = [
        layers[0].transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([layers[1], layers[1]], dim=3)[..., 0],
    ]
    wide_mask = torch.stack([mask, mask], dim=2)[:, :, 0]
    assert torch.equal(module.masked_pool(spread, wide_mask, mode, backend), expected)
    part = [layer[1:, ::2, 3:8] for layer in layers]
    expected = module.masked_pool([p.contiguous() for p in part], mask[1:, ::2], mode, backend)
    assert torch.equal(module.masked_pool(part, mask[1:, ::2], mode, backend), expected)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_may_be_expanded(backend, mode):
    layers = [layer.requires_grad_() for layer in make_layers(2, 3, 4, 5)]
    module.masked_pool(layers, None, mode, backend).sum().backward()
    if mode == "mean":
        torch.testing.assert_close(layers[1].grad, torch.full((3, 4, 5), 0.25))
    else:
        torch.testing.assert_close(layers[1].grad.sum(1), torch.ones(3, 5))


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend, mode):
    layers = make_layers(2, 5, 6, 3)
    mask = make_mask("right", 5, 6)
    mask[0] = 0
    poisoned = [layer.masked_fill(mask[:, :, None] == 0, torch.nan) for layer in layers]
    expected = module.masked_pool(layers, mask, mode, backend)
    assert torch.equal(module.masked_pool(poisoned, mask, mode, backend), expected)
    assert expected[0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_of_equal_infinite_and_nan_tokens(backend):
    nan, inf = torch.nan, torch.inf
    columns = [[0, 2, 2, 1], [-inf, -inf, -inf, -inf], [1, nan, 3, nan], [inf, 0, inf, 0]]
    layer = torch.tensor(columns).T[None].contiguous()
    mask = torch.tensor([[0, 1, 1, 1]])
    pooled, argmax = overload("masked_pool", backend)([layer], mask, "max")
    expected = torch.tensor([[2, -inf, nan, inf]])
    assert torch.equal(pooled.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert argmax.tolist() == [[1, 1, 1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_at_all(backend):
    for mode in module.MODES:
        layers = [layer.requires_grad_() for layer in make_layers(2, 3, 0, 4)]
        pooled = module.masked_pool(layers, None, mode, backend)
        pooled.sum().backward()
        assert pooled.eq(0).all() and layers[0].grad.shape == (3, 0, 4)


@given(
    size=st.tuples(*(st.integers(low, high) for low, high in ((1, 4), (0, 5), (0, 9), (0, 40)))),
    kind=st.sampled_from(["none", "right", "left", "holes"]),
    mode=st.sampled_from(module.MODES),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, assert_accurate, size, kind, mode, dtype):
    L, B, T, H = size
    check(assert_accurate, backend, make_layers(L, B, T, H, dtype), make_mask(kind, B, T), mode)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat(backend, mode):
    layers, mask = make_layers(3, 16, 64, 48), make_mask("right", 16, 64)
    upstream = torch.randn(16, 3 * 48)

    def ours(given):
        return module.masked_pool(given, mask, mode, backend)

    first, again = (gradients(ours, layers, upstream, [True] * 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, mode):
    layers = [layer.requires_grad_() for layer in make_layers(2, 2, 4, 3, torch.float64)]
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])
    assert torch.autograd.gradcheck(
        lambda *given: module.masked_pool(given, mask, mode, backend), layers
    )


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, mode, needs):
    layers = [layer.requires_grad_(needs) for layer in make_layers(2, 3, 5, 4)]
    mask = make_mask("right", 3, 5) if needs else None
    torch.library.opcheck(overload("masked_pool", backend), (layers, mask, mode))


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward(backend, mode):
    mask = make_mask("right", 3, 5)
    _, argmax = overload("masked_pool", backend)(make_layers(2, 3, 5, 4), mask, mode)
    op = overload("masked_pool_backward", backend)
    torch.library.opcheck(op, (torch.randn(3, 8), mask, argmax, 2, 5, mode))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises(backend):
    (layer,) = make_layers(1, 2, 3, 4)
    layer.requires_grad_()
    pooled = module.masked_pool([layer], None, "mean", backend).square().sum()
    (first,) = torch.autograd.grad(pooled, layer, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_pool has no second derivative"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="masked_pool has no second derivative"):
        torch.autograd.grad(first.square().sum(), layer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_is_refused(backend):
    (layer,) = make_layers(1, 2, 3, 4)

    def pooled(layer):
        return module.masked_pool([layer], None, "mean", backend).sum()

    for transformed in (torch.func.grad(pooled), torch.func.vmap(pooled)):
        with pytest.raises(RuntimeError, match="masked_pool can't be transformed by torch.func"):
            transformed(layer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_refused(backend):
    (layer,) = make_layers(1, 2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(layer, layer)
        with pytest.raises(RuntimeError, match="masked_pool has no forward-mode derivative"):
            module.masked_pool([dual], None, "mean", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_separate_tensors(backend):
    layers = [layer.requires_grad_() for layer in make_layers(2, 2, 3, 4)]
    module.masked_pool(layers, None, "mean", backend).sum().backward()
    kept = layers[1].grad.clone()
    layers[0].grad.zero_()
    assert torch.equal(layers[1].grad, kept)
