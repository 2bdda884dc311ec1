"""The specification itself, against the formulas written out and PyTorch's own functions."""

import math

import torch
import torch.nn.functional as F

from codir_fast import reference


def test_bank_contrast_is_cross_entropy_of_the_positive():
    query, positive, bank = torch.randn(5, 4), torch.randn(5, 4), torch.randn(9, 4)
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ bank.T], dim=1) / 0.5
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(reference.bank_contrast(query, positive, bank, 2.0), expected)


def test_bank_contrast_by_hand():
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    loss = reference.bank_contrast(
        query,
        query,
        bank,
        3.0,
        bank_scale=torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64),
        labels=torch.tensor([7]),
        bank_labels=torch.tensor([1, 7, 2]),
        exclude_index=torch.tensor([-1]),
    )
    expected = math.log(math.exp(3) + math.exp(0) + math.exp(3)) - 3
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)


def test_allowed_negatives():
    bank = torch.zeros(4, 2)
    allowed = reference.allowed_negatives(
        2,
        bank,
        labels=torch.tensor([0, 1]),
        bank_labels=torch.tensor([0, 1, 1, 2]),
        exclude_index=torch.tensor([-1, 3]),
        valid=torch.tensor([True, True, False, True]),
    )
    assert allowed.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_masked_pool_by_hand():
    layer = torch.tensor([[[1.0], [5.0], [3.0]], [[2.0], [4.0], [9.0]], [[1.0], [1.0], [1.0]]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]])
    expected = {"mean": [4, 3, 0], "max": [5, 4, 0], "first": [5, 2, 0], "last": [3, 4, 0]}
    for mode, values in expected.items():
        pooled = reference.masked_pool([layer, -layer], mask, mode)
        assert pooled[:, 0].tolist() == values
        if mode != "max":
            assert pooled[:, 1].tolist() == [-value for value in values]


def test_bank_update_by_hand():
    bank, filled = torch.tensor([[1.0, 0.0], [9.0, 9.0]]), torch.tensor([True, False])
    index, keys = torch.tensor([0, 1, 0]), torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    new, now_filled = reference.bank_update(bank, index, keys, 0.5, filled)
    once = torch.tensor([1.0, 1.0]) / math.sqrt(2)
    twice = F.normalize(0.5 * once + torch.tensor([0.0, 0.5]), dim=0)
    torch.testing.assert_close(new, torch.stack([twice, torch.tensor([0.0, 1.0])]))
    assert now_filled.tolist() == [True, True] and filled.tolist() == [True, False]
