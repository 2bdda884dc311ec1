"""Peers of bank_contrast from other packages; none is required, what is missing is reported so.

Where a package takes one matrix of classes, these are the positives and then the bank's rows: the
other queries' positives are negatives there too.
"""

import torch
from codir_fast.benchmarks.peers.inputs import Inputs, T
from codir_fast.benchmarks.peers.peer import Peer, Run, adder, with_gradient
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


@peer("info-nce-pytorch", "InfoNCE, unpaired", packages=("info_nce",), copies=4, normalizes=True)
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
