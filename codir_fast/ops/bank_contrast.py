"""bank_contrast: contrastive loss of B queries against all K bank rows. Loss and gradients come out
of one pass over the bank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codir_fast.backend import has_triton, resolve
from codir_fast.bank_facts import rows_of
from codir_fast.ops import registration
from codir_fast.ops.contrast import (
    Outputs,
    PreparedPair,
    objective_sums,
    objective_weights,
)
from codir_fast.ops.contrast_autograd import add_contrast_backend

# Logits, or bank elements, of one chunk: 1 MiB in float32 stays in a CPU's cache, 16 MiB keeps a
# GPU busy.
_CHUNK_LOGITS = {"cpu": 1 << 18}
_CHUNK_LOGITS_ELSEWHERE = 1 << 22
_MIN_CHUNK_ROWS = 64


def bank_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
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
    """InfoNCE per query, (B,), or NCE where log Z is given; see
    codir_fast.functional.contrastive_loss.

    Takes unit rows of query and positive itself if `normalize`; those of the bank are as they are.
    Differentiable in query, positive, bank and inv_temperature; bank_scale counts as a constant.
    Where the bank needs no gradient, the backward pass reads (B, .) tensors only, so that the bank
    may change before it.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    rows = rows_of(bank, bank_scale, inv_temperature, *masks, log_partition)
    loss_of = _FORWARD[resolve("bank_contrast", backend, query, rows)]
    vectors = (query, positive, bank, inv_temperature)
    objective = (log_partition, num_noise, num_data)
    inputs = (*vectors, bank_scale, *masks, *objective, normalize)
    return loss_of(inputs, reduction)


class _Negatives(NamedTuple):
    """What picks and scales the bank's rows."""

    bank_scale: Tensor | None
    labels: Tensor | None
    bank_labels: Tensor | None
    exclude_index: Tensor | None
    valid: Tensor | None


def _torch(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
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
    negatives = _Negatives(bank_scale, labels, bank_labels, exclude_index, valid)
    with torch.autocast(query.device.type, enabled=False):
        pair = PreparedPair(query, positive, normalize)
        query, inv_t = pair.query, inv_temperature.to(pair.query.dtype)
        sums = objective_sums(query, log_partition, num_noise / num_data)
        for part in _parts(query, bank):
            sums.add(*_chunk(query, bank, part, inv_t, negatives))
        return pair.bring_back(sums.finish(query, pair.positive, inv_t))


def _parts(query: Tensor, bank: Tensor) -> Iterator[slice]:
    budget = _CHUNK_LOGITS.get(query.device.type, _CHUNK_LOGITS_ELSEWHERE)
    size = max(_MIN_CHUNK_ROWS, budget // max(*query.shape, 1))
    return (slice(start, start + size) for start in range(0, bank.shape[0], size))


def _chunk(
    query: Tensor, bank: Tensor, part: slice, inv_t: Tensor, negatives: _Negatives
) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of a part of the bank, -inf where a row is no negative, and its scaled rows."""
    rows = _scaled(bank[part].to(query.dtype), part, negatives)
    return _mask((query @ rows.T).mul_(inv_t), part, negatives), rows


def _scaled(rows: Tensor, part: slice, negatives: _Negatives) -> Tensor:
    """These rows (of the bank, or of its gradient) times their scale; 0 where a row is not
    valid.
    """
    if negatives.bank_scale is not None:
        rows = rows * negatives.bank_scale[part, None]
    if negatives.valid is not None:  # an invalid row may hold anything, NaN included
        rows = torch.where(negatives.valid[part, None], rows, 0)
    return rows


def _mask(logits: Tensor, part: slice, negatives: _Negatives) -> Tensor:
    if negatives.valid is not None:
        logits.masked_fill_(~negatives.valid[part], -torch.inf)
    if negatives.labels is not None and negatives.bank_labels is not None:
        same = negatives.labels[:, None] == negatives.bank_labels[part]
        logits.masked_fill_(same, -torch.inf)
    if negatives.exclude_index is not None:
        row = torch.arange(part.start, part.start + logits.shape[1], device=logits.device)
        logits.masked_fill_(negatives.exclude_index[:, None] == row, -torch.inf)
    return logits


def _torch_backward(
    grad_loss: Tensor,
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
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
    negatives = _Negatives(bank_scale, labels, bank_labels, exclude_index, valid)
    dbank = torch.empty_like(bank)
    with torch.autocast(query.device.type, enabled=False):
        query = PreparedPair(query, query[:0], normalize).query
        inv_t = inv_temperature.to(query.dtype)
        weighted_query = grad_loss[:, None] * query * inv_t
        for part in _parts(query, bank):
            logits, _ = _chunk(query, bank, part, inv_t, negatives)
            weights = objective_weights(logits, lse, log_partition)
            grads = weights.T @ weighted_query
            dbank[part] = _scaled(grads, part, negatives)
    return dbank


def _triton(*inputs: Any) -> Outputs:
    from codir_fast.kernels import bank_contrast as kernel  # Triton is loaded on first use

    return kernel.bank_contrast(*inputs)


def _triton_backward(*inputs: Any) -> Tensor:
    from codir_fast.kernels import bank_contrast_backward as kernel

    return kernel.bank_contrast_backward(*inputs)


def _cuda_backward(*inputs: Any) -> Tensor:
    """Triton's kernel, or PyTorch's operators where Triton is not installed."""
    return _triton_backward(*inputs) if has_triton() else _torch_backward(*inputs)


for _name, _forward, _backward in (
    ("torch", _torch, _torch_backward),
    ("triton", _triton, _triton_backward),
):
    registration.add_python_backend("bank_contrast", _name, _forward)
    registration.add_python_backend("bank_contrast_backward", _name, _backward)
# "cuda" has no kernel of its own for the gradient to the bank.
registration.implement("bank_contrast_backward", "CUDA", _cuda_backward)
_FORWARD = {
    name: add_contrast_backend("bank_contrast", name) for name in ("cpu", "torch", "triton")
}
_FORWARD["cuda"] = _FORWARD["cpu"]  # one operator, dispatched by device
