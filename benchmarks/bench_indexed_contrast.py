"""indexed_contrast beside gathering the rows: `pytest benchmarks/bench_indexed_contrast.py`.

Loss and gradient to the query, (B, M) = (32, 16384) rows of a bank (131072, 128), float32, on the
CPU: RepDistiller's setting for CRD. The eager peer is index_select, bmm, cross_entropy, autograd.
"""

import pytest
import torch
import torch.nn.functional as F

from codir_fast.functional import contrastive_loss

B, M, K, D, T = 32, 16384, 131072, 128, 0.07


def ours(query, positive, bank, index):
    options = {"temperature": T, "normalize": False, "negative_index": index}
    return contrastive_loss(query, positive, bank, **options)


def ours_nce(query, positive, bank, index):
    options = {"temperature": T, "normalize": False, "negative_index": index}
    return contrastive_loss(query, positive, bank, objective="nce", log_partition=12.0, **options)


def eager(query, positive, bank, index):
    rows = bank.index_select(0, index.flatten()).view(B, M, D)
    negatives = torch.bmm(rows, query[:, :, None])[:, :, 0]
    logits = torch.cat([(query * positive).sum(1, keepdim=True), negatives], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    query, positive, bank = (F.normalize(torch.randn(n, D), dim=1) for n in (B, B, K))
    return query.requires_grad_(), positive, bank, torch.randint(0, K, (B, M))


def test_they_agree(inputs):
    losses = [loss(*inputs) for loss in (ours, eager)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs[0]) for loss in losses))


@pytest.mark.benchmark(group="indexed_contrast (32, 16384 of 131072, 128), loss and gradient")
@pytest.mark.parametrize("loss", [ours, ours_nce, eager], ids=lambda loss: loss.__name__)
def test_loss_and_gradient(benchmark, loss, inputs):
    benchmark.pedantic(
        lambda: torch.autograd.grad(loss(*inputs), inputs[0]), rounds=10, warmup_rounds=2
    )
