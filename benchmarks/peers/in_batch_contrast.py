"""Peers of losses in-batch, both ways: queries and positive keys, each the others' negatives, and
gradients to both, normalisation included.
"""

import math

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.peers.inputs import Inputs, T
from codir_fast.benchmarks.peers.peer import Peer, Run, adder, replayed, with_gradient
from torch import Tensor

from codir_fast import ContrastiveLoss

PEERS: list[Peer] = []
peer = adder(PEERS, "in_batch_contrast", normalizes=True)


@peer("codir_fast", "ContrastiveLoss(symmetric=True)")
def _ours(inputs: Inputs) -> Run:
    loss_fn = ContrastiveLoss(T, symmetric=True)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive))


@peer(
    "codir_fast-graph", "ContrastiveLoss(symmetric=True), replayed as a CUDA graph", gpu_only=True
)
def _ours_graph(inputs: Inputs) -> Run:
    return replayed(_ours(inputs))


@peer("codir_fast-one-way", "ContrastiveLoss(), half of the loss", is_floor=True)
def _one_way(inputs: Inputs) -> Run:
    loss_fn = ContrastiveLoss(T)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive))


def _clip_loss(query: Tensor, positive: Tensor) -> Tensor:
    """As open_clip's ClipLoss."""
    logits = F.normalize(query, dim=1) @ F.normalize(positive, dim=1).T / T
    targets = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@peer("eager", "normalize, matmul, cross_entropy each way", copies=6, compiles=False)
def _eager(inputs: Inputs) -> Run:
    return with_gradient(inputs, lambda: _clip_loss(inputs.query, inputs.positive))


@peer("eager-graph", "eager, replayed as a CUDA graph", copies=6, gpu_only=True, compiles=False)
def _eager_graph(inputs: Inputs) -> Run:
    return replayed(_eager(inputs))


@peer("compile", "torch.compile of eager", copies=4)
def _compiled(inputs: Inputs) -> Run:
    torch.compiler.reset()
    loss = torch.compile(_clip_loss, dynamic=False, fullgraph=True)
    return with_gradient(inputs, lambda: loss(inputs.query, inputs.positive))


@peer("compile-graph", "compile, replayed as a CUDA graph", copies=4, gpu_only=True)
def _compiled_graph(inputs: Inputs) -> Run:
    return replayed(_compiled(inputs))


@peer("memeff", "MemoryEfficientCLIPLoss(stable=False)", packages=("memeff",), gpu_only=True)
def _memeff(inputs: Inputs) -> Run:
    from memeff.clip_loss import MemoryEfficientCLIPLoss

    loss_fn = MemoryEfficientCLIPLoss(temperature=T, stable=False)
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive))


@peer("inf-cl", "cal_inf_loss each way", packages=("inf_cl",), gpu_only=True)
def _inf_cl(inputs: Inputs) -> Run:
    from inf_cl import cal_inf_loss

    D = inputs.shape.sizes["D"]
    head_dim = math.gcd(D, 256)  # it splits D into heads of a power of two, 16 to 256
    if head_dim < 16:
        raise ValueError(f"Inf-CL takes D that is a multiple of 16, got {D}")

    def loss() -> Tensor:
        q, p = (F.normalize(x.float(), dim=1) for x in (inputs.query, inputs.positive))
        one_way = cal_inf_loss(q / T, p, head_dim=head_dim)
        return (one_way + cal_inf_loss(p / T, q, head_dim=head_dim)) / 2

    return with_gradient(inputs, loss)
