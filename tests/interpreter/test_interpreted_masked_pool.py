"""masked_pool's Triton kernels on CPU tensors, against the float64 reference."""

import pytest
import torch
from codir_fast.kernels.masked_pool import DTYPES, MODES, masked_pool
from codir_fast.kernels.masked_pool_backward import masked_pool_backward

import codir_fast
from codir_fast import reference

SIZES = [(1, 1, 1, 1), (3, 2, 33, 7), (1, 2, 19, 130), (1, 2, 270, 3)]
EMPTY = [(2, 0, 4, 5), (2, 3, 0, 4), (2, 3, 4, 0)]


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


def ours(layers, mask, mode, upstream):
    pooled, argmax = masked_pool(layers, mask, mode)
    assert argmax.shape == (pooled.shape if mode == "max" else (0,))
    L, (_, T, _) = len(layers), layers[0].shape
    grads = masked_pool_backward(upstream.to(pooled.dtype), mask, argmax, L, T, mode)
    return [pooled, torch.stack(grads)]


def plain(layers, mask, mode, upstream, dtype):
    layers = [layer.detach().to(dtype).clone().requires_grad_() for layer in layers]
    pooled = reference.masked_pool(layers, mask, mode)
    pooled.backward(upstream.to(dtype))
    return [pooled.detach(), torch.stack([layer.grad for layer in layers])]


def check(assert_accurate, layers, mask, mode):
    dtype = layers[0].dtype
    upstream = torch.randn(layers[0].shape[0], len(layers) * layers[0].shape[2]).to(dtype)
    found = ours(layers, mask, mode, upstream)
    assert all(tensor.dtype == dtype for tensor in found)
    eager = plain(layers, mask, mode, upstream, dtype)
    exact = plain(layers, mask, mode, upstream, torch.float64)
    assert_accurate(found, eager, exact, name=mode)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode, dtype, assert_accurate):
    check(assert_accurate, make_layers(2, 3, 19, 5, dtype), make_mask("holes", 3, 19), mode)


