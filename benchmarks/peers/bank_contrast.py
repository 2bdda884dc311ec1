"""Peers of bank_contrast: ours in each form that a user may choose, and plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.measure import fastest
from codir_fast.benchmarks.peers.inputs import Inputs, T
from codir_fast.benchmarks.peers.peer import (
    SEARCH_ROWS,
    Peer,
    Run,
    adder,
    replayed,
    with_gradient,
)
from torch import Tensor

from codir_fast import ContrastiveLoss, MemoryQueue

PEERS: list[Peer] = []
peer = adder(PEERS, "bank_contrast")


def _contrastive_loss(inputs: Inputs, **options: Any) -> Run:
    loss_fn = ContrastiveLoss(T, **options)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))


@peer("codir_fast", "ContrastiveLoss(normalize=False), (K, D) tensor")
def _ours(inputs: Inputs) -> Run:
    return _contrastive_loss(inputs, normalize=False)


@peer("codir_fast-normalize", "ContrastiveLoss(), (K, D) tensor", normalizes=True)
def _ours_normalize(inputs: Inputs) -> Run:
    return _contrastive_loss(inputs)


@peer(
    "codir_fast-cuda",
    'ContrastiveLoss(normalize=False, backend="cuda"), (K, D) tensor',
    gpu_only=True,
)
def _ours_cuda(inputs: Inputs) -> Run:
    return _contrastive_loss(inputs, normalize=False, backend="cuda")


@peer(
    "codir_fast-triton",
    'ContrastiveLoss(normalize=False, backend="triton"), (K, D) tensor',
    gpu_only=True,
)
def _ours_triton(inputs: Inputs) -> Run:
    return _contrastive_loss(inputs, normalize=False, backend="triton")


def _queue(inputs: Inputs, dtype: torch.dtype | None = None, backend: str = "auto") -> Run:
    queue = MemoryQueue(*inputs.bank.shape, dtype=dtype or inputs.bank.dtype)
    queue = queue.to(inputs.bank.device)
    for keys in inputs.bank.split(1 << 18):
        queue.enqueue(keys)
    loss_fn = ContrastiveLoss(T, backend=backend)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, queue))


@peer("codir_fast-queue", "ContrastiveLoss(), MemoryQueue", normalizes=True)
def _ours_queue(inputs: Inputs) -> Run:
    return _queue(inputs)


@peer(
    "codir_fast-float8",
    "ContrastiveLoss(), MemoryQueue of float8 rows",
    normalizes=True,
    gpu_only=True,
)
def _ours_float8(inputs: Inputs) -> Run:
    return _queue(inputs, torch.float8_e4m3fn)


@peer(
    "codir_fast-graph",
    "ContrastiveLoss(), MemoryQueue, replayed as a CUDA graph",
    normalizes=True,
    gpu_only=True,
)
def _ours_graph(inputs: Inputs) -> Run:
    return replayed(_queue(inputs))


@peer(
    "codir_fast-triton-graph",
    'ContrastiveLoss(backend="triton"), MemoryQueue, replayed as a CUDA graph',
    normalizes=True,
    gpu_only=True,
)
def _ours_triton_graph(inputs: Inputs) -> Run:
    return replayed(_queue(inputs, backend="triton"))


@peer(
    "codir_fast-cuda-graph",
    'ContrastiveLoss(backend="cuda"), MemoryQueue, replayed as a CUDA graph',
    normalizes=True,
    gpu_only=True,
)
def _ours_cuda_graph(inputs: Inputs) -> Run:
    return replayed(_queue(inputs, backend="cuda"))


@peer("two-products", "q @ b.T @ b, no loss", copies=1, is_floor=True, compiles=False)
def _two_products(inputs: Inputs) -> Run:
    query = inputs.query.detach()
    return lambda: ((query @ inputs.bank.T) @ inputs.bank,)


class _Chunked(torch.autograd.Function):
    """One pass over chunks of a frozen bank of unit rows; e^{s - 1/t} can't overflow."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, bank: Tensor, size: int) -> Tensor:
        s_pos = (query * positive).sum(1) / T
        total = (s_pos - 1 / T).exp()
        rows = total[:, None] * positive
        scaled = query / T
        total, rows = total.float(), rows.float()
        space = query.new_empty(len(query), size)
        for chunk in bank.split(size):
            weights = torch.mm(scaled, chunk.T, out=space[:, : len(chunk)].view(len(query), -1))
            weights.sub_(1 / T).exp_()
            total += weights.sum(1, dtype=torch.float32)
            if weights.dtype == torch.float32:
                rows.addmm_(weights, chunk)
            else:  # sums of many rows need float32
                rows += weights @ chunk
        ctx.dtype = query.dtype
        ctx.save_for_backward((rows / total[:, None] - positive) / T)
        return total.log() + 1 / T - s_pos

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grad[:, None] * direction).to(ctx.dtype), None, None, None


