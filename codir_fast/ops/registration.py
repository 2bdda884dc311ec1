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
from torch.utils._pytree import tree_leaves

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


def add_operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `codir_fast::<schema>` in Python, for whatever tensors it is called with."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    register_fake(overload(name), fake)


def implement(op: str, device_type: str, implementation: Callable[..., Any]) -> None:
    """Gives `codir_fast::<op>` an implementation in Python for tensors of "CPU" or "CUDA"."""
    _LIBRARY.impl(op, implementation, device_type)


def register_fake(op: OpOverload, fake: Callable[..., Any]) -> None:
    """`fake` gives the outputs' shapes; it also answers where one of the inputs is on meta, so the
    others must be there too.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # A scalar may stay on the CPU.
        devices = {str(t.device) for t in tensors if t.ndim > 0 or t.device.type != "cpu"}
        if len(devices) > 1:
            raise RuntimeError(
                f"{op.name()} needs all tensors on one device, got {' and '.join(sorted(devices))}"
            )
        return fake(*args, **kwargs)

    torch.library.register_fake(op, checked, lib=_LIBRARY)


def register_autograd(
    op: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)


def under_functorch() -> bool:
    """Whether one of functorch's transforms (torch.func) is being applied."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_transformed(tensor: Tensor) -> bool:
    """Whether one of functorch's transforms is being applied to this tensor."""
    return under_functorch() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def refuse_forward_mode(name: str) -> Any:
    """The jvp of an autograd.Function that has none, said in our words."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{name} has no forward-mode derivative")

    return staticmethod(jvp)


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
    """Identity on the first `count` tensors, which are gradients; differentiating them raises, in
    any of the tensors.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"codir_fast: {ctx.op} has no second derivative")


def first_derivative_only(
    op: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients that a backward returns, made to raise when they are differentiated in turn.

    They are told that they depend on the `inputs`, of the operator and of its backward: torch's
    once_differentiable lets the case pass where the incoming gradient needs none itself.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    present = [grad for grad in grads if grad is not None]
    marked = iter(_Once.apply(op, len(present), *present, *inputs)) if present else iter(())
    return tuple(None if grad is None else next(marked) for grad in grads)
