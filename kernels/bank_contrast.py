"""bank_contrast: contrastive loss of B queries against all K bank rows; loss and gradients in one
bank pass.

A program holds BLOCK_B queries and walks over its split of the bank: s = q.b/t, and for InfoNCE
sums of e^s and of e^s b under a running maximum, as attention does with keys = values = bank; for
NCE, with a = s - log Z - log(c + eps), sums of softplus(a) and of sigmoid(a) b. The second kernel
merges the splits in a fixed order and finishes loss and gradients in float64. Nothing of size B x K
exists; partial sums (splits, B, D + 2) are allocated by the launcher.
"""

import math

import torch
import triton
import triton.language as tl
from codir_fast.kernels import tiles
from torch import Tensor

MAX_DIM = 256
BANK_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

NCE_EPS = 1e-7  # as in codir_fast.reference

# Three products of tf32 parts make one of float32; "fma" multiplies and adds as written.
PRECISION = {torch.float32: "tf32x3", torch.float64: "fma"}


@triton.jit
def _load_rows(ptr, row, wanted, d, D, ACC: tl.constexpr):
    inside = wanted[:, None] & (d < D)[None, :]
    return tl.load(ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _load_scale(
    scale_ptr, valid_ptr, j, K, ACC: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_VALID: tl.constexpr
):
    """Scale of bank rows j, and which of them may be read: not past the end, and valid."""
    usable = j < K
    if HAS_VALID:
        usable = tl.load(valid_ptr + j, mask=usable, other=0) != 0
    scale = tl.full(j.shape, 1.0, ACC)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + j, mask=usable, other=0.0)
    return scale, usable


@triton.jit
def _logistic(a):
    """sigmoid(a) and softplus(a) = log(1 + e^a), with full relative precision where they are
    tiny.
    """
    small = tl.exp(-tl.abs(a))
    one = 1.0 + small
    # log(one) misses what rounding took from `small` in the sum; the quotient puts it back.
    exact = one == 1.0
    log1p = tl.where(exact, small, tl.log(one) * (small / tl.where(exact, 1.0, one - 1.0)))
    return tl.where(a > 0, 1.0, small) / one, tl.where(a > 0, a, 0.0) + log1p


@triton.jit
def _add_dots(total, a, b, PRECISION: tl.constexpr):
    """total (M, N) + a (M, D) b^T (D, N)."""
    if PRECISION == "fma":  # float64: Triton 3.6 can't chain its matrix instructions
        total += tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _add_rows(total, weight, rows, PRECISION: tl.constexpr):
    """total (M, D) + weight (M, N) rows (N, D)."""
    if PRECISION == "fma":
        total += tl.sum(weight[:, :, None] * rows[None, :, :], 1)
    else:
        total = tl.dot(weight, rows, total, input_precision=PRECISION)
    return total


