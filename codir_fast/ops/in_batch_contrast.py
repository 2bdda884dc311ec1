"""in_batch_contrast: InfoNCE of B queries whose negatives are one another's positive keys, one way
or both, normalisation included; see codir_fast.backend.in_batch_backend for who has it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codir_fast.ops import registration
from codir_fast.ops.contrast import compute_dtype
from codir_fast.ops.loss_autograd import add_loss


def in_batch_contrast(
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor,
    labels: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    *,
    backend: str,
    reduction: str = "none",
) -> Tensor:
    """Loss of each query i against the positives of the others, (B,), or of their mean or sum; see
    codir_fast.functional.contrastive_loss.

    If `symmetric`, the mean with the loss of positive i against the other queries. Left out: what
    has the same label. Takes unit rows of both if `normalize`. Differentiable in query, positive
    and inv_temperature; the backward pass reads query and positive again.
    """
    inputs = (query, positive, inv_temperature, labels, symmetric, normalize)
    return _LOSS_OF[backend](inputs, reduction)


def _add_backend(backend: str) -> Callable[[tuple[Any, ...], str], Tensor]:
    """Fake and autograd implementations of one backend; gives the loss as a function of all
    arguments of the operator, and of its reduction.
    """
    run = registration.overload("in_batch_contrast", backend)
    backward = registration.overload("in_batch_contrast_backward", backend)

    def save(
        ctx: Any,
        vectors: tuple[Tensor, ...],
        rest: tuple[Any, ...],
        output: tuple[Tensor, Tensor],
        needs: tuple[bool, ...],
    ) -> None:
        labels, ctx.symmetric, ctx.normalize = rest
        ctx.set_materialize_grads(False)
        ctx.needs = needs[:3]
        # What a teacher made under inference_mode can't be saved; its copy can.
        vectors = tuple(x.clone() if x.is_inference() else x for x in vectors)
        labels = labels.clone() if labels is not None and labels.is_inference() else labels
        ctx.save_for_backward(*vectors, output[1], labels)

    def differentiate(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 3
        *vectors, lse, labels = ctx.saved_tensors
        of_each = grad_loss.expand(vectors[0].shape[0])
        *grads, dinv_temperature = backward(
            of_each, *vectors, lse, labels, ctx.symmetric, ctx.normalize
        )
        if ctx.needs[2]:
            dinv_temperature = dinv_temperature.sum()
        wanted = [
            grad.to(dtype=vector.dtype, device=vector.device) if needed else None
            for grad, vector, needed in zip(
                (*grads, dinv_temperature), vectors, ctx.needs, strict=True
            )
        ]
        given = (*vectors, grad_loss)
        return registration.first_derivative_only("in_batch_contrast", wanted, given)

    registration.register_fake(run, _fake)
    registration.register_fake(backward, _fake_backward if backend == "cpu" else _fake_triton)
    return add_loss(run, 3, save, differentiate)


def _fake(
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor,
    labels: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    B = query.shape[0]
    loss = query.new_empty(B, dtype=compute_dtype(query.dtype))
    return loss, query.new_empty(2 if symmetric else 1, B, dtype=torch.float64)


def _fake_backward(
    grad_loss: Tensor, query: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    like = query.new_empty(query.shape, dtype=compute_dtype(query.dtype))
    return like, torch.empty_like(like), like.new_empty(())


def _fake_triton(
    grad_loss: Tensor, query: Tensor, positive: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Whose gradients come in the dtypes of their inputs, that of 1/t a query at a time: each would
    be a launch more.
    """
    of_each = query.new_empty(query.shape[:1], dtype=torch.float32)
    return query.new_empty(query.shape), positive.new_empty(positive.shape), of_each


def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from codir_fast.kernels import in_batch_contrast as kernel  # Triton is loaded on first use

    return kernel.in_batch_contrast(*inputs)


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from codir_fast.kernels import in_batch_contrast as kernel

    return kernel.in_batch_contrast_backward(*inputs)


registration.add_python_backend("in_batch_contrast", "triton", _triton)
registration.add_python_backend("in_batch_contrast_backward", "triton", _triton_backward)
_LOSS_OF = {name: _add_backend(name) for name in ("cpu", "triton")}
