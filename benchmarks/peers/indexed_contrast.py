"""Peers of indexed_contrast: each query against rows of the bank that an index names."""

from typing import Any

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.peers.inputs import Inputs, T
from codir_fast.benchmarks.peers.peer import Peer, Run, adder, replayed, with_gradient
from torch import Tensor

from codir_fast import ContrastiveLoss
from codir_fast.functional import contrastive_loss

PEERS: list[Peer] = []
peer = adder(PEERS, "indexed_contrast")


@peer("codir_fast", "contrastive_loss(negative_index=...)")
def _ours(inputs: Inputs) -> Run:
    def loss() -> Tensor:
        vectors = (inputs.query, inputs.positive, inputs.bank)
        options: dict[str, Any] = {"temperature": T, "normalize": False}
        return contrastive_loss(*vectors, negative_index=inputs.index, **options)

    return with_gradient(inputs, loss)


@peer(
    "codir_fast-graph",
    "contrastive_loss(negative_index=...), replayed as a CUDA graph",
    gpu_only=True,
)
def _ours_graph(inputs: Inputs) -> Run:
    return replayed(_ours(inputs))


@peer("gathered", "index_select, bmm, as RepDistiller's ContrastMemory", copies=3, compiles=False)
def _gathered(inputs: Inputs) -> Run:
    B, M = inputs.index.shape
    targets = torch.zeros(B, dtype=torch.int64)

    def loss() -> Tensor:
        rows = inputs.bank.index_select(0, inputs.index.flatten()).view(B, M, -1)
        negative = torch.bmm(rows, inputs.query[:, :, None])[:, :, 0]
        positive = (inputs.query * inputs.positive).sum(1, keepdim=True)
        return F.cross_entropy(torch.cat([positive, negative], dim=1) / T, targets)

    return with_gradient(inputs, loss)


@peer(
    "gathered-graph",
    "gathered, replayed as a CUDA graph",
    copies=3,
    gpu_only=True,
    compiles=False,
)
def _gathered_graph(inputs: Inputs) -> Run:
    return replayed(_gathered(inputs))


@peer("dense", "codir_fast, all K rows instead of M", is_floor=True)
def _dense(inputs: Inputs) -> Run:
    loss_fn = ContrastiveLoss(T, normalize=False)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))
