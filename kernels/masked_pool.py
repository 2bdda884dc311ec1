"""masked_pool: L hidden states (B, T, H) and one mask (B, T) -> (B, L*H), all layers in one launch.

A program owns BLOCK_H columns of one row of one layer and walks over its tokens. The layers'
addresses are arguments of the kernel, so that they are neither stacked nor copied, and a CUDA graph
holds them. Tokens that are masked are not loaded. The launchers allocate the results; kernels
allocate nothing.
"""

import torch
import triton
import triton.language as tl
from codir_fast.kernels import autotune, tiles
from codir_fast.kernels.launch import cdiv, launch
from torch import Tensor

MODES = ("mean", "max", "first", "last")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@triton.jit
def real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK: tl.constexpr):
    """Which of the tokens t of one row are real; mask_ptr points to the row."""
    real = t < T
    if HAS_MASK:
        real = tl.load(mask_ptr + t.to(tl.int64) * stride_mt, mask=real, other=0) != 0
    return real


@triton.jit
def find_token(
    mask_ptr, T, stride_mt, MODE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_SCAN: tl.constexpr
):
    """Position of the first or last real token; -1 where there is none."""
    found = tl.full((BLOCK_SCAN,), -1, tl.int32)
    for t0 in range(0, T, BLOCK_SCAN):
        t = t0 + tl.arange(0, BLOCK_SCAN)
        real = real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK)
        if MODE == "first":
            found = tl.where(real & (found < 0), t, found)
        else:
            found = tl.where(real, t, found)
    if MODE == "first":
        nearest = tl.min(tl.where(found < 0, T, found))
        return tl.where(nearest < T, nearest, -1)
    return tl.max(found)


@triton.jit
def _mean(
    state_ptrs,
    inside,
    mask_ptr,
    T,
    stride_t,
    stride_mt,
    ACC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.arange(0, BLOCK_T)
    # One sum per slot of the tile: no exchange between threads before the end, and sums of long
    # texts lose no digits.
    total = tl.zeros((BLOCK_T, BLOCK_H), ACC)
    count = tl.zeros((BLOCK_T,), tl.int32)
    # Tokens of four tiles are under way at a time, and the mask of the next four: no load waits for
    # its mask while others could begin.
    a, b, c, d = _four_masks(mask_ptr, t, T, stride_mt, HAS_MASK, BLOCK_T)
    for t0 in tl.range(0, T, 4 * BLOCK_T):
        rows = state_ptrs[None, :] + (t0 + t).to(tl.int64)[:, None] * stride_t
        step = tl.full((), BLOCK_T, tl.int64) * stride_t
        of_a = tl.load(rows, mask=a[:, None] & inside[None, :], other=0.0)
        of_b = tl.load(rows + step, mask=b[:, None] & inside[None, :], other=0.0)
        of_c = tl.load(rows + 2 * step, mask=c[:, None] & inside[None, :], other=0.0)
        of_d = tl.load(rows + 3 * step, mask=d[:, None] & inside[None, :], other=0.0)
        count += a.to(tl.int32) + b.to(tl.int32) + c.to(tl.int32) + d.to(tl.int32)
        next_t = t0 + 4 * BLOCK_T + t
        a, b, c, d = _four_masks(mask_ptr, next_t, T, stride_mt, HAS_MASK, BLOCK_T)
        total += of_a.to(ACC) + of_b.to(ACC) + (of_c.to(ACC) + of_d.to(ACC))
    return tl.sum(total, 0) / tl.maximum(tl.sum(count), 1).to(ACC)


@triton.jit
def _four_masks(mask_ptr, t, T, stride_mt, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr):
    return (
        real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK),
        real_tokens(mask_ptr, t + BLOCK_T, T, stride_mt, HAS_MASK),
        real_tokens(mask_ptr, t + 2 * BLOCK_T, T, stride_mt, HAS_MASK),
        real_tokens(mask_ptr, t + 3 * BLOCK_T, T, stride_mt, HAS_MASK),
    )


