"""masked_pool: pooling of all chosen layers over the real tokens, in one pass over each hidden
state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.ops import registration
from codir_fast.ops.contrast import compute_dtype

MODES = ("mean", "max", "first", "last")


def masked_pool(
    hidden_states: Sequence[Tensor], attention_mask: Tensor | None, mode: str, backend: str
) -> Tensor:
    """Pooled (B, L*H) of L layers (B, T, H); see codir_fast.pool_hidden_states. Differentiable in
    the layers.
    """
    name = resolve("masked_pool", backend, hidden_states[0])
    pooled, _ = _FORWARD[name](list(hidden_states), attention_mask, mode)
    return pooled


def _torch(
    hidden_states: list[Tensor], attention_mask: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    real = _real_tokens(hidden_states[0], attention_mask)
    if mode == "max":
        values, argmax = zip(*(_max(layer, real) for layer in hidden_states), strict=True)
        return torch.cat(values, dim=1), torch.cat(argmax, dim=1)
    chosen = _chosen_tokens(real, mode)
    means = [_mean(layer, chosen) for layer in hidden_states]
    return torch.cat(means, dim=1), real.new_empty(0, dtype=torch.int64)


def _mean(layer: Tensor, chosen: Tensor) -> Tensor:
    # What lies in a token that is not chosen, NaN included, doesn't count.
    wide = layer.to(compute_dtype(layer.dtype))
    total = torch.where(chosen[:, :, None], wide, 0).sum(1)
    return (total / chosen.sum(1, keepdim=True).clamp_min(1)).to(layer.dtype)


def _max(layer: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    B, num_tokens, H = layer.shape
    if num_tokens == 0:
        return layer.new_zeros(B, H), real.new_full((B, H), -1, dtype=torch.int64)
    has_real = real.any(1, keepdim=True)
    value = layer.masked_fill(~real[:, :, None], -torch.inf).amax(1, keepdim=True)
    # The maximum is NaN where a real token is: then the first NaN is the one.
    is_max = ((layer == value) | (layer.isnan() & value.isnan())) & real[:, :, None]
    argmax = is_max.to(torch.uint8).argmax(1).masked_fill(~has_real, -1)
    return value[:, 0].masked_fill(~has_real, 0), argmax


def _torch_backward(
    grad: Tensor,
    attention_mask: Tensor | None,
    argmax: Tensor,
    num_layers: int,
    num_tokens: int,
    mode: str,
) -> list[Tensor]:
    B, H = grad.shape[0], grad.shape[1] // num_layers
    by_layer = grad.reshape(B, num_layers, H).unbind(1)
    if mode == "max":
        tokens = argmax.reshape(B, num_layers, 1, H).unbind(1)
        return [_scatter(*pair, num_tokens) for pair in zip(by_layer, tokens, strict=True)]
    if attention_mask is None:
        attention_mask = grad.new_ones(B, num_tokens, dtype=torch.bool)
    chosen = _chosen_tokens(attention_mask != 0, mode)
    count, dtype = chosen.sum(1, keepdim=True).clamp_min(1), compute_dtype(grad.dtype)
    shares = [(layer.to(dtype) / count).to(grad.dtype) for layer in by_layer]
    return [torch.where(chosen[:, :, None], share[:, None], 0) for share in shares]


def _scatter(grad: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """grad (B, H) to the tokens (B, 1, H), -1 for none, of (B, num_tokens, H)."""
    dhidden = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[1])
    if num_tokens == 0:
        return dhidden
    values = grad[:, None].masked_fill(tokens < 0, 0)
    return dhidden.scatter_(1, tokens.clamp_min(0), values)


def _real_tokens(layer: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(layer.shape[:2], dtype=torch.bool, device=layer.device)
    return attention_mask != 0


def _chosen_tokens(real: Tensor, mode: str) -> Tensor:
    """The tokens whose mean is the pooled row: all real ones, or the first or last of them; bool
    (B, T).
    """
    if mode == "mean":
        return real
    position = real.cumsum(1)
    return real & (position == (1 if mode == "first" else real.sum(1, keepdim=True)))


def _triton(
    hidden_states: list[Tensor], attention_mask: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    from codir_fast.kernels import masked_pool as kernel  # Triton is loaded on first use

    return kernel.masked_pool(hidden_states, attention_mask, mode)


def _triton_backward(
    grad: Tensor,
    attention_mask: Tensor | None,
    argmax: Tensor,
    num_layers: int,
    num_tokens: int,
    mode: str,
) -> list[Tensor]:
    from codir_fast.kernels import masked_pool_backward as kernel

    return kernel.masked_pool_backward(grad, attention_mask, argmax, num_layers, num_tokens, mode)


def _fake(
    hidden_states: list[Tensor], attention_mask: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    B, _, H = hidden_states[0].shape
    shape = (B, len(hidden_states) * H)
    argmax_shape = shape if mode == "max" else (0,)
    first = hidden_states[0]
    return first.new_empty(shape), first.new_empty(argmax_shape, dtype=torch.int64)


def _fake_backward(
    grad: Tensor,
    attention_mask: Tensor | None,
    argmax: Tensor,
    num_layers: int,
    num_tokens: int,
    mode: str,
) -> list[Tensor]:
    shape = (grad.shape[0], num_tokens, grad.shape[1] // num_layers)
    return [grad.new_empty(shape) for _ in range(num_layers)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_states, attention_mask, mode = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    if attention_mask is not None and attention_mask.is_inference():
        attention_mask = attention_mask.clone()  # which can be saved
    ctx.save_for_backward(attention_mask, output[1])
    ctx.num_layers, ctx.num_tokens = len(hidden_states), hidden_states[0].shape[1]
    ctx.mode = mode


def _add(backend: str) -> None:
    """Fake and autograd implementations of one backend's pair of operators."""
    forward = registration.overload("masked_pool", backend)
    backward = registration.overload("masked_pool_backward", backend)

    def differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * ctx.num_layers
        attention_mask, argmax = ctx.saved_tensors
        grads = backward(grad, attention_mask, argmax, ctx.num_layers, ctx.num_tokens, ctx.mode)
        return registration.first_derivative_only("masked_pool", grads, (grad,))

    def differentiate_op(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, None, None]:
        return list(differentiate(ctx, grad)), None, None

    class Eager(torch.autograd.Function):
        """The same for calls from Python, see registration.differentiable; layers come last."""

        @staticmethod
        def forward(ctx: Any, attention_mask: Tensor | None, mode: str, *layers: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward(list(layers), attention_mask, mode)
            _setup_context(ctx, (layers, attention_mask, mode), output)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
            return None, None, *differentiate(ctx, grad)

        jvp = registration.refuse_forward_mode("codir_fast::masked_pool")

    def call(layers: list[Tensor], attention_mask: Tensor | None, mode: str) -> Any:
        if torch.compiler.is_compiling():
            return forward(layers, attention_mask, mode)
        if any(registration.is_transformed(layer) for layer in layers):
            raise RuntimeError("codir_fast: masked_pool can't be transformed by torch.func")
        return Eager.apply(attention_mask, mode, *layers)

    registration.register_fake(forward, _fake)
    registration.register_fake(backward, _fake_backward)
    registration.register_autograd(forward, _setup_context, differentiate_op)
    _FORWARD[backend] = call


_FORWARD: dict[str, Any] = {}
for _name, _implementation, _backward in (
    ("torch", _torch, _torch_backward),
    ("triton", _triton, _triton_backward),
):
    registration.add_python_backend("masked_pool", _name, _implementation)
    registration.add_python_backend("masked_pool_backward", _name, _backward)
for _name in ("cpu", "torch", "triton"):
    _add(_name)
_FORWARD["cuda"] = _FORWARD["cpu"]  # one operator, dispatched by device
