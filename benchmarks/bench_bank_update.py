"""Writing to banks beside plain PyTorch: `pytest benchmarks/bench_bank_update.py`.

256 keys of 128 elements into 65,536 rows, float32: a queue's next rows, and rows by index with
momentum 0.5.
"""

import pytest
import torch
import torch.nn.functional as F

from codir_fast import IndexedBank, MemoryQueue

B, K, D = 256, 65536, 128


def queue():
    bank, keys = MemoryQueue(K, D), torch.randn(B, D)
    return lambda: bank.enqueue(keys)


def queue_in_pytorch():
    rows, keys, position = torch.zeros(K, D), torch.randn(B, D), [0]

    def enqueue():  # as MoCo: the batch divides the size
        rows[position[0] : position[0] + B] = F.normalize(keys, dim=1)
        position[0] = (position[0] + B) % K

    return enqueue


def bank():
    rows, keys = IndexedBank(K, D), torch.randn(B, D)
    index = torch.randperm(K)[:B]
    return lambda: rows.update(index, keys)


def bank_in_pytorch():
    rows, keys = F.normalize(torch.randn(K, D), dim=1), F.normalize(torch.randn(B, D), dim=1)
    index = torch.randperm(K)[:B]

    def update():
        mixed = rows.index_select(0, index).mul_(0.5).add_(keys, alpha=0.5)
        rows.index_copy_(0, index, F.normalize(mixed, dim=1))

    return update


@pytest.mark.parametrize("make", [queue, queue_in_pytorch], ids=lambda make: make.__name__)
def test_queue(benchmark, make):
    benchmark.group = f"enqueue ({B}, {D}) to {K} rows"
    benchmark(make())


@pytest.mark.parametrize("make", [bank, bank_in_pytorch], ids=lambda make: make.__name__)
def test_bank(benchmark, make):
    benchmark.group = f"update ({B}, {D}) of {K} rows"
    benchmark(make())
