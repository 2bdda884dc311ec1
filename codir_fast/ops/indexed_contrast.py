"""indexed_contrast: contrastive loss of B queries, each against its own M bank rows, named by
index.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.bank_facts import rows_of
from codir_fast.ops import registration
from codir_fast.ops.contrast import (
    Outputs,
    PreparedPair,
    objective_sums,
    objective_weights,
)
from codir_fast.ops.contrast_autograd import add_contrast_backend

# Elements of the rows that one chunk gathers.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24


def indexed_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    index: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
    normalize: bool = False,
    *,
    backend: str,
    reduction: str = "none",
) -> Tensor:
    """InfoNCE, or NCE where log Z is given, per query, (B,), against the rows index[i] of the bank,
    (B, M) int64.

    A row named twice counts twice; one that the masks leave out does not count. Differentiable in
    query, positive, bank and inv_temperature; `normalize` as in bank_contrast.
    """
    loss_of = _FORWARD[
        resolve("indexed_contrast", backend, query, rows_of(bank, bank_scale, inv_temperature))
    ]
    masks = (labels, bank_labels, exclude_index, valid)
    vectors = (query, positive, bank, inv_temperature)
    objective = (log_partition, num_noise, num_data)
    inputs = (*vectors, index, bank_scale, *masks, *objective, normalize)
    return loss_of(inputs, reduction)


def _torch(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    index: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
    normalize: bool = False,
) -> Outputs:
    picks = (bank_scale, labels, bank_labels, exclude_index, valid)
    with torch.autocast(query.device.type, enabled=False):
        pair = PreparedPair(query, positive, normalize)
        query, inv_t = pair.query, inv_temperature.to(pair.query.dtype)
        sums = objective_sums(query, log_partition, num_noise / num_data)
        for logits, rows, _ in _chunks(query, bank, inv_t, index, *picks):
            sums.add(logits, rows)
        return pair.bring_back(sums.finish(query, pair.positive, inv_t))


def _torch_backward(
    grad_loss: Tensor,
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
    index: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
    normalize: bool = False,
) -> Tensor:
    picks = (bank_scale, labels, bank_labels, exclude_index, valid)
    with torch.autocast(query.device.type, enabled=False):
        query = PreparedPair(query, query[:0], normalize).query
        inv_t = inv_temperature.to(query.dtype)
        dbank = torch.zeros_like(bank, dtype=query.dtype)
        weighted_query = grad_loss[:, None] * query * inv_t
        for logits, _, part in _chunks(query, bank, inv_t, index, *picks):
            weights = objective_weights(logits, lse, log_partition)
            chosen = index[:, part]
            if bank_scale is not None:
                weights = weights * bank_scale[chosen]
            grads = weights[:, :, None] * weighted_query[:, None]
            dbank.index_add_(0, chosen.flatten(), grads.flatten(0, 1))
    return dbank.to(bank.dtype)


def _chunks(
    query: Tensor,
    bank: Tensor,
    inv_t: Tensor,
    index: Tensor,
    bank_scale: Tensor | None,
    labels: Tensor | None,
    bank_labels: Tensor | None,
    exclude_index: Tensor | None,
    valid: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Positions in chunks: logits (B, C), -inf where one does not count, rows (B, C, D), place."""
    budget = _CHUNK_ELEMENTS.get(query.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    size = max(1, budget // max(query.numel(), 1))
    for start in range(0, index.shape[1], size):
        part = slice(start, start + size)
        chosen = index[:, part]
        out = torch.zeros_like(chosen, dtype=torch.bool)
        if valid is not None:
            out |= ~valid[chosen]
        if labels is not None and bank_labels is not None:
            out |= labels[:, None] == bank_labels[chosen]
        if exclude_index is not None:
            out |= exclude_index[:, None] == chosen
        rows = bank[chosen].to(query.dtype)
        if bank_scale is not None:
            rows = rows * bank_scale[chosen][:, :, None]
        rows = rows.masked_fill_(out[:, :, None], 0)  # may hold anything, NaN included
        logits = torch.einsum("bd,bmd->bm", query, rows).mul_(inv_t)
        yield logits.masked_fill_(out, -torch.inf), rows, part


def _triton(*inputs: Any) -> Outputs:
    from codir_fast.kernels import indexed_contrast as kernel  # Triton is loaded on first use

    return kernel.indexed_contrast(*inputs)


def _triton_backward(*inputs: Any) -> Tensor:
    from codir_fast.kernels import indexed_contrast_backward as kernel

    return kernel.indexed_contrast_backward(*inputs)


for _name, _forward, _backward in (
    ("torch", _torch, _torch_backward),
    ("triton", _triton, _triton_backward),
):
    registration.add_python_backend("indexed_contrast", _name, _forward)
    registration.add_python_backend("indexed_contrast_backward", _name, _backward)
_FORWARD = {
    name: add_contrast_backend("indexed_contrast", name) for name in ("cpu", "torch", "triton")
}