CHUNK_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 65536)


@peer("chunked", "PyTorch loop over the bank, one pass, best chunk size", compiles=False)
def _chunked(inputs: Inputs) -> Run:
    """With the chunk size that is fastest here."""

    def prepare(size: int, bank: Tensor) -> Run:
        vectors = (inputs.query, inputs.positive, bank)
        return with_gradient(inputs, lambda: _Chunked.apply(*vectors, size).mean())

    sizes = [size for size in CHUNK_SIZES if size <= max(len(inputs.bank), CHUNK_SIZES[0])]
    part = inputs.bank[:SEARCH_ROWS]
    best = fastest([prepare(size, part) for size in sizes], part.device)
    return prepare(sizes[best], inputs.bank)


def _cross_entropy(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ bank.T], dim=1) / T
    return F.cross_entropy(logits, logits.new_zeros(len(query), dtype=torch.int64))


@peer("eager", "matmul, cat, cross_entropy", copies=4, compiles=False)
def _eager(inputs: Inputs) -> Run:
    vectors = (inputs.query, inputs.positive, inputs.bank)
    return with_gradient(inputs, lambda: _cross_entropy(*vectors))


@peer(
    "eager-graph",
    "eager, replayed as a CUDA graph",
    copies=4,
    gpu_only=True,
    compiles=False,
)
def _eager_graph(inputs: Inputs) -> Run:
    return replayed(_eager(inputs))


@peer("compile", "torch.compile of eager", copies=3)
def _compiled(inputs: Inputs) -> Run:
    torch.compiler.reset()
    loss = torch.compile(_cross_entropy, dynamic=False, fullgraph=True)
    return with_gradient(inputs, lambda: loss(inputs.query, inputs.positive, inputs.bank))


@peer("compile-graph", "compile, replayed as a CUDA graph", copies=3, gpu_only=True)
def _compiled_graph(inputs: Inputs) -> Run:
    return replayed(_compiled(inputs))


@peer(
    "linear_cross_entropy",
    "torch.nn.functional.linear_cross_entropy, its automatic chunking",
    copies=2,
    others_count=True,
    compiles=False,
)
def _linear_cross_entropy(inputs: Inputs) -> Run:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    targets = torch.arange(len(inputs.query))

    def loss() -> Tensor:
        vectors = (inputs.query / T, inputs.positives_and_bank())
        return F.linear_cross_entropy(*vectors, targets, options=options)

    return with_gradient(inputs, loss)


@peer("lightly", "the formula of NTXentLoss, its bank is (D, K)", copies=4, compiles=False)
def _lightly(inputs: Inputs) -> Run:
    """NTXentLoss with memory_bank_size: einsum makes the logits."""
    bank, targets = inputs.bank.T.contiguous(), torch.zeros(len(inputs.query), dtype=torch.int64)

    def loss() -> Tensor:
        positive = torch.einsum("nc,nc->n", inputs.query, inputs.positive)[:, None]
        negative = torch.einsum("nc,ck->nk", inputs.query, bank)
        return F.cross_entropy(torch.cat([positive, negative], dim=1) / T, targets)

    return with_gradient(inputs, loss)
