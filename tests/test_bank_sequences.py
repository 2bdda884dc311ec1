"""MemoryQueue and IndexedBank through long random lives, step by step against a deque and a dict of
plain Python.

Keys of the queue are small integers. Their squares add up exactly in every dtype and order, and a
square root and a division are rounded once: so every backend must give F.normalize's rows to the
last bit, whatever the batch, the place in the queue or the dtype of the keys.
"""

import random
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

import codir_fast
from codir_fast import backend

STEPS, D = 50, 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Sequences for each dtype, by backend and number of threads. "torch" is what a GPU runs.
SEQUENCES = {("cpu", 1): 250, ("cpu", 2): 4, ("torch", 1): 24}


@pytest.fixture(params=SEQUENCES, ids=lambda key: f"{key[0]}-{key[1]}")
def sequences(request, monkeypatch):
    """How many sequences to run, with the backend set."""
    name, num_threads = request.param
    monkeypatch.setitem(backend.AUTO, ("cpu", "bank_update"), (name,))
    kept = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    yield SEQUENCES[request.param]
    torch.set_num_threads(kept)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class DequeQueue:
    """What a MemoryQueue must hold: the newest rows and labels, oldest first."""

    def __init__(self, size, dtype, with_labels):
        self.rows, self.labels = deque(maxlen=size), deque(maxlen=size)
        self.dtype, self.with_labels, self.written = dtype, with_labels, 0

    def enqueue(self, keys, labels):
        self.rows.extend(F.normalize(keys.to(wide(self.dtype)), dim=1).to(self.dtype))
        self.labels.extend(labels.tolist())
        self.written += len(keys)

    def convert(self, dtype):
        self.dtype = dtype
        self.rows = deque((row.to(dtype) for row in self.rows), self.rows.maxlen)

    def check(self, queue):
        size, filled = self.rows.maxlen, len(self.rows)
        keys = queue.keys
        assert keys.dtype == self.dtype and keys.shape == (filled, D)
        if filled:
            assert torch.equal(keys, torch.stack(list(self.rows)))
        if self.with_labels:
            assert queue.labels.tolist() == list(self.labels)
        else:
            assert queue.labels is None
        assert queue.position.item() == self.written % size
        assert len(queue) == filled and queue.is_full == (filled == size)


def ragged(rng, size):
    """How many rows a step brings: often 0 or 1, sometimes more than the queue holds."""
    return rng.choice((0, 1, rng.randint(0, size), rng.randint(0, size), rng.randint(0, 3 * size)))


def make_queue(size, dtype, with_labels):
    return codir_fast.MemoryQueue(size, D, dtype=dtype, with_labels=with_labels)


def same_state(module, kept):
    return all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())


def copied_state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def queue_step(rng, queue, model):
    """A batch: in eval mode it must leave no trace."""
    n = ragged(rng, model.rows.maxlen)
    keys = torch.randint(-8, 9, (n, D)).to(rng.choice(DTYPES))
    labels = torch.randint(-3, 100, (n,)).to(rng.choice((torch.int64, torch.int32, torch.int8)))
    given = (keys, labels) if model.with_labels else (keys,)
    if rng.random() < 1 / 6:
        kept = copied_state(queue)
        queue.eval()
        queue.enqueue(*given)
        assert same_state(queue, kept)
        queue.train()
    else:
        queue.enqueue(*given)
        model.enqueue(keys, labels)


def queue_reloaded(rng, queue, model):
    """A new queue, often of another dtype, that has already seen something else."""
    model.convert(rng.choice((model.dtype, *DTYPES)))
    fresh = make_queue(model.rows.maxlen, model.dtype, model.with_labels)
    n = ragged(rng, model.rows.maxlen)
    fresh.enqueue(torch.randn(n, D), *([torch.zeros(n).long()] if model.with_labels else []))
    fresh.load_state_dict(load(save(queue.state_dict())))
    return fresh


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queue_against_a_deque(sequences, dtype):
    rng = random.Random(str(dtype))
    for _ in range(sequences):
        size, with_labels = rng.randint(1, 12), rng.random() < 0.5
        queue = make_queue(size, dtype, with_labels)
        model = DequeQueue(size, dtype, with_labels)
        for _ in range(STEPS):
            if rng.random() < 1 / 10:
                queue = queue_reloaded(rng, queue, model)
            else:
                queue_step(rng, queue, model)
            model.check(queue)


class DictBank:
    """What an IndexedBank must hold: a row per example that was ever updated."""

    def __init__(self, dtype, momentum):
        self.rows, self.momentum = {}, momentum
        self.dtype, self.coarsest = dtype, torch.finfo(dtype).eps

    def update(self, index, keys):
        for r, key in zip(index.tolist(), keys.to(wide(self.dtype)), strict=True):
            if r in self.rows:
                old = self.rows[r].to(wide(self.dtype))
                key = self.momentum * old + (1 - self.momentum) * key
            self.rows[r] = F.normalize(key, dim=0).to(self.dtype)

    def convert(self, dtype):
        self.dtype, self.coarsest = dtype, max(self.coarsest, torch.finfo(dtype).eps)
        self.rows = {r: row.to(dtype) for r, row in self.rows.items()}

    def check(self, bank, labels):
        K = bank.keys.shape[0]
        assert bank.keys.dtype == self.dtype and torch.equal(bank.labels, labels)
        assert bank.valid.tolist() == [r in self.rows for r in range(K)]
        assert len(bank) == len(self.rows) and bank.is_full == (len(self.rows) == K)
        nothing = torch.zeros(D, dtype=self.dtype)
        expected = torch.stack([self.rows.get(r, nothing) for r in range(K)])
        # A norm that differs in its last bit may round a row's entry the other way, in each dtype
        # that the row goes through; two keys in the wrong order are far more apart.
        torch.testing.assert_close(bank.keys, expected, atol=4 * self.coarsest, rtol=0)


def make_bank(K, dtype, momentum, labels):
    return codir_fast.IndexedBank(K, D, momentum=momentum, dtype=dtype, labels=labels)


def bank_step(rng, bank, model):
    n = rng.choice((0, 1, rng.randint(1, 4), rng.randint(1, 12)))
    index = torch.tensor([rng.randrange(bank.keys.shape[0]) for _ in range(n)], dtype=torch.int64)
    index = index.to(rng.choice((torch.int64, torch.int32, torch.uint8)))
    # Without a negative entry no mix comes near 0, where rounding errors would grow.
    keys = (torch.rand(n, D).pow(3) + 0.01).to(rng.choice(DTYPES))
    if rng.random() < 1 / 6:
        kept = copied_state(bank)
        bank.eval()
        bank.update(index, keys)
        assert same_state(bank, kept)
        bank.train()
    else:
        bank.update(index, keys)
        model.update(index, keys)


@pytest.mark.parametrize("momentum", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indexed_bank_against_a_dict(sequences, dtype, momentum):
    rng = random.Random(f"{dtype} {momentum}")
    for _ in range(sequences // 25 + 1):
        K = rng.randint(1, 8)
        labels = torch.tensor([rng.randrange(5) for _ in range(K)])
        bank, model = make_bank(K, dtype, momentum, labels), DictBank(dtype, momentum)
        for _ in range(STEPS):
            if rng.random() < 1 / 10:
                model.convert(rng.choice((model.dtype, *DTYPES)))
                state = load(save(bank.state_dict()))
                bank = make_bank(K, model.dtype, momentum, torch.zeros(K).long())
                bank.update(torch.tensor([K - 1]), torch.randn(1, D))
                bank.load_state_dict(state)
            else:
                bank_step(rng, bank, model)
            model.check(bank, labels)
