"""codir_fast.compat.ClipLoss beside the formula of open_clip's, single process."""

import inspect
import re

import numpy as np
import originals
import pytest
import torch
import torch.nn.functional as F
from originals import assert_same

from codir_fast.compat import ClipLoss

B, D = 7, 9
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def features(dtype=torch.float32):
    return [torch.randn(B, D, dtype=dtype, requires_grad=True) for _ in range(2)]


def test_signature():
    arguments = list(inspect.signature(ClipLoss).parameters)
    assert arguments[:5] == ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size"]
    forward = list(inspect.signature(ClipLoss.forward).parameters)[1:]
    names = ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
    assert forward == names
    assert not ClipLoss(True, True, True, 0, 1).state_dict()


@DTYPES
@pytest.mark.parametrize("normalized", [False, True])
def test_same_as_the_formula(normalized, dtype):
    given = features(dtype)
    image, text = (F.normalize(x, dim=1) if normalized else x for x in given)
    scale = torch.tensor(14.0, dtype=dtype, requires_grad=True)
    loss = ClipLoss()(image, text, scale)
    assert_same(loss, originals.ClipLoss()(image, text, scale), [*given, scale])
    assert_same(ClipLoss()(image, text, 14.0), originals.ClipLoss()(image, text, 14.0), given)


def test_logit_bias_shifts_all_logits_and_changes_nothing():
    image, text = features()
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)
    loss = ClipLoss()(image, text, scale, bias)
    original = originals.ClipLoss()(image, text, scale, bias)
    assert loss.shape == ()
    assert_same(loss, original, [image, text, scale, bias])
    torch.testing.assert_close(ClipLoss()(image, text, 10.0, -4.0), loss)


def test_output_dict():
    image, text = features()
    output = ClipLoss()(image, text, 10.0, output_dict=True)
    assert list(output) == ["contrastive_loss"]
    torch.testing.assert_close(output["contrastive_loss"], ClipLoss()(image, text, 10.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [10.7, 14.3, 33.2, 77.5, 99.9])
def test_a_half_precision_scale_is_widened_before_its_reciprocal_is_taken(scale, dtype):
    image, text = (F.normalize(torch.randn(64, 64), dim=1) for _ in range(2))
    half = torch.tensor(scale, dtype=dtype, requires_grad=True)
    exact = half.detach().double().requires_grad_()
    loss = ClipLoss()(image, text, half)
    expected = originals.ClipLoss()(image.double(), text.double(), exact)
    assert abs(loss.item() - expected.item()) < 3e-6
    (got,), (wanted,) = (torch.autograd.grad(x, s) for x, s in ((loss, half), (expected, exact)))
    assert got.dtype == dtype and got.shape == ()
    torch.testing.assert_close(got.double(), wanted.to(dtype).double(), rtol=1e-2, atol=1e-6)


def test_scales_of_other_kinds():
    image, text = features()
    expected = ClipLoss()(image, text, 10.0)
    for scale in (10, np.float32(10), np.int64(10), torch.tensor(10), torch.tensor([10.0])):
        torch.testing.assert_close(ClipLoss()(image, text, scale), expected)
    double = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    ClipLoss()(*features(torch.float64), double).backward()
    assert double.grad.dtype == torch.float64


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("inf"), float("nan"), 1e-320])
def test_a_scale_that_is_no_scale(scale):
    image, text = features()
    for given in (scale, torch.tensor(scale)):
        with pytest.raises(ValueError, match="`logit_scale` must be positive and finite, got"):
            ClipLoss()(image, text, given)


x = torch.ones(B, D)
BAD = {
    "a word": ((x, x, "1"), TypeError, "`logit_scale` must be a number, got str"),
    "True": ((x, x, True), TypeError, "`logit_scale` must be a number, got bool"),
    "complex": ((x, x, torch.ones((), dtype=torch.cfloat)), TypeError, "`logit_scale` must be flo"),
    "several": ((x, x, torch.ones(2)), ValueError, "`logit_scale` must have one element, got sh"),
    "rows": (
        (x, x[:3], 1.0),
        ValueError,
        "`text_features` must have shape (B, D) with B=7, D=9 as",
    ),
    "vector": ((x[0], x, 1.0), ValueError, "`image_features` must have shape (B, D)"),
    "list": ((x, [1], 1.0), TypeError, "`text_features` must be a Tensor, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    given, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        ClipLoss()(*given)


def test_refusals():
    with pytest.raises(NotImplementedError, match="`world_size` must be 1, got 2"):
        ClipLoss(world_size=2)
    with pytest.raises(NotImplementedError, match="`use_horovod=True` is not supported"):
        ClipLoss(use_horovod=True)
