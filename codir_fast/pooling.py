"""Pooling of a transformer's hidden states into one vector per text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codir_fast.checks import check_choice, check_device, check_float_dtype, check_tensor
from codir_fast.ops.masked_pool import MODES
from codir_fast.ops.masked_pool import masked_pool as masked_pool_op


def pool_hidden_states(
    hidden_states: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    mode: str = "mean",
    layers: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pools each layer over the real tokens and puts the layers side by side, in one pass over each
    layer.

    Column l*H + h of a row is feature h of the l-th layer taken. Sums are kept in float32 at least.
    A text without a real token gives 0, and gradient 0; what lies in padded tokens, NaN included,
    doesn't count.

    Args:
        hidden_states: L tensors (B, T, H) as transformers gives them, or one tensor; any strides;
            float32, float64, bfloat16 or float16.
        attention_mask: (B, T), not zero at real tokens, any dtype; None: all tokens are real.
        mode: "mean" or "max" over the real tokens, "first" or "last" of them (padding on either
            side).
        layers: which of `hidden_states`, in this order, negative from the end; None: all.
            In transformers' tuple 0 is the embedding's output.
        backend: see codir_fast.backends().

    Returns:
        (B, L*H) in the dtype of the hidden states; differentiable in them, once.

    Raises:
        ValueError, TypeError: a wrong shape, device, dtype, mode or layer.
        RuntimeError: the named backend can't run here.
    """
    chosen = _choose(hidden_states, layers)
    check_choice("mode", mode, MODES)
    _check_layers(chosen)
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, chosen[0])
    return masked_pool_op(chosen, attention_mask, mode, backend)


def _choose(hidden_states: Tensor | Sequence[Tensor], layers: Sequence[int] | None) -> list[Tensor]:
    if not isinstance(hidden_states, (Tensor, Sequence)):
        got = type(hidden_states).__name__
        raise TypeError(f"`hidden_states` must be a Tensor or a sequence of them, got {got}")
    given = [hidden_states] if isinstance(hidden_states, Tensor) else list(hidden_states)
    if not given:
        raise ValueError("`hidden_states` must hold at least one tensor, got none")
    if layers is None:
        return given
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"`layers` must be a sequence of ints, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError("`layers` must name at least one layer, got none")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"`layers` must hold ints, got {type(layer).__name__} {layer!r}")
        if not -len(given) <= layer < len(given):
            raise ValueError(
                f"`layers` must be in [{-len(given)}, {len(given)}), as there are {len(given)} "
                f"`hidden_states`, got {layer}"
            )
    return [given[layer] for layer in layers]


def _check_layers(layers: list[Tensor]) -> None:
    for layer in layers:
        check_tensor("hidden_states", layer)
    first = layers[0]
    if first.ndim != 3:
        raise ValueError(
            f"`hidden_states` must hold tensors of shape (B, T, H), got {tuple(first.shape)}"
        )
    check_float_dtype("hidden_states", first.dtype)
    for layer in layers[1:]:
        same = layer.shape == first.shape
        if not same or layer.dtype != first.dtype or layer.device != first.device:
            raise ValueError(
                "`hidden_states` must share one shape, dtype and device, "
                f"got {tuple(first.shape)} {first.dtype} {first.device} "
                f"and {tuple(layer.shape)} {layer.dtype} {layer.device}"
            )


def _check_mask(attention_mask: Tensor, layer: Tensor) -> Tensor:
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != layer.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have shape (B, T) = {tuple(layer.shape[:2])}, "
            f"got {tuple(attention_mask.shape)}"
        )
    check_device("attention_mask", attention_mask, layer.device, "`hidden_states`")
    if attention_mask.dtype in (torch.bool, torch.int64):
        return attention_mask
    return attention_mask != 0
