"""pool_hidden_states: what it takes, and what it says to bad input."""

import re

import pytest
import torch

import codir_fast
from codir_fast import reference


def layers(L=3, B=2, T=5, H=4, dtype=torch.float32):
    return tuple(torch.randn(B, T, H, dtype=dtype) for _ in range(L))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_layers_are_chosen_in_order(backend):
    given = layers(4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = codir_fast.pool_hidden_states(given, mask, layers=(2, -1, 0), backend=backend)
    expected = reference.masked_pool([given[2], given[3], given[0]], mask, "mean")
    torch.testing.assert_close(pooled, expected)


def test_a_single_tensor():
    (layer,) = layers(1)
    torch.testing.assert_close(codir_fast.pool_hidden_states(layer), layer.mean(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32], ids=str)
def test_mask_dtypes(dtype):
    given, mask = layers(), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    expected = codir_fast.pool_hidden_states(given, mask, mode="last")
    assert torch.equal(codir_fast.pool_hidden_states(given, mask.to(dtype), mode="last"), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_and_last_are_real_tokens(side):
    (layer,) = layers(1)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(2, 5)
    first, last = 0, 2
    if side == "left":
        mask, first, last = mask.flip(1), 2, 4
    pool = codir_fast.pool_hidden_states
    assert torch.equal(pool(layer, mask, mode="first"), layer[:, first])
    assert torch.equal(pool(layer, mask, mode="last"), layer[:, last])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("mode", ["mean", "max", "first", "last"])
def test_compiles(mode, backend, compile_whole):
    given = tuple(layer.requires_grad_() for layer in layers())
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])

    def pool(*given):
        return codir_fast.pool_hidden_states(given, mask, mode=mode, layers=[0, 2], backend=backend)

    expected = pool(*given)
    gradients = torch.autograd.grad(expected.square().sum(), [given[0], given[2]])
    got = compile_whole(pool)(*given)
    torch.testing.assert_close(got, expected)
    again = torch.autograd.grad(got.square().sum(), [given[0], given[2]])
    torch.testing.assert_close(again, gradients)


def test_half_precision_under_autocast():
    given = layers(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert codir_fast.pool_hidden_states(given).dtype == torch.bfloat16


BAD = {
    "no layer": (((),), {}, ValueError, "`hidden_states` must hold at least one tensor"),
    "not a tensor": (([1.0],), {}, TypeError, "`hidden_states` must be a Tensor, got float"),
    "rank": ((torch.ones(2, 3),), {}, ValueError, "(B, T, H), got (2, 3)"),
    "dtype": ((torch.ones(2, 3, 4).long(),), {}, TypeError, "`hidden_states` must be float32"),
    "mixed": (([torch.ones(2, 3, 4), torch.ones(2, 3, 5)],), {}, ValueError, "share one shape"),
    "mask shape": ((torch.ones(2, 3, 4), torch.ones(2, 4)), {}, ValueError, "= (2, 3), got (2, 4)"),
    "mask type": ((torch.ones(2, 3, 4), [1]), {}, TypeError, "`attention_mask` must be a Tensor"),
    "mode": ((torch.ones(2, 3, 4),), {"mode": "cls"}, ValueError, "`mode` must be one of"),
    "layer": ((layers(),), {"layers": [3]}, ValueError, "`layers` must be in [-3, 3)"),
    "no layers": ((layers(),), {"layers": []}, ValueError, "`layers` must name at least one"),
    "device": (
        (torch.ones(2, 3, 4), torch.ones(2, 3, device="meta")),
        {},
        ValueError,
        "`attention_mask` must be on the device of `hidden_states`, cpu, got meta",
    ),
    "backend": ((torch.ones(2, 3, 4),), {"backend": "gpu"}, ValueError, "`backend` must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    args, options, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        codir_fast.pool_hidden_states(*args, **options)
    assert "\n" not in str(caught.value)
