"""codir_fast.compat.ClipLoss beside the formula of open_clip's, single process."""

import inspect

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


def test_refusals():
    with pytest.raises(NotImplementedError, match="`world_size` must be 1, got 2"):
        ClipLoss(world_size=2)
    with pytest.raises(NotImplementedError, match="`use_horovod=True` is not supported"):
        ClipLoss(use_horovod=True)
