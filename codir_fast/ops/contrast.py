"""What bank_contrast and indexed_contrast share: the end of a query, fake and autograd parts."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from codir_fast.ops import registration

# loss, lse, dquery, dpositive, dinv_temperature
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class RunningSums:
    """Running sums over the allowed rows: maximum m (B,) of the logits s, total (B,) of e^{s - m},
    and rows (B, D), the sum of e^{s - m} b_j.
    """

    def __init__(self, query: Tensor) -> None:
        self.maximum = query.new_full(query.shape[:1], -torch.inf)
        self.total, self._lost = torch.zeros_like(self.maximum), torch.zeros_like(self.maximum)
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, chunk: Tensor) -> None:
        """Adds rows `chunk`, (C, D) or per query (B, C, D); overwrites their `logits` (B, C)."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        shift = maximum.masked_fill(maximum == -torch.inf, 0)  # no allowed row yet
        rescale = (self.maximum - shift).exp()
        weights = logits.sub_(shift[:, None]).exp_()
        self.rows.mul_(rescale[:, None])
        if chunk.ndim == 2:
            self.rows.addmm_(weights, chunk)
        else:
            self.rows.add_(torch.einsum("bm,bmd->bd", weights, chunk))
        self.maximum = maximum
        # Compensated (Kahan): thousands of chunks would otherwise wear off the last digits.
        total, lost = self.total * rescale, self._lost * rescale
        increment = weights.sum(1) - lost
        self.total = total + increment
        self._lost = (self.total - total) - increment


def combine(query: Tensor, positive: Tensor, inv_t: Tensor, sums: RunningSums) -> Outputs:
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


def add_contrast_backend(op: str, backend: str) -> OpOverload:
    """Fake and autograd implementations of one backend of `op` and of `op`_backward; gives `op`.

    Both take (query, positive or not, bank, inv_temperature, ...): whatever follows goes from one
    to the other as it is and gets no gradient.
    """
    forward = registration.overload(op, backend)
    backward = registration.overload(f"{op}_backward", backend)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        query, _, bank, inv_temperature, *picks = inputs
        if any(pick is not None and pick.requires_grad for pick in picks):
            raise RuntimeError(f"codir_fast: {op} has no gradient for `bank_scale`")
        _, lse, dquery, dpositive, dinv_temperature = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, dquery, dpositive, dinv_temperature)
        needs = ctx.needs_input_grad
        ctx.num_picks = len(picks)
        ctx.inv_temperature_like = (inv_temperature.dtype, inv_temperature.device)
        # (B, .) tensors only, unless the bank needs a gradient: else it may change before backward.
        ctx.save_for_backward(
            dquery if needs[0] else None,
            dpositive if needs[1] else None,
            dinv_temperature if needs[3] else None,
            *((query, bank, inv_temperature, lse, *picks) if needs[2] else ()),
        )

    def differentiate(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * (4 + ctx.num_picks)
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
        return (*registration.first_derivative_only(op, grads), *(None,) * ctx.num_picks)

    registration.register_fake(forward, _fake)
    registration.register_fake(backward, _fake_backward)
    registration.register_autograd(forward, setup_context, differentiate)
    return forward


def _fake(query: Tensor, *_: Any, **__: Any) -> Outputs:
    B, D = query.shape
    loss, lse, dinv_temperature = (query.new_empty(B) for _ in range(3))
    return loss, lse, query.new_empty(B, D), query.new_empty(B, D), dinv_temperature


def _fake_backward(grad_loss: Tensor, query: Tensor, bank: Tensor, *_: Any, **__: Any) -> Tensor:
    return bank.new_empty(bank.shape)
