"""codir_fast.compat.InfoNCE and info_nce beside info-nce-pytorch."""

import re

import numpy as np
import originals
import peers
import pytest
import torch
from originals import assert_same

import codir_fast
from codir_fast.compat import InfoNCE, info_nce

B, K, M, D = 6, 20, 5, 9
SHAPES = {"in-batch": None, "unpaired": (K, D), "paired": (B, M, D), "no row": (0, D)}


def inputs(source, dtype):
    shapes = [(B, D), (B, D)] + ([SHAPES[source]] if SHAPES[source] else [])
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("source", SHAPES)
def test_same_as_the_package(source, reduction, dtype):
    package = peers.info_nce_pytorch()
    mode = "paired" if source == "paired" else "unpaired"
    given = inputs(source, dtype)
    options = dict(temperature=0.2, reduction=reduction, negative_mode=mode)
    expected = package.info_nce(*given, **options)
    assert_same(info_nce(*given, **options), expected, given)
    assert_same(InfoNCE(**options)(*given), package.InfoNCE(**options)(*given), given)


@pytest.mark.parametrize("source", ["in-batch", "unpaired", "paired"])
def test_defaults_by_formula(source):
    given = inputs(source, torch.float64)
    negatives = given[2] if len(given) == 3 else None
    mode = {"negative_mode": "paired"} if source == "paired" else {}
    expected = originals.info_nce(*given[:2], negatives, 0.1).mean()
    assert_same(InfoNCE(**mode)(*given), expected, given)


def test_signature():
    package = peers.info_nce_pytorch()
    query = torch.randn(B, D)
    positional = (query, query, torch.randn(K, D), 0.5, "sum", "unpaired")
    torch.testing.assert_close(info_nce(*positional), package.info_nce(*positional))
    loss_fn = InfoNCE(0.5, "sum", "paired")
    assert (loss_fn.temperature, loss_fn.reduction, loss_fn.negative_mode) == (0.5, "sum", "paired")
    assert not loss_fn.state_dict()


def test_a_queue_may_be_given():
    queue = codir_fast.MemoryQueue(K, D)
    queue.enqueue(torch.randn(K, D))
    q, p = torch.randn(2, B, D)
    torch.testing.assert_close(InfoNCE()(q, p, queue), InfoNCE()(q, p, queue.rows))


def test_temperatures_of_other_kinds():
    q, p = torch.randn(2, B, D)
    expected = InfoNCE(0.25)(q, p)
    for temperature in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        torch.testing.assert_close(InfoNCE(temperature)(q, p), expected)


def test_refusals():
    q = torch.randn(B, D)
    with pytest.raises(ValueError, match="`negative_mode` must be one of"):
        InfoNCE(negative_mode="pair")
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got -1"):
        InfoNCE(temperature=-1)
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        InfoNCE(reduction="average")
    message = "`negative_keys` must have shape (K, D) for `negative_mode` 'unpaired', got (6, 5, 9)"
    with pytest.raises(ValueError, match=re.escape(message)):
        info_nce(q, q, torch.randn(B, M, D))
    with pytest.raises(ValueError, match=re.escape("`negative_keys` must have shape (B, M, D)")):
        info_nce(q, q, torch.randn(K, D), negative_mode="paired")
