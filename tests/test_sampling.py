"""sample_negatives: which rows, how uniformly, and what it refuses."""

import pytest
import torch

import codir_fast
from codir_fast import sampling

K, D, CLASSES = 60, 4, 3


def filled_bank(num_rows=K, filled=None):
    bank = codir_fast.IndexedBank(num_rows, D, labels=torch.arange(num_rows) % CLASSES)
    index = torch.arange(num_rows) if filled is None else filled
    bank.update(index, torch.randn(len(index), D))
    return bank


@pytest.fixture(params=["dense", "sparse"])
def path(request, monkeypatch):
    """Both ways of drawing without replacement, on sizes where one of them would be taken."""
    monkeypatch.setattr(sampling, "_DENSE_RATIO", {"dense": 10**9, "sparse": 0}[request.param])
    monkeypatch.setattr(sampling, "_PART_ELEMENTS", 100)  # several parts of the queries
    return request.param


@pytest.mark.parametrize("M", [1, 7, 40])
def test_rows_of_other_labels_each_at_most_once(M, path):
    bank, labels = filled_bank(), torch.randint(-1, CLASSES, (9,))
    index = codir_fast.sample_negatives(bank, labels, M)
    assert index.shape == (9, M) and index.dtype == torch.int64
    assert (bank.labels[index] != labels[:, None]).all()
    assert all(len(set(row.tolist())) == M for row in index)


def test_all_that_there_are(path):
    labels = torch.tensor([0, 1, 2])
    index = codir_fast.sample_negatives(filled_bank(), labels, 40)
    for row, label in zip(index, labels, strict=True):
        assert sorted(row.tolist()) == [r for r in range(K) if r % CLASSES != label]


def test_only_filled_rows(path):
    filled = torch.tensor([3, 4, 5, 9, 10, 11, 33])
    labels = torch.tensor([0, 1, 1])
    index = codir_fast.sample_negatives(filled_bank(filled=filled), labels, 3)
    assert set(index.flatten().tolist()) <= set(filled.tolist())


def test_queue():
    queue = codir_fast.MemoryQueue(10, D, with_labels=True)
    queue.enqueue(torch.randn(6, D), torch.tensor([0, 0, 1, 1, 2, 2]))
    index = codir_fast.sample_negatives(queue, torch.tensor([0]), 4)
    assert sorted(index[0].tolist()) == [2, 3, 4, 5]


@pytest.mark.parametrize("replacement", [False, True])
def test_uniform(replacement, path):
    """Each allowed row equally often: 40 rows, 400 draws of each expected, standard deviation
    about 20.
    """
    labels = torch.ones(4000, dtype=torch.int64)
    index = codir_fast.sample_negatives(filled_bank(), labels, 4, replacement=replacement)
    counts = index.flatten().bincount(minlength=K)
    assert counts[torch.arange(K) % CLASSES == 1].eq(0).all()
    others = counts[torch.arange(K) % CLASSES != 1]
    assert others.sum() == 16000 and (others - 400).abs().max() < 100
    pairs = (index[:, 0] * K + index[:, 1]).unique().numel()
    assert pairs > 1300  # of 1,560: no row is tied to another


def test_reproducible_from_the_generator(path):
    bank, labels = filled_bank(), torch.randint(0, CLASSES, (9,))
    draws = [
        codir_fast.sample_negatives(bank, labels, 5, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_with_replacement_one_row_is_enough():
    bank = filled_bank(filled=torch.tensor([4]))
    index = codir_fast.sample_negatives(bank, torch.tensor([0]), 5, replacement=True)
    assert index.eq(4).all()


@pytest.mark.parametrize("replacement", [False, True])
def test_no_query(replacement):
    empty = torch.empty(0, dtype=torch.int64)
    index = codir_fast.sample_negatives(filled_bank(), empty, 5, replacement=replacement)
    assert index.shape == (0, 5)


def test_goes_into_the_loss():
    bank, labels = filled_bank(), torch.randint(0, CLASSES, (9,))
    index = codir_fast.sample_negatives(bank, labels, 40)
    query, key = torch.randn(9, D), torch.randn(9, D)
    loss_fn = codir_fast.ContrastiveLoss()
    sampled = loss_fn(query, key, bank, negative_index=index)
    torch.testing.assert_close(sampled, loss_fn(query, key, bank, labels=labels))


def test_too_few():
    with pytest.raises(ValueError, match="`M` must be at most .* 40 for query 0, got 41"):
        codir_fast.sample_negatives(filled_bank(), torch.tensor([2, 2]), 41)
    bank = filled_bank(filled=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="`M` must be at most .* 1 for query 1, got 2"):
        codir_fast.sample_negatives(bank, torch.tensor([0, 1]), 2)
    bank = filled_bank(filled=torch.tensor([0]))
    with pytest.raises(ValueError, match="0 for query 0, got 1"):
        codir_fast.sample_negatives(bank, torch.tensor([0]), 1, replacement=True)
