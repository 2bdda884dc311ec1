"""The autograd and fake parts of every backend of bank_contrast and indexed_contrast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codir_fast.ops import registration
from codir_fast.ops.contrast import Outputs, compute_dtype, wide
from codir_fast.ops.loss_autograd import add_loss


def add_contrast_backend(op: str, backend: str) -> Callable[[tuple[Any, ...], str], Tensor]:
    """Fake and autograd implementations of one backend of `op` and of `op`_backward; gives the loss
    as a function of all arguments of `op`, and of its reduction.

    Both take (query, positive or not, bank, inv_temperature, ...): whatever follows goes from one
    to the other as it is and gets no gradient.
    """
    run = registration.overload(op, backend)
    backward = registration.overload(f"{op}_backward", backend)

    def save(
        ctx: Any,
        vectors: tuple[Tensor, ...],
        rest: tuple[Any, ...],
        output: Outputs,
        needs: tuple[bool, ...],
    ) -> None:
        query, positive, bank, inv_temperature = vectors
        *picks, num_noise, num_data, normalize = rest
        for pick in picks:
            if pick is not None and pick.requires_grad:
                raise RuntimeError(
                    f"codir_fast: {op} has no gradient for `bank_scale` and `log_partition`"
                )
        _, lse, dquery, dpositive, dinv_temperature = output
        ctx.set_materialize_grads(False)
        ctx.options = (num_noise, num_data, normalize)
        ctx.dtypes = query.dtype, positive.dtype
        # First what a second derivative would depend on, to refuse it. (B, .) tensors only, unless
        # the bank needs a gradient: else it may change before backward.
        given = vectors
        if not registration.under_functorch():
            given = tuple(x for x, needed in zip(vectors, needs, strict=False) if needed)
        ctx.num_given = len(given)
        ctx.save_for_backward(
            *given,
            dquery if needs[0] else None,
            dpositive if needs[1] else None,
            dinv_temperature if needs[3] else None,
            *(map(_savable, (query, bank, inv_temperature, lse, *picks)) if needs[2] else ()),
        )
        ctx.inv_temperature_like = inv_temperature.dtype, inv_temperature.device

    def differentiate(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        """`grad_loss`: (B,), or of each query's loss alike, 0-d."""
        if grad_loss is None:
            return (None,) * 4
        saved = ctx.saved_tensors  # once: checkpointing refuses more
        dquery, dpositive, dinv_temperature, *for_bank = saved[ctx.num_given :]
        dtype, device = ctx.inv_temperature_like
        dbank = None
        if for_bank:
            of_each = grad_loss.expand(for_bank[0].shape[0]).contiguous()
            dbank = backward(of_each, *for_bank, *ctx.options)
        factor = grad_loss[:, None] if grad_loss.ndim else grad_loss
        dquery, dpositive = _chained(factor, (dquery, dpositive), ctx.dtypes)
        grads = (
            dquery,
            dpositive,
            dbank,
            None
            if dinv_temperature is None
            else (grad_loss * dinv_temperature).sum().to(dtype=dtype, device=device),
        )
        given = (*saved[: ctx.num_given], grad_loss)
        return registration.first_derivative_only(op, grads, given)

    registration.register_fake(run, _fake)
    registration.register_fake(backward, _fake_backward)
    return add_loss(run, 4, save, differentiate)


def _savable(tensor: Tensor | None) -> Tensor | None:
    """Inference tensors can't be saved for backward, their copies can."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _chained(
    factor: Tensor, gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype, ...]
) -> list[Tensor | None]:
    """Gradients (B, D) of each query's loss, times what comes in, in the dtypes of the inputs."""
    in_one_launch = not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or registration.under_functorch()
    )
    products: list[Tensor | None] = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is None:
            products.append(None)
        elif in_one_launch and dtype != gradient.dtype:
            out = torch.empty_like(gradient, dtype=dtype)
            products.append(torch.mul(factor, gradient, out=out))
        else:
            products.append((factor * gradient).to(dtype))
    return products


def _fake(query: Tensor, *_: Any, **__: Any) -> Outputs:
    B, D = query.shape
    like = query.new_empty(0, dtype=compute_dtype(query.dtype))
    loss, dinv_temperature = like.new_empty(B), like.new_empty(B)
    lse = wide(like.new_empty(B))
    return loss, lse, like.new_empty(B, D), like.new_empty(B, D), dinv_temperature


def _fake_backward(grad_loss: Tensor, query: Tensor, bank: Tensor, *_: Any, **__: Any) -> Tensor:
    return bank.new_empty(bank.shape)