@triton.jit
def _logits(
    query_ptr,
    bank_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    i,
    j,
    usable,
    scale,
    B,
    D,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """scale_j q_i.b_j, -inf where j is not in A_i."""
    ACC: tl.constexpr = query_ptr.dtype.element_ty
    s = tl.zeros((BLOCK_B, BLOCK_K), ACC)
    # In chunks: a whole query tile would fill the registers.
    for d0 in range(0, BLOCK_D, CHUNK_D):
        d = d0 + tl.arange(0, CHUNK_D)
        query = _load_rows(query_ptr, i, i < B, d, D, ACC)
        s = _add_dots(s, query, _load_rows(bank_ptr, j, usable, d, D, ACC), PRECISION)
    allowed = (i < B)[:, None] & usable[None, :]
    if HAS_LABELS:
        label = tl.load(labels_ptr + i, mask=i < B, other=0)
        bank_label = tl.load(bank_labels_ptr + j, mask=usable, other=0)
        allowed &= label[:, None] != bank_label[None, :]
    if HAS_EXCLUDE:
        excluded = tl.load(exclude_ptr + i, mask=i < B, other=-1)
        allowed &= excluded[:, None] != j[None, :]
    return tl.where(allowed, s * scale[None, :], -float("inf"))


@triton.jit(do_not_specialize=["B", "K", "rows_per_split"])
def bank_contrast_kernel(
    maximum_ptr,
    total_ptr,
    rows_ptr,
    query_ptr,
    bank_ptr,
    inv_temperature_ptr,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    nce_ptr,
    B,
    K,
    D,
    rows_per_split,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of B, splits): maximum m (splits, B) of s, total sum of e^{s - m}, rows
    (splits, B, D) sum of e^{s - m} b. NCE: m is 0, total the sum of its terms, rows that of
    sigmoid(a) b; nce_ptr holds log Z + log(c + eps) and log(1 + eps / c).
    """
    ACC: tl.constexpr = query_ptr.dtype.element_ty
    i = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inv_temperature = tl.load(inv_temperature_ptr)
    if NCE:
        maximum = tl.zeros((BLOCK_B,), ACC)
        offset = tl.load(nce_ptr)
        extra = tl.load(nce_ptr + 1)
    else:
        maximum = tl.full((BLOCK_B,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_B,), ACC)
    lost = tl.zeros((BLOCK_B,), ACC)
    rows = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    for j0 in range(first, tl.minimum(first + rows_per_split, K), BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        scale, usable = _load_scale(scale_ptr, valid_ptr, j, K, ACC, HAS_SCALE, HAS_VALID)
        s = _logits(
            query_ptr,
            bank_ptr,
            labels_ptr,
            bank_labels_ptr,
            exclude_ptr,
            i,
            j,
            usable,
            scale * inv_temperature,
            B,
            D,
            HAS_LABELS,
            HAS_EXCLUDE,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
            CHUNK_D,
        )
        if NCE:
            weight, term = _logistic(s - offset)
            term = tl.where(s == -float("inf"), 0.0, term + extra)
        else:
            larger = tl.maximum(maximum, tl.max(s, 1))
            shift = tl.where(larger == -float("inf"), 0.0, larger)  # no allowed row yet
            rescale = tl.exp(maximum - shift)
            weight = tl.exp(s - shift[:, None])
            term = weight
            maximum = larger
            lost = lost * rescale
            total = total * rescale
            rows = rows * rescale[:, None]
        # Compensated (Kahan): a sum of many tiles would wear off the last digits.
        increment = tl.sum(term, 1) - lost
        before = total
        total = before + increment
        lost = (total - before) - increment
        bank = _load_rows(bank_ptr, j, usable, d, D, ACC)
        rows = _add_rows(rows, weight * scale[None, :], bank, PRECISION)
    out = split * B + i
    tl.store(maximum_ptr + out, maximum, mask=i < B)
    tl.store(total_ptr + out, total, mask=i < B)
    inside = (i < B)[:, None] & (d < D)[None, :]
    tl.store(rows_ptr + out[:, None] * D + d[None, :], rows, mask=inside)


@triton.jit(do_not_specialize=["B", "splits"])
def bank_contrast_combine_kernel(
    loss_ptr,
    lse_ptr,
    dquery_ptr,
    dpositive_ptr,
    dinv_temperature_ptr,
    maximum_ptr,
    total_ptr,
    rows_ptr,
    query_ptr,
    positive_ptr,
    inv_temperature_ptr,
    nce_ptr,
    B,
    D,
    splits,
    NCE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B,): merges the splits of one query."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    largest = tl.full((BLOCK_S,), -float("inf"), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * B + i, mask=n < splits, other=-float("inf"))
        largest = tl.maximum(largest, maximum.to(tl.float64))
    largest = tl.max(largest, 0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros((BLOCK_S,), tl.float64)
    summed = tl.zeros((BLOCK_D,), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * B + i, mask=n < splits, other=-float("inf"))
        weight = tl.exp(maximum.to(tl.float64) - shift)
        total += weight * tl.load(total_ptr + n * B + i, mask=n < splits, other=0.0)
        rows = tl.load(
            rows_ptr + (n * B + i)[:, None] * D + d[None, :],
            mask=(n < splits)[:, None] & inside[None, :],
            other=0.0,
        )
        summed += tl.sum(weight[:, None] * rows, 0)
    total = tl.sum(total, 0)

    query = tl.load(query_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    inv_temperature = tl.load(inv_temperature_ptr).to(tl.float64)
    positive_logit = tl.sum(query * positive, 0) * inv_temperature
    if NCE:
        lse = tl.load(nce_ptr).to(tl.float64)
        positive_weight, softplus = _logistic(lse - positive_logit)
        loss = softplus + total
        direction = summed - positive_weight * positive
    else:
        # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+
        # is subtracted twice. No negative: total 0, gap -inf, loss 0.
        gap = (largest - positive_logit) + tl.log(total)
        positive_weight, loss = _logistic(gap)  # what the positive's share lacks of 1
        lse = positive_logit + loss
        direction = positive_weight * (summed / tl.where(total == 0, 1.0, total) - positive)
    tl.store(loss_ptr + i, loss)
    tl.store(lse_ptr + i, lse)
    tl.store(dinv_temperature_ptr + i, tl.sum(query * direction, 0))
    tl.store(dquery_ptr + i * D + d, direction * inv_temperature, mask=inside)
    dpositive = -positive_weight * query * inv_temperature
    tl.store(dpositive_ptr + i * D + d, dpositive, mask=inside)


@triton.jit(do_not_specialize=["B", "K"])
def bank_contrast_backward_kernel(
    dbank_ptr,
    grad_ptr,
    lse_ptr,
    query_ptr,
    bank_ptr,
    inv_temperature_ptr,
    scale_ptr,
    labels_ptr,
    bank_labels_ptr,
    exclude_ptr,
    valid_ptr,
    B,
    K,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Grid (blocks of K,): a program owns BLOCK_K rows of dbank and walks over all queries."""
    ACC: tl.constexpr = query_ptr.dtype.element_ty
    j = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    scale, usable = _load_scale(scale_ptr, valid_ptr, j, K, ACC, HAS_SCALE, HAS_VALID)
    inv_temperature = tl.load(inv_temperature_ptr)
    dbank = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    for i0 in range(0, B, BLOCK_B):
        i = (i0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        s = _logits(
            query_ptr,
            bank_ptr,
            labels_ptr,
            bank_labels_ptr,
            exclude_ptr,
            i,
            j,
            usable,
            scale * inv_temperature,
            B,
            D,
            HAS_LABELS,
            HAS_EXCLUDE,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
            CHUNK_D,
        )
        lse = tl.load(lse_ptr + i, mask=i < B, other=0.0)
        grad = tl.load(grad_ptr + i, mask=i < B, other=0.0)
        # In two parts: the first is taken from a logit near lse without rounding.
        high = lse.to(ACC)
        low = (lse - high).to(ACC)
        gap = (s - high[:, None]) - low[:, None]
        if NCE:
            weight, _ = _logistic(gap)
        else:
            weight = tl.exp(gap)
        weight = weight * (grad * inv_temperature)[:, None]
        query = _load_rows(query_ptr, i, i < B, d, D, ACC)
        dbank = _add_rows(dbank, tl.trans(weight), query, PRECISION)
    dbank = (dbank * scale[:, None]).to(dbank_ptr.dtype.element_ty)
    # A row that is not usable has only zero weights.
    inside = (j < K)[:, None] & (d < D)[None, :]
    tl.store(dbank_ptr + j[:, None] * D + d[None, :], dbank, mask=inside)


def bank_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of each query against all allowed bank rows, with its gradients; any temperature.

    InfoNCE, or NCE where log Z is given.

    Not seen on a GPU yet: run by the interpreter, and compiled for sm_80, sm_90 and sm_100.

    Args:
        query, positive: (B, D), both float32 or both float64, D up to 256.
        bank: (K, D), float32, bfloat16 or float16; float64 with float64 queries only.
        inv_temperature: 0-d, 1/t, on the CPU or the query's device.
        bank_scale: (K,) in the query's dtype, a factor of each bank row.
        labels, bank_labels: (B,) and (K,) int64: rows of the query's own label are no negatives.
        exclude_index: (B,) int64: one row that is no negative, -1 for none.
        valid: (K,) bool: other rows are no negatives, and are not read.
        log_partition: 0-d, log Z of NCE, on the query's device.
        num_noise, num_data: M and n of NCE, c = M / n.

    Returns:
        loss (B,), lse (B,), dquery (B, D), dpositive (B, D), dinv_temperature (B,) in the query's
        dtype, lse in float64: log-sum-exp with the positive (NCE: log Z + log(c + eps)), and the
        derivatives of loss_i.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    inputs, flags = _prepare(query, bank, inv_temperature, bank_scale, *masks)
    (B, D), K = query.shape, bank.shape[0]
    _check("positive", positive, (B, D), (query.dtype,), query.device)
    loss, dinv_temperature = (query.new_empty(B) for _ in range(2))
    lse = query.new_empty(B, dtype=torch.float64)
    dquery, dpositive = (query.new_empty(B, D) for _ in range(2))
    outputs = (loss, lse, dquery, dpositive, dinv_temperature)
    nce = _nce(log_partition, num_noise, num_data, query)
    if B == 0:
        return outputs
    tile = tiles.bank_contrast(query.device, query.dtype, D)
    splits, rows_per_split = _split(B, K, tile, query.device)
    maximum, total = (query.new_empty(splits, B) for _ in range(2))
    rows = query.new_empty(splits, B, D)
    with torch.cuda.device_of(query):
        bank_contrast_kernel[(triton.cdiv(B, tile["BLOCK_B"]), splits)](
            *(maximum, total, rows, *inputs, nce, B, K, D, rows_per_split),
            NCE=nce is not None,
            **flags,
            **tile,
        )
        bank_contrast_combine_kernel[(B,)](
            *outputs,
            maximum,
            total,
            rows,
            inputs[0],
            positive.contiguous(),
            inputs[2],
            nce,
            B,
            D,
            splits,
            NCE=nce is not None,
            BLOCK_S=tiles.COMBINED_SPLITS,
            BLOCK_D=tile["BLOCK_D"],
        )
    return outputs


def bank_contrast_backward(
    grad_loss: Tensor,
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
) -> Tensor:
    """Gradient to the bank, (K, D) in its dtype; 0 in rows that are not valid.

    `grad_loss` is (B,) in the query's dtype, `lse` (B,) as bank_contrast returned it; the other
    arguments as they were given to it.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    inputs, flags = _prepare(query, bank, inv_temperature, bank_scale, *masks)
    (B, D), K = query.shape, bank.shape[0]
    _check("grad_loss", grad_loss, (B,), (query.dtype,), query.device)
    _check("lse", lse, (B,), (torch.float64,), query.device)
    dbank = torch.empty(K, D, dtype=bank.dtype, device=bank.device)
    if K == 0:
        return dbank
    tile = tiles.bank_contrast(query.device, query.dtype, D)
    with torch.cuda.device_of(query):
        bank_contrast_backward_kernel[(triton.cdiv(K, tile["BLOCK_K"]),)](
            *(dbank, grad_loss.contiguous(), lse.contiguous(), *inputs, B, K, D),
            NCE=log_partition is not None,
            **flags,
            **tile,
        )
    return dbank


def _prepare(
    query: Tensor,
    bank: Tensor,
    inv_temperature: Tensor,
    bank_scale: Tensor | None,
    labels: Tensor | None,
    bank_labels: Tensor | None,
    exclude_index: Tensor | None,
    valid: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], dict[str, bool | str]]:
    """Checks the inputs that both kernels share; gives them, and what is chosen at compile time."""
    if query.ndim != 2 or bank.ndim != 2 or query.shape[1] > MAX_DIM:
        raise ValueError(
            f"`query` and `bank` must have shapes (B, D) and (K, D) with D at most {MAX_DIM}, "
            f"got {tuple(query.shape)} and {tuple(bank.shape)}"
        )
    if (labels is None) != (bank_labels is None):
        raise ValueError("`labels` and `bank_labels` must be given together")
    (B, D), K, device, dtype = query.shape, bank.shape[0], query.device, query.dtype
    _check("query", query, (B, D), tuple(PRECISION), device)
    allowed = BANK_DTYPES if dtype == torch.float64 else tuple(set(BANK_DTYPES) - {torch.float64})
    _check("bank", bank, (K, D), allowed, device)
    for name, tensor, size, wanted in (
        ("bank_scale", bank_scale, K, dtype),
        ("labels", labels, B, torch.int64),
        ("bank_labels", bank_labels, K, torch.int64),
        ("exclude_index", exclude_index, B, torch.int64),
        ("valid", valid, K, torch.bool),
    ):
        if tensor is not None:
            _check(name, tensor, (size,), (wanted,), device)
    inv_t = _on_device(inv_temperature, query)
    valid = None if valid is None else valid.view(torch.uint8)  # a bool is a byte
    given = (query, bank, inv_t, bank_scale, labels, bank_labels, exclude_index, valid)
    flags = {
        "HAS_SCALE": bank_scale is not None,
        "HAS_LABELS": labels is not None,
        "HAS_EXCLUDE": exclude_index is not None,
        "HAS_VALID": valid is not None,
        "PRECISION": PRECISION[dtype],
    }
    return tuple(None if tensor is None else tensor.contiguous() for tensor in given), flags


def _on_device(inv_temperature: Tensor, query: Tensor) -> Tensor:
    """1/t where the kernels read it, without waiting for the device."""
    if inv_temperature.device == query.device:
        _check("inv_temperature", inv_temperature, (), tuple(PRECISION), query.device)
        return inv_temperature.to(query.dtype)
    _check("inv_temperature", inv_temperature, (), tuple(PRECISION), torch.device("cpu"))
    return torch.full((), inv_temperature.item(), dtype=query.dtype, device=query.device)


def _nce(
    log_partition: Tensor | None, num_noise: int, num_data: int, query: Tensor
) -> Tensor | None:
    """log Z + log(c + eps) and log(1 + eps / c) where the kernels read them."""
    if log_partition is None:
        return None
    _check("log_partition", log_partition, (), tuple(PRECISION), query.device)
    if num_noise < 1 or num_data < 1:
        got = f"{num_noise} and {num_data}"
        raise ValueError(f"`num_noise` and `num_data` must be positive, got {got}")
    noise_ratio = num_noise / num_data
    offset = log_partition.to(torch.float64) + math.log(noise_ratio + NCE_EPS)
    extra = torch.full_like(offset, math.log1p(NCE_EPS / noise_ratio))
    return torch.stack([offset, extra]).to(query.dtype)


def _split(B: int, K: int, tile: dict[str, int], device: torch.device) -> tuple[int, int]:
    """Number of bank splits, enough to fill the GPU, and rows of each, whole blocks."""
    programs = triton.cdiv(tiles.num_programs(device), triton.cdiv(B, tile["BLOCK_B"]))
    splits = max(1, min(programs, triton.cdiv(K, tile["BLOCK_K"])))
    blocks = max(1, triton.cdiv(triton.cdiv(K, tile["BLOCK_K"]), splits))
    rows = blocks * tile["BLOCK_K"]
    return max(1, triton.cdiv(K, rows)), rows


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"`{name}` must be {names} of shape {shape} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
