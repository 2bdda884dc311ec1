"""How an operator's backends reach PyTorch.

The C++ operator `codir_fast::<op>` is the one schema. A backend written in Python becomes
`codir_fast::<op>_<backend>` with that schema, and every backend of an op gets the same fake and
autograd implementations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("codir_fast", "FRAGMENT")


def overload(op: str, backend: str = "cpu") -> OpOverload:
    """The torch operator behind a backend's name; "cpu" and "cuda" are one operator, dispatched by
    device.
    """
    name = op if backend in ("cpu", "cuda") else f"{op}_{backend}"
    return getattr(torch.ops.codir_fast, name).default


def add_python_backend(op: str, backend: str, implementation: Callable[..., Any]) -> OpOverload:
    """Defines `codir_fast::<op>_<backend>` with the schema of `codir_fast::<op>`."""
    schema = str(overload(op)._schema).removeprefix(f"codir_fast::{op}")
    _LIBRARY.define(f"{op}_{backend}{schema}")
    _LIBRARY.impl(f"{op}_{backend}", implementation, "CompositeExplicitAutograd")
    return overload(op, backend)


def register_fake(op: OpOverload, fake: Callable[..., Any]) -> None:
    torch.library.register_fake(op, fake, lib=_LIBRARY)


def register_autograd(
    op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)


def register_mutation(op: OpOverload, arguments: Sequence[int]) -> None:
    """Makes writing to the tensors at these positions count as an in-place change for autograd."""

    def implementation(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for position in arguments:
            if position < len(args) and args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(op, implementation, "ADInplaceOrView", with_keyset=True)


class _Once(torch.autograd.Function):
    """Identity on gradients; differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, op: str, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"codir_fast: {ctx.op} has no second derivative")


def first_derivative_only(op: str, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that a backward returns, made to raise when they are differentiated in turn.

    Torch's once_differentiable lets the case pass where the incoming gradient needs none itself.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    present = [grad.detach().requires_grad_() for grad in grads if grad is not None]
    marked = iter(_Once.apply(op, *present)) if present else iter(())
    return tuple(None if grad is None else next(marked) for grad in grads)
