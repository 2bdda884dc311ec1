"""Peers of bank_contrast from other packages; none is required, what is missing is reported so.

Where a package takes one matrix of classes, these are the positives and then the bank's rows: the
other queries' positives are negatives there too.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from codir_fast.benchmarks.peers.inputs import Inputs, T
from codir_fast.benchmarks.peers.peer import SEARCH_ROWS, Peer, Run, adder, with_gradient
from torch import Tensor

PEERS: list[Peer] = []
peer = adder(PEERS, "bank_contrast")


@peer(
    "cut_cross_entropy",
    "Apple's Cut Cross-Entropy: its kernels unfiltered, on CPUs torch_compile",
    packages=("cut_cross_entropy",),
    copies=3,
    others_count=True,
)
def _cut_cross_entropy(inputs: Inputs) -> Run:
    import cut_cross_entropy

    torch.compiler.reset()
    targets = torch.arange(len(inputs.query))
    on_gpu = {"impl": "cce", "filter_eps": None}
    options = on_gpu if inputs.query.is_cuda else {"impl": "torch_compile"}

    def loss() -> Tensor:
        vectors = (inputs.query / T, inputs.positives_and_bank())
        return cut_cross_entropy.linear_cross_entropy(*vectors, targets, **options)

    return with_gradient(inputs, loss)


@peer(
    "liger",
    "LigerFusedLinearCrossEntropyLoss",
    packages=("liger_kernel",),
    others_count=True,
    gpu_only=True,
)
def _liger(inputs: Inputs) -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_fn, targets = LigerFusedLinearCrossEntropyLoss(), torch.arange(len(inputs.query))
    return with_gradient(
        inputs, lambda: loss_fn(inputs.positives_and_bank(), inputs.query / T, targets)
    )


@peer(
    "inf-cl",
    "cal_inf_loss on one GPU, the bank among its keys",
    packages=("inf_cl",),
    others_count=True,
    gpu_only=True,
)
def _inf_cl(inputs: Inputs) -> Run:
    from inf_cl import cal_inf_loss

    D = inputs.shape.sizes["D"]
    head_dim = math.gcd(D, 256)  # it splits D into heads of a power of two, 16 to 256
    if head_dim < 16:
        raise ValueError(f"Inf-CL takes D that is a multiple of 16, got {D}")
    targets = torch.arange(len(inputs.query))

    def loss() -> Tensor:
        # It computes in float32: what is scaled before that would be rounded once more.
        query = inputs.query.float() / T
        return cal_inf_loss(query, inputs.positives_and_bank(), targets, head_dim=head_dim)

    return with_gradient(inputs, loss)


@peer(
    "info-nce-pytorch",
    "InfoNCE, unpaired",
    packages=("info_nce",),
    copies=4,
    normalizes=True,
    compiles=False,
)
def _info_nce(inputs: Inputs) -> Run:
    from info_nce import InfoNCE

    loss_fn = InfoNCE(temperature=T, negative_mode="unpaired")
    return with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))


@peer(
    "pytorch-metric-learning",
    "NTXentLoss, the bank as ref_emb",
    packages=("pytorch_metric_learning", "sklearn", "scipy"),
    copies_per_query=3,
    normalizes=True,
    others_count=True,
    compiles=False,
)
def _metric_learning(inputs: Inputs) -> Run:
    from pytorch_metric_learning.losses import NTXentLoss

    loss_fn, B = NTXentLoss(temperature=T), len(inputs.query)
    labels = torch.arange(B)
    of_classes = torch.cat([labels, torch.full((len(inputs.bank),), B)])

    def loss() -> Tensor:
        classes = inputs.positives_and_bank()
        return loss_fn(inputs.query, labels, ref_emb=classes, ref_labels=of_classes)

    return with_gradient(inputs, loss)


LOG2_E = math.log2(math.e)
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]


class _LockedDocuments(torch.autograd.Function):
    """memeff's two passes over frozen documents: sum_j e^{s_ij - 1/t} forward, `gradient` backward,
    which gives sum_j w_ij d_j / (t B).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, positive: Tensor, documents: Tensor, gradient: Gradient
    ) -> Tensor:
        from memeff.distributed_lit_loss import _launch_denom

        total = query.new_zeros(len(query), dtype=torch.float32)
        _launch_denom(query, documents, total, LOG2_E / T)
        ctx.save_for_backward(query, positive, documents, total)
        ctx.gradient = gradient
        s_pos = (query.float() * positive.float()).sum(1) / T
        return (total.log() + 1 / T - s_pos).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, positive, documents, total = ctx.saved_tensors
        dquery = ctx.gradient(query, documents, total)
        dquery -= positive.float() / (T * len(query))
        return (grad * dquery).to(query.dtype), None, None, None


def _by_tiles(query: Tensor, documents: Tensor, total: Tensor) -> Tensor:
    from memeff.distributed_lit_loss import _launch_grad

    dquery = torch.zeros_like(query, dtype=torch.float32)
    _launch_grad(query, documents, total, 1 / (T * len(query)), dquery, LOG2_E / T)
    return dquery


def _by_rows(query: Tensor, documents: Tensor, total: Tensor) -> Tensor:
    from memeff.clip_loss import fa_backward_one

    scale = 1 / (T * len(query))
    return fa_backward_one(query, documents, total, None, LOG2_E / T, scale, bidir=False)


@peer(
    "memeff",
    "kernels of its distributed LiT loss, a rank's queries against all documents",
    packages=("memeff",),
    others_count=True,
    gpu_only=True,
)
def _memeff(inputs: Inputs) -> Run:
    """Its losses want as many documents as queries, its kernels do not. With the gradient that is
    faster here, of those its losses choose from by D.
    """
    from codir_fast.benchmarks.measure import fastest
    from memeff.clip_loss import fa_ok

    def prepare(gradient: Gradient, num_documents: int) -> Run:
        def loss() -> Tensor:
            documents = inputs.positives_and_bank()[:num_documents]
            return _LockedDocuments.apply(inputs.query, inputs.positive, documents, gradient)

        return with_gradient(inputs, loss)

    fits = fa_ok(inputs.shape.sizes["D"], inputs.query.device)
    gradients: list[Gradient] = [_by_tiles, _by_rows] if fits else [_by_tiles]
    runs = [prepare(gradient, SEARCH_ROWS) for gradient in gradients]
    best = fastest(runs, inputs.query.device)
    return prepare(gradients[best], len(inputs.classes))
