"""bank_contrast: InfoNCE of B queries against all K bank rows. Loss and gradients come out of one
pass over the bank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.ops import registration

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

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
    *,
    backend: str,
) -> Tensor:
    """InfoNCE per query, (B,); see codir_fast.functional.contrastive_loss.

    Differentiable in query, positive, bank and inv_temperature; bank_scale counts as a constant.
    Where the bank needs no gradient, the backward pass reads (B, .) tensors only, so that the bank
    may change before it.
    """
    op = _FORWARD[resolve("bank_contrast", backend, query.device)]
    masks = (labels, bank_labels, exclude_index, valid)
    return op(query, positive, bank, inv_temperature, bank_scale, *masks)[0]


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
) -> Outputs:
    negatives = _Negatives(bank_scale, labels, bank_labels, exclude_index, valid)
    inv_t = inv_temperature.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        sums = _Sums(query)
        for part in _parts(query, bank):
            sums.add(*_chunk(query, bank, part, inv_t, negatives))
        return _combine(query, positive, inv_t, sums)


class _Sums:
    """Running sums over the allowed rows: maximum m (B,) of the logits s, total (B,) of e^{s - m},
    and rows (B, D), the sum of e^{s - m} b_j.
    """

    def __init__(self, query: Tensor) -> None:
        self.maximum = query.new_full(query.shape[:1], -torch.inf)
        self.total, self._lost = torch.zeros_like(self.maximum), torch.zeros_like(self.maximum)
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, chunk: Tensor) -> None:
        """Adds bank rows `chunk` (C, D) with `logits` (B, C), which are overwritten."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        shift = maximum.masked_fill(maximum == -torch.inf, 0)  # no allowed row yet
        rescale = (self.maximum - shift).exp()
        weights = logits.sub_(shift[:, None]).exp_()
        self.rows.mul_(rescale[:, None]).addmm_(weights, chunk)
        self.maximum = maximum
        # Compensated (Kahan): thousands of chunks would otherwise wear off the last digits.
        total, lost = self.total * rescale, self._lost * rescale
        increment = weights.sum(1) - lost
        self.total = total + increment
        self._lost = (self.total - total) - increment


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


def _combine(query: Tensor, positive: Tensor, inv_t: Tensor, sums: _Sums) -> Outputs:
    positive_logit = (query * positive).sum(1) * inv_t
    # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+ is
    # subtracted twice.
    gap = (sums.maximum - positive_logit) + sums.total.log()
    loss = torch.logaddexp(gap, torch.zeros_like(gap))
    negative_weight = gap.sigmoid()
    mean_negative = sums.rows / sums.total.masked_fill(sums.total == 0, 1)[:, None]
    direction = negative_weight[:, None] * (mean_negative - positive)  # d loss / d (query / t)
    dpositive = -negative_weight[:, None] * query * inv_t
    return (
        loss,
        positive_logit + loss,
        direction * inv_t,
        dpositive,
        (query * direction).sum(1),
    )


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
) -> Tensor:
    negatives = _Negatives(bank_scale, labels, bank_labels, exclude_index, valid)
    inv_t = inv_temperature.to(query.dtype)
    dbank = torch.empty_like(bank)
    weighted_query = grad_loss[:, None] * query * inv_t
    with torch.autocast(query.device.type, enabled=False):
        for part in _parts(query, bank):
            weights = _chunk(query, bank, part, inv_t, negatives)[0].sub_(lse[:, None]).exp_()
            grads = weights.T @ weighted_query
            dbank[part] = _scaled(grads, part, negatives)
    return dbank


def _fake(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
) -> Outputs:
    B, D = query.shape
    loss, lse, dinv_temperature = (query.new_empty(B) for _ in range(3))
    return loss, lse, query.new_empty(B, D), query.new_empty(B, D), dinv_temperature


def _fake_backward(
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
) -> Tensor:
    return bank.new_empty(bank.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, _, bank, inv_temperature, bank_scale, *_ = inputs
    if bank_scale is not None and bank_scale.requires_grad:
        raise RuntimeError("codir_fast: bank_contrast has no gradient for `bank_scale`")
    _, lse, dquery, dpositive, dinv_temperature = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, dquery, dpositive, dinv_temperature)
    needs = ctx.needs_input_grad
    ctx.inv_temperature_like = (inv_temperature.dtype, inv_temperature.device)
    ctx.save_for_backward(
        dquery if needs[0] else None,
        dpositive if needs[1] else None,
        dinv_temperature if needs[3] else None,
        *((query, bank, inv_temperature, lse, *inputs[4:]) if needs[2] else ()),
    )


def _add(backend: str) -> None:
    """Fake and autograd implementations of one backend's pair of operators."""
    forward = registration.overload("bank_contrast", backend)
    backward = registration.overload("bank_contrast_backward", backend)

    def differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        dquery, dpositive, dinv_temperature, *for_bank = ctx.saved_tensors
        dtype, device = ctx.inv_temperature_like
        grads = (
            None if dquery is None else grad_loss[:, None] * dquery,
            None if dpositive is None else grad_loss[:, None] * dpositive,
            backward(grad_loss.contiguous(), *for_bank) if for_bank else None,
            None
            if dinv_temperature is None
            else (grad_loss * dinv_temperature).sum().to(dtype=dtype, device=device),
        )
        return (*registration.first_derivative_only("bank_contrast", grads), *(None,) * 5)

    registration.register_fake(forward, _fake)
    registration.register_fake(backward, _fake_backward)
    registration.register_autograd(forward, _setup_context, differentiate)
    _FORWARD[backend] = forward


_FORWARD: dict[str, Any] = {}
registration.add_python_backend("bank_contrast", "torch", _torch)
registration.add_python_backend("bank_contrast_backward", "torch", _torch_backward)
for _name in ("cpu", "torch"):
    _add(_name)
