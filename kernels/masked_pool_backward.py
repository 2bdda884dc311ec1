"""The gradient of masked_pool: that of every layer, (B, T, H), from (B, L*H), in one launch.

A program owns BLOCK_H columns of one row of one layer and writes all of its tokens. The launcher
allocates the results; the kernel allocates nothing.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from codir_fast.kernels.launch import cdiv, launch
from codir_fast.kernels.masked_pool import (
    DTYPES,
    check_mask,
    check_mode,
    find_token,
    pick,
    real_tokens,
)
from torch import Tensor


@triton.jit
def count_tokens(mask_ptr, T, stride_mt, HAS_MASK: tl.constexpr, BLOCK_SCAN: tl.constexpr):
    count = tl.zeros((BLOCK_SCAN,), tl.int32)
    for t0 in range(0, T, BLOCK_SCAN):
        t = t0 + tl.arange(0, BLOCK_SCAN)
        count += real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK).to(tl.int32)
    return tl.sum(count)


@triton.jit(do_not_specialize=["T"])
def masked_pool_backward_kernel(
    dhidden,
    grad_ptr,
    mask_ptr,
    argmax_ptr,
    T,
    H,
    stride_mb,
    stride_mt,
    MODE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Grid (B * blocks of H, L). Every element of each layer's dhidden (B, T, H) is written."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    num_blocks = tl.cdiv(H, BLOCK_H)
    b = (tl.program_id(0) // num_blocks).to(tl.int64)
    h = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    layer = tl.program_id(1)
    if HAS_MASK:
        mask_ptr += b * stride_mb
    column = (b * tl.num_programs(1) + layer) * H + h
    share = tl.load(grad_ptr + column, mask=inside, other=0.0)
    if MODE == "mean":
        count = count_tokens(mask_ptr, T, stride_mt, HAS_MASK, BLOCK_SCAN)
        share = (share.to(ACC) / tl.maximum(count, 1).to(ACC)).to(dtype)
    elif MODE == "max":
        token = tl.load(argmax_ptr + column, mask=inside, other=-1)
    else:
        token = find_token(mask_ptr, T, stride_mt, MODE, HAS_MASK, BLOCK_SCAN)
    dhidden_ptr = pick(dhidden, layer, L)
    out = tl.multiple_of(dhidden_ptr, 16) + b * T * H + h  # allocators align to more than that
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        if MODE == "mean":
            chosen = real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK)[:, None]
        elif MODE == "max":
            chosen = t[:, None] == token[None, :]
        else:
            chosen = (t == token)[:, None]
        value = tl.where(chosen, share[None, :], 0.0).to(dtype)
        rows = out[None, :] + t.to(tl.int64)[:, None] * H
        tl.store(rows, value, mask=(t < T)[:, None] & inside[None, :])


def masked_pool_backward(
    grad: Tensor,
    attention_mask: Tensor | None,
    argmax: Tensor,
    num_layers: int,
    num_tokens: int,
    mode: str,
) -> list[Tensor]:
    """Gradient of every layer, L tensors (B, T, H) in the dtype of `grad`.

    Args:
        grad: (B, L*H), the gradient of `pooled`.
        attention_mask, mode: as given to masked_pool.
        argmax: as masked_pool returned it.
        num_layers, num_tokens: L and T.
    """
    B, H = _check_grad(grad, num_layers)
    mask = check_mask(attention_mask, (B, num_tokens), grad.device)
    check_mode(mode)
    if mode == "max" and (argmax.shape != grad.shape or argmax.dtype != torch.int64):
        raise ValueError(
            f"`argmax` must be int64 of shape {tuple(grad.shape)}, "
            f"got {argmax.dtype} {tuple(argmax.shape)}"
        )
    dhidden = [grad.new_empty(B, num_tokens, H) for _ in range(num_layers)]
    if dhidden[0].numel() == 0:
        return dhidden
    tile = tiles.choose(tiles.MASKED_POOL, tiles.architecture(grad.device))[grad.dtype]
    with torch.cuda.device_of(grad):
        launch(
            masked_pool_backward_kernel,
            (B * cdiv(H, tile.BLOCK_H), num_layers),
            tuple(dhidden),
            grad.contiguous(),
            mask,
            argmax.contiguous(),
            num_tokens,
            H,
            *((0, 0) if mask is None else mask.stride()),
            MODE=mode,
            HAS_MASK=mask is not None,
            L=num_layers,
            **tile._asdict(),
        )
    return dhidden


def _check_grad(grad: Tensor, num_layers: int) -> tuple[int, int]:
    """B and H."""
    if grad.ndim != 2 or grad.dtype not in DTYPES or num_layers < 1 or grad.shape[1] % num_layers:
        raise ValueError(
            f"`grad` must be floating of shape (B, {num_layers} * H), "
            f"got {grad.dtype} {tuple(grad.shape)}"
        )
    return grad.shape[0], grad.shape[1] // num_layers