@triton.jit
def _max(
    state_ptrs,
    inside,
    mask_ptr,
    T,
    stride_t,
    stride_mt,
    ACC: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Maximum and its first position, 0 and -1 where no token is real. The first NaN beats all."""
    NONE: tl.constexpr = 2147483647
    best = tl.full((BLOCK_T, BLOCK_H), -float("inf"), ACC)
    token = tl.full((BLOCK_T, BLOCK_H), NONE, tl.int32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        real = real_tokens(mask_ptr, t, T, stride_mt, HAS_MASK)
        rows = state_ptrs[None, :] + t.to(tl.int64)[:, None] * stride_t
        value = tl.load(rows, mask=real[:, None] & inside[None, :], other=0.0).to(ACC)
        # token == NONE: a maximum of -inf has a position too.
        above = (value > best) | ((value != value) & (best == best)) | (token == NONE)
        better = real[:, None] & above
        best = tl.where(better, value, best)
        token = tl.where(better, t[:, None], token)
    is_nan = best != best
    has_nan = tl.max(is_nan.to(tl.int32), 0) != 0
    largest = tl.max(tl.where(is_nan, -float("inf"), best), 0)
    wins = tl.where(has_nan[None, :], is_nan, best == largest[None, :])
    first = tl.min(tl.where(wins, token, NONE), 0)
    largest = tl.where(has_nan, float("nan"), largest)
    return tl.where(first == NONE, 0.0, largest), tl.where(first == NONE, -1, first)


@triton.jit
def pick(layers, layer, L: tl.constexpr):
    """The address of a layer whose number is known on the device only."""
    picked = layers[0]
    for n in tl.static_range(1, L):
        picked = tl.where(layer == n, layers[n], picked)
    return picked


@triton.jit(do_not_specialize=["T"])
def masked_pool_kernel(
    pooled_ptr,
    argmax_ptr,
    layers,
    mask_ptr,
    T,
    H,
    stride_b,
    stride_t,
    stride_mb,
    stride_mt,
    MODE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
    L: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Grid (B * blocks of H, L)."""
    dtype: tl.constexpr = pooled_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    num_blocks = tl.cdiv(H, BLOCK_H)
    b = (tl.program_id(0) // num_blocks).to(tl.int64)
    h = (tl.program_id(0) % num_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    layer = tl.program_id(1)
    states_ptr = pick(layers, layer, L)
    if ALIGNED:
        states_ptr = tl.multiple_of(states_ptr, 16)
    state_ptrs = states_ptr + b * stride_b + h
    if HAS_MASK:
        mask_ptr += b * stride_mb
    out = (b * tl.num_programs(1) + layer) * H + h
    if MODE == "mean":
        value = _mean(
            state_ptrs, inside, mask_ptr, T, stride_t, stride_mt, ACC, HAS_MASK, BLOCK_T, BLOCK_H
        )
    elif MODE == "max":
        value, token = _max(
            state_ptrs, inside, mask_ptr, T, stride_t, stride_mt, ACC, HAS_MASK, BLOCK_T, BLOCK_H
        )
        tl.store(argmax_ptr + out, token.to(tl.int64), mask=inside)
    else:
        token = find_token(mask_ptr, T, stride_mt, MODE, HAS_MASK, BLOCK_SCAN)
        row = state_ptrs + token.to(tl.int64) * stride_t
        value = tl.load(row, mask=inside & (token >= 0), other=0.0)
    tl.store(pooled_ptr + out, value.to(dtype), mask=inside)


def masked_pool(
    hidden_states: list[Tensor], attention_mask: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """Pools every layer over its real tokens.

    Args:
        hidden_states: L tensors (B, T, H) of one shape, dtype and device; float32, float64,
            bfloat16 or float16; any strides, read in place where H is dense and all have the same.
        attention_mask: (B, T) bool or int64, not zero at real tokens; None: all are real.
        mode: "mean", "max", "first" or "last".

    Returns:
        pooled (B, L*H) in the dtype of the layers, column l*H + h; 0 in a row without a real token.
        argmax (B, L*H) int64: the token of each maximum, -1 in a row without one; (0,) unless
        `mode` is "max".
    """
    _check_layers(hidden_states)
    first = hidden_states[0]
    B, T, H = first.shape
    L = len(hidden_states)
    mask = check_mask(attention_mask, (B, T), first.device)
    check_mode(mode)
    pooled = first.new_empty(B, L * H)
    argmax = first.new_empty(pooled.shape if mode == "max" else (0,), dtype=torch.int64)
    if pooled.numel() == 0:
        return pooled, argmax
    layers = _with_same_strides(hidden_states)
    arch = tiles.architecture(first.device)
    tile = tiles.choose(tiles.MASKED_POOL, arch)[first.dtype]._asdict()

    def run(tile: tiles.Tile) -> None:
        launch(
            masked_pool_kernel,
            (B * cdiv(H, tile["BLOCK_H"]), L),
            pooled,
            argmax,
            tuple(layers),
            mask,
            T,
            H,
            *layers[0].stride()[:2],
            *((0, 0) if mask is None else mask.stride()),
            MODE=mode,
            HAS_MASK=mask is not None,
            ALIGNED=all(layer.data_ptr() % 16 == 0 for layer in layers),
            L=L,
            **tile,
        )

    with torch.cuda.device_of(first):
        key = ("masked_pool", L, B, T, H, first.dtype, mode, mask is not None)
        autotune.run_best(key, tile, run, first.device)
    return pooled, argmax


def _with_same_strides(layers: list[Tensor]) -> list[Tensor]:
    layers = [layer if layer.stride(2) == 1 else layer.contiguous() for layer in layers]
    if any(layer.stride() != layers[0].stride() for layer in layers):
        layers = [layer.contiguous() for layer in layers]
    return layers


def _check_layers(layers: list[Tensor]) -> None:
    if not layers:
        raise ValueError("`hidden_states` must hold at least one tensor, got none")
    first = layers[0]
    if first.ndim != 3 or first.dtype not in DTYPES:
        raise ValueError(
            "`hidden_states` must be float32, float64, bfloat16 or float16 of shape (B, T, H), "
            f"got {first.dtype} {tuple(first.shape)}"
        )
    for layer in layers:
        same = layer.shape == first.shape and layer.dtype == first.dtype
        if not same or layer.device != first.device:
            raise ValueError(
                "`hidden_states` must share one shape, dtype and device, got "
                f"{tuple(first.shape)} {first.dtype} {first.device} and "
                f"{tuple(layer.shape)} {layer.dtype} {layer.device}"
            )


def check_mask(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The mask as the kernels read it: a bool is a byte."""
    if mask is None:
        return None
    if mask.shape != shape or mask.device != device or mask.dtype not in (torch.bool, torch.int64):
        raise ValueError(
            f"`attention_mask` must be bool or int64 of shape {shape} on {device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}")
