"""How a contrastive operator that gives losses (B,) reaches autograd: the same steps for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from codir_fast.ops import registration

Save = Callable[[Any, tuple[Tensor, ...], tuple[Any, ...], Any, tuple[bool, ...]], None]
Differentiate = Callable[[Any, Tensor | None], tuple[Tensor | None, ...]]


def add_loss(
    run: OpOverload, num_vectors: int, save: Save, differentiate: Differentiate
) -> Callable[[tuple[Any, ...], str], Tensor]:
    """Makes `run` differentiable in its first `num_vectors` arguments, the queries (B, D) first;
    gives its loss as a function of all its arguments, and of the reduction.

    `save(ctx, vectors, rest, outputs, needs)` keeps what the backward pass will want, and
    `differentiate(ctx, grad_loss)` gives the gradients of the vectors for one of the losses (B,),
    of each query's loss alike (0-d), or of nothing (None).
    """

    # What torch.library registers costs 60 us a call and is passed by under functorch's transforms
    # (torch.func.grad and its kin); an autograd.Function is not. torch.compile wants the operator.
    class Eager(torch.autograd.Function):
        """The reduced loss, so that autograd has one step where it would have two."""

        @staticmethod
        def forward(ctx: Any, rest: tuple[Any, ...], reduction: str, *vectors: Tensor) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*vectors, *rest)
            save(ctx, vectors, rest, output, ctx.needs_input_grad[2:])
            B = vectors[0].shape[0]  # len() would be no symbol
            ctx.divisor = B if reduction == "mean" else 1
            return reduced(output[0], reduction)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            if grad is not None and ctx.divisor != 1:
                grad = grad / ctx.divisor
            return None, None, *differentiate(ctx, grad)

        jvp = registration.refuse_forward_mode(run.name())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.num_rest = len(inputs) - num_vectors
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs[:num_vectors], inputs[num_vectors:], output, ctx.needs_input_grad)

    def differentiate_op(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
        return *differentiate(ctx, grad_loss), *(None,) * ctx.num_rest

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate_op(ctx, *grads)

        jvp = registration.refuse_forward_mode(run.name())

    registration.register_autograd(run, setup_context, differentiate_op)

    def loss_of(inputs: tuple[Any, ...], reduction: str) -> Tensor:
        if torch.compiler.is_compiling():
            return reduced(run(*inputs)[0], reduction)
        if registration.under_functorch():
            return reduced(Transformed.apply(*inputs)[0], reduction)
        return Eager.apply(inputs[num_vectors:], reduction, *inputs[:num_vectors])

    return loss_of


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Losses (B,) as they are ("none"), their "mean" or their "sum"."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