@pytest.mark.parametrize("kind", ["none", "right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_masks(mode, kind, assert_accurate):
    check(assert_accurate, make_layers(2, 3, 19, 5), make_mask(kind, 3, 19), mode)


@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_sizes(mode, size, assert_accurate):
    L, B, T, H = size
    check(assert_accurate, make_layers(L, B, T, H), make_mask("holes", B, T), mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_a_real_token_is_zero(mode, assert_accurate):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    pooled, grads = check(assert_accurate, make_layers(2, 2, 3, 5), mask, mode)
    assert pooled[1].eq(0).all() and grads[:, 1].eq(0).all()
    _, argmax = masked_pool(make_layers(2, 2, 3, 5), mask, "max")
    assert argmax[1].eq(-1).all() and argmax[0].ge(0).all()


def test_max_of_equal_infinite_and_nan_tokens():
    nan, inf = torch.nan, torch.inf
    columns = [[0, 2, 2, 1], [-inf, -inf, -inf, -inf], [1, nan, 3, nan], [inf, 0, inf, 0]]
    layer = torch.tensor(columns).T[None].contiguous()
    pooled, argmax = masked_pool([layer], torch.tensor([[0, 1, 1, 1]]), "max")
    assert torch.equal(pooled.nan_to_num(nan=7), torch.tensor([[2, -inf, 7, inf]]).nan_to_num())
    assert argmax.tolist() == [[1, 1, 1, 2]]


@pytest.mark.parametrize(("early", "late"), [(3, 18), (18, 35), (5, 37)])
def test_the_first_maximum_and_the_first_nan_win_in_any_tile(early, late):
    layer = torch.randn(1, 40, 4).clamp(-2, 2)
    layer[0, [early, late], 0] = 5
    layer[0, [early, late], 1] = torch.nan
    layer[0, early, 2], layer[0, late, 2] = torch.inf, torch.nan
    layer[0, early, 3], layer[0, late, 3] = torch.nan, torch.inf
    pooled, argmax = masked_pool([layer], None, "max")
    assert argmax.tolist() == [[early, early, late, early]]
    assert pooled[0, 0] == 5 and pooled[0, 1:].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_hold_anything(mode):
    layers, mask = make_layers(2, 3, 20, 3), make_mask("right", 3, 20)
    poisoned = [layer.masked_fill(mask[:, :, None] == 0, torch.nan) for layer in layers]
    for clean, dirty in zip(
        masked_pool(layers, mask, mode), masked_pool(poisoned, mask, mode), strict=True
    ):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("mode", MODES)
def test_strides(mode):
    layers, mask = make_layers(2, 4, 6, 10), make_mask("holes", 4, 6)
    swapped = [layer.transpose(0, 1).contiguous().transpose(0, 1) for layer in layers]
    sparse = torch.stack([layers[1], layers[1]], dim=3)[..., 0]
    wide_mask = torch.stack([mask, 1 - mask], dim=2)[:, :, 0]
    for given in (swapped, [swapped[0], layers[1]], [layers[0], sparse]):
        dense = [layer.contiguous() for layer in given]
        expected = masked_pool(dense, mask, mode)[0]
        assert torch.equal(masked_pool(given, wide_mask, mode)[0], expected)
    part, part_mask = [layer[1:, ::2, 3:8] for layer in layers], wide_mask[1:, ::2]
    expected = masked_pool([layer.contiguous() for layer in part], part_mask.contiguous(), mode)[0]
    assert torch.equal(masked_pool(part, part_mask, mode)[0], expected)


def test_upstream_gradient_may_be_expanded():
    _, argmax = masked_pool(make_layers(2, 3, 4, 5), None, "max")
    grad = torch.ones(1).expand(3, 10)
    for mode in MODES:
        grads = masked_pool_backward(
            grad, None, argmax if mode == "max" else argmax[:0], 2, 4, mode
        )
        torch.testing.assert_close(torch.stack(grads).sum(2), torch.ones(2, 3, 5))


@pytest.mark.parametrize("mode", MODES)
def test_as_a_backend(mode):
    """Through the public function: autograd and the operator's registration."""
    mask, upstream, states = make_mask("right", 3, 5), torch.randn(3, 8), make_layers(2, 3, 5, 4)
    results = []
    for backend in ("triton", "torch"):
        layers = [layer.clone().requires_grad_() for layer in states]
        pooled = codir_fast.pool_hidden_states(layers, mask, mode=mode, backend=backend)
        pooled.backward(upstream)
        results.append([pooled.detach(), *(layer.grad for layer in layers)])
    for triton, torch_ in zip(*results, strict=True):
        torch.testing.assert_close(triton, torch_)


def test_opcheck():
    layers = [layer.requires_grad_() for layer in make_layers(2, 2, 3, 4)]
    op = torch.ops.codir_fast.masked_pool_triton.default
    torch.library.opcheck(op, (layers, make_mask("right", 2, 3), "max"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None, "mean"), "at least one tensor, got none"),
        (([torch.ones(2, 3)], None, "mean"), r"shape \(B, T, H\), got torch.float32 \(2, 3\)"),
        (([torch.ones(2, 3, 4).long()], None, "mean"), "`hidden_states` must be float32"),
        (([torch.ones(2, 3, 4), torch.ones(2, 3, 5)], None, "mean"), "share one shape"),
        (([torch.ones(2, 3, 4)], torch.ones(2, 4).bool(), "mean"), r"shape \(2, 3\)"),
        (([torch.ones(2, 3, 4)], torch.ones(2, 3), "mean"), "`attention_mask` must be bool"),
        (([torch.ones(2, 3, 4)], None, "sum"), "`mode` must be one of .*, got 'sum'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        masked_pool(*arguments)


def test_bad_input_of_the_backward():
    grad, none = torch.ones(2, 6), torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`grad` must be .* \(B, 4 \* H\)"):
        masked_pool_backward(grad, None, none, 4, 3, "mean")
    with pytest.raises(ValueError, match=r"`argmax` must be int64 of shape \(2, 6\)"):
        masked_pool_backward(grad, None, none, 2, 3, "max")
    with pytest.raises(ValueError, match=r"`attention_mask` must be .* \(2, 3\)"):
        masked_pool_backward(grad, torch.ones(2, 4).bool(), none, 2, 3, "mean")
