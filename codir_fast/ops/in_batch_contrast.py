"""in_batch_contrast: InfoNCE of B queries whose negatives are one another's positive keys, one way
or both. Both ways, and both gradients, share each product. The C++ kernels of the CPU alone have
it; see codir_fast.backend.fuses_in_batch.
"""

from typing import Any

import torch
from torch import Tensor

from codir_fast.ops import registration
from codir_fast.ops.contrast import compute_dtype
from codir_fast.ops.loss_autograd import add_loss

_run = registration.overload("in_batch_contrast")
_backward = registration.overload("in_batch_contrast_backward")


def in_batch_contrast(
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor,
    labels: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    *,
    reduction: str = "none",
) -> Tensor:
    """Loss of each query i against the positives of the others, (B,), or of their mean or sum; see
    codir_fast.functional.contrastive_loss.

    If `symmetric`, the mean with the loss of positive i against the other queries. Left out: what
    has the same label. Takes unit rows of both if `normalize`. Differentiable in query, positive
    and inv_temperature; the backward pass reads query and positive again.
    """
    return _loss_of((query, positive, inv_temperature, labels, symmetric, normalize), reduction)


def _save(
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


def _differentiate(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 3
    *vectors, lse, labels = ctx.saved_tensors
    of_each = grad_loss.expand(vectors[0].shape[0]).contiguous()
    options = (labels, ctx.symmetric, ctx.normalize)
    grads = _backward(of_each, *vectors, lse, *options)
    wanted = [
        grad.to(dtype=vector.dtype, device=vector.device) if needed else None
        for grad, vector, needed in zip(grads, vectors, ctx.needs, strict=True)
    ]
    return registration.first_derivative_only("in_batch_contrast", wanted, (*vectors, grad_loss))


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


registration.register_fake(_run, _fake)
registration.register_fake(_backward, _fake_backward)
_loss_of = add_loss(_run, 3, _save, _differentiate)
