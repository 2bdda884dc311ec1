"""What the kernels of bank_contrast and indexed_contrast share: unit rows before the pass, and
after it the end of each query, from partial sums over splits of its negatives to loss and
gradients.

InfoNCE's logits are in units of log 2 in the pass (exp2 is what the hardware has), its partial sums
relative to 2^maximum. NCE's, with a = s - log Z - log(c + eps), are sums of softplus(a) and of
sigmoid(a) b; their maximum is 0. The end is computed in float64.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from codir_fast.kernels.labels import (
    LABEL_BLOCK,
    as_sought,
    is_sorted,
    label_blocks,
    number_labels,
)
from codir_fast.kernels.launch import launch, next_power_of_2
from torch import Tensor

MAX_DIM = 4096
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BANK_DTYPES = (*QUERY_DTYPES, torch.float8_e4m3fn)
SCALAR_DTYPES = (torch.float32, torch.float64)

NCE_EPS = 1e-7  # as in codir_fast.reference
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scalar(x, ON_DEVICE: tl.constexpr):
    """A number that came by value, or the one that x points to."""
    if ON_DEVICE:
        return tl.load(x).to(tl.float32)
    else:
        return tl.full((), 0.0, tl.float32) + x  # the interpreter hands numbers over as they are


@triton.jit
def logistic(a):
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
def add_compensated(total, lost, terms):
    """Kahan's sum of total and terms, and what was lost: sums of thousands of tiles wear off the
    last digits otherwise.
    """
    increment = terms - lost
    after = total + increment
    return after, (after - total) - increment


@triton.jit
def _inverse_norm(row, NORMALIZE: tl.constexpr):
    """1 / max(|row|, 1e-12) of a row in float64, and whether the row is longer than that."""
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(row * row, 0))
        return 1.0 / tl.maximum(norm, 1e-12), norm > 1e-12  # as in torch.nn.functional.normalize
    else:
        return tl.full((), 1.0, tl.float64), tl.full((), 0, tl.int1)


@triton.jit
def _unit_row(out_ptr, rows_ptr, n, D, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float64)
    inverse, _ = _inverse_norm(row, True)
    unit = (row * inverse).to(tl.float32)
    tl.store(out_ptr + n * D + d, unit.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["B", "K", "num_rows", "label_blocks", "halvings"])
def prepare_kernel(
    unit_ptr,
    query_ptr,
    numbers_ptr,
    bank_numbers_ptr,
    labels_ptr,
    bank_labels_ptr,
    sought_ptr,
    B,
    K,
    D,
    num_rows,
    label_blocks,
    halvings,
    HAS_LABELS: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid (num_rows + label_blocks + blocks of K,): the queries that are to be brought to unit
    length, then labels as numbers (see labels.py), by those of the queries at sought_ptr.
    """
    n = tl.program_id(0)
    if n < num_rows:
        _unit_row(unit_ptr, query_ptr, n.to(tl.int64), D, BLOCK_D)
    elif HAS_LABELS:
        block = n - num_rows
        if block < label_blocks:
            number_labels(
                numbers_ptr,
                labels_ptr,
                sought_ptr,
                block,
                B,
                B,
                halvings,
                SORTED,
                BLOCK_N,
                BLOCK_B,
            )
        else:
            number_labels(
                bank_numbers_ptr,
                bank_labels_ptr,
                sought_ptr,
                block - label_blocks,
                K,
                B,
                halvings,
                SORTED,
                BLOCK_N,
                BLOCK_B,
            )


@triton.jit(do_not_specialize=["B", "splits"])
def combine_kernel(
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
    inv_temperature,
    log_partition_ptr,
    log_noise,
    B,
    D,
    splits,
    NCE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B,): merges the splits of one query, in an order that depends on their number alone."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    query = tl.load(query_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    positive = tl.load(positive_ptr + i * D + d, mask=inside, other=0.0).to(tl.float64)
    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * B + i, mask=n < splits, other=-float("inf"))
        largest = tl.maximum(largest, maximum)
    largest = tl.max(largest, 0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros((BLOCK_S,), tl.float64)
    summed = tl.zeros((BLOCK_S, BLOCK_D), tl.float64)
    for n0 in range(0, splits, BLOCK_S):
        n = (n0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        maximum = tl.load(maximum_ptr + n * B + i, mask=n < splits, other=-float("inf"))
        weight = tl.exp2(maximum - shift).to(tl.float64)
        total += weight * tl.load(total_ptr + n * B + i, mask=n < splits, other=0.0)
        rows = tl.load(
            rows_ptr + (n * B + i)[:, None] * D + d[None, :],
            mask=(n < splits)[:, None] & inside[None, :],
            other=0.0,
        )
        summed += weight[:, None] * rows
    total = tl.sum(total, 0)
    summed = tl.sum(summed, 0)

    query_scale, query_moves = _inverse_norm(query, NORMALIZE)
    positive_scale, positive_moves = _inverse_norm(positive, NORMALIZE)
    query = query * query_scale
    positive = positive * positive_scale
    inv_t = scalar(inv_temperature, T_ON_DEVICE).to(tl.float64)
    positive_logit = tl.sum(query * positive, 0) * inv_t
    if NCE:
        lse = tl.load(log_partition_ptr).to(tl.float64) + log_noise
        positive_weight, softplus = logistic(lse - positive_logit)
        loss = softplus + total
        direction = summed - positive_weight * positive
    else:
        # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+
        # is subtracted twice. No negative: total 0, gap -inf, loss 0.
        gap = (largest.to(tl.float64) * LN2 - positive_logit) + tl.log(total)
        positive_weight, loss = logistic(gap)  # what the positive's share lacks of 1
        lse = positive_logit + loss
        direction = positive_weight * (summed / tl.where(total == 0, 1.0, total) - positive)
    dquery = direction * inv_t
    dpositive = -positive_weight * query * inv_t
    if NORMALIZE:  # back through the division by the norm
        along_query = tl.where(query_moves, tl.sum(dquery * query, 0), 0.0)
        dquery = (dquery - along_query * query) * query_scale
        along_positive = tl.where(positive_moves, tl.sum(dpositive * positive, 0), 0.0)
        dpositive = (dpositive - along_positive * positive) * positive_scale
    tl.store(loss_ptr + i, loss)
    tl.store(lse_ptr + i, lse)
    tl.store(dinv_temperature_ptr + i, tl.sum(query * direction, 0))
    tl.store(dquery_ptr + i * D + d, dquery, mask=inside)
    tl.store(dpositive_ptr + i * D + d, dpositive, mask=inside)


class Problem:
    """The arguments that bank_contrast and indexed_contrast share, checked, as kernels take them.

    Products run in the dtype of the query. Rows of the bank are brought to it as they are read.
    """

    def __init__(
        self,
        query: Tensor,
        bank: Tensor,
        inv_temperature: Tensor,
        bank_scale: Tensor | None,
        labels: Tensor | None,
        bank_labels: Tensor | None,
        exclude_index: Tensor | None,
        valid: Tensor | None,
        log_partition: Tensor | None,
        num_noise: int,
        num_data: int,
        normalize: bool,
    ) -> None:
        if query.ndim != 2 or bank.ndim != 2 or not 0 < query.shape[1] <= MAX_DIM:
            raise ValueError(
                f"`query` and `bank` must have shapes (B, D) and (K, D) with D at most {MAX_DIM}, "
                f"got {tuple(query.shape)} and {tuple(bank.shape)}"
            )
        if (labels is None) != (bank_labels is None):
            raise ValueError("`labels` and `bank_labels` must be given together")
        if num_noise < 1 or num_data < 1:
            got = f"{num_noise} and {num_data}"
            raise ValueError(f"`num_noise` and `num_data` must be positive, got {got}")
        (self.B, self.D), self.K, device = query.shape, bank.shape[0], query.device
        B, D, K = self.B, self.D, self.K
        check("query", query, (B, D), QUERY_DTYPES, device)
        check("bank", bank, (K, D), BANK_DTYPES, device)
        for name, tensor, size, dtype in (
            ("bank_scale", bank_scale, K, torch.float32),
            ("labels", labels, B, torch.int64),
            ("bank_labels", bank_labels, K, torch.int64),
            ("exclude_index", exclude_index, B, torch.int64),
            ("valid", valid, K, torch.bool),
        ):
            if tensor is not None:
                check(name, tensor, (size,), (dtype,), device)
        self.device, self.dtype, self.normalize = device, query.dtype, normalize
        self.query, self.bank = query.contiguous(), bank.contiguous()
        self.inv_temperature, on_device = _number(inv_temperature, device)
        valid = None if valid is None else valid.view(torch.uint8)  # a bool is a byte
        masks = (bank_scale, labels, bank_labels, exclude_index, valid)
        self.masks = tuple(None if mask is None else mask.contiguous() for mask in masks)
        self.log_partition, self.noise_ratio = log_partition, num_noise / num_data
        if log_partition is not None:
            check("log_partition", log_partition, (), SCALAR_DTYPES, device)
        self.flags: dict[str, Any] = {
            "HAS_SCALE": bank_scale is not None,
            "HAS_LABELS": labels is not None,
            "HAS_EXCLUDE": exclude_index is not None,
            "HAS_VALID": valid is not None,
            "NCE": log_partition is not None,
            "T_ON_DEVICE": on_device,
            "PRECISION": precision(query.dtype),
        }

    @property
    def nce(self) -> tuple[Tensor | None, float, float]:
        """log Z where it lies, log(c + eps), log(1 + eps / c)."""
        ratio = self.noise_ratio
        return self.log_partition, math.log(ratio + NCE_EPS), math.log1p(NCE_EPS / ratio)

    def prepare(self, number_labels: bool = True) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The queries as products take them, (B, D), and what masks the rows of the bank:
        bank_scale, labels and bank_labels (numbers for them if `number_labels`), exclude_index,
        valid.
        """
        scale, labels, bank_labels, exclude, valid = self.masks
        has_labels = labels is not None and number_labels
        if not (self.normalize or has_labels):
            return self.query, self.masks
        unit, numbers, bank_numbers = self.query, labels, bank_labels
        if self.normalize:
            unit = torch.empty_like(self.query)
        if has_labels:
            numbers, bank_numbers = (
                torch.empty(size, dtype=torch.int32, device=self.device)
                for size in (self.B, self.K)
            )
        num_rows = self.B if self.normalize else 0
        blocks = [label_blocks(size) if has_labels else 0 for size in (self.B, self.K)]
        launch(
            prepare_kernel,
            (num_rows + sum(blocks),),
            unit,
            self.query,
            numbers,
            bank_numbers,
            labels,
            bank_labels,
            as_sought(labels) if has_labels else None,
            *(self.B, self.K, self.D, num_rows, blocks[0], self.B.bit_length()),
            HAS_LABELS=has_labels,
            SORTED=is_sorted(self.B),
            **prepare_tile(padded(self.D)),
        )
        return unit, (scale, numbers, bank_numbers, exclude, valid)

    def outputs(self) -> tuple[Tensor, ...]:
        """loss, lse, dquery, dpositive, dinv_temperature, to be written."""
        loss, dinv_temperature = (self._new(self.B) for _ in range(2))
        dquery, dpositive = (self._new(self.B, self.D) for _ in range(2))
        lse = self._new(self.B, dtype=torch.float64)
        return loss, lse, dquery, dpositive, dinv_temperature

    def partial_sums(self, splits: int) -> tuple[Tensor, Tensor, Tensor]:
        """maximum and total (splits, B), rows (splits, B, D), to be written."""
        maximum, total = (self._new(splits, self.B) for _ in range(2))
        return maximum, total, self._new(splits, self.B, self.D)

    def _new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def combine(
        self, outputs: tuple[Tensor, ...], sums: tuple[Tensor, Tensor, Tensor], positive: Tensor
    ) -> None:
        log_partition, log_noise, _ = self.nce
        BLOCK_D = padded(self.D)
        launch(
            combine_kernel,
            (self.B,),
            *outputs,
            *sums,
            self.query,
            positive.contiguous(),
            self.inv_temperature,
            log_partition,
            log_noise,
            self.B,
            self.D,
            sums[0].shape[0],
            NCE=self.flags["NCE"],
            NORMALIZE=self.normalize,
            T_ON_DEVICE=self.flags["T_ON_DEVICE"],
            **combine_tile(BLOCK_D, sums[0].shape[0]),
        )


def combine_tile(BLOCK_D: int, splits: int) -> dict[str, int]:
    """A program merges up to 16,384 elements at a time, 32 a thread, and has up to 8 columns a
    thread of query and positive. Few splits take few threads, since each query has a program.
    """
    most = 16384 if BLOCK_D <= 256 else 8192
    BLOCK_S = min(next_power_of_2(splits), most // BLOCK_D)
    num_warps = min(16, max(1, BLOCK_D // 256, BLOCK_S * BLOCK_D // 1024))
    return {"BLOCK_S": BLOCK_S, "BLOCK_D": BLOCK_D, "num_warps": num_warps}


def prepare_tile(BLOCK_D: int) -> dict[str, int]:
    return {"BLOCK_D": BLOCK_D, "BLOCK_N": LABEL_BLOCK, "BLOCK_B": 32, "num_warps": 4}


def padded(D: int) -> int:
    return max(16, next_power_of_2(D))


def precision(dtype: torch.dtype) -> str:
    """Of products: three products of tf32 parts make one of float32, unless PyTorch may use one."""
    if dtype == torch.float32:
        # The older allow_tf32 raises where the user has set fp32_precision; this follows both.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def _number(inv_temperature: Tensor, device: torch.device) -> tuple[Tensor | float, bool]:
    """1/t as kernels take it, and whether that is by address: nothing waits for the device."""
    if inv_temperature.device == device and device.type == "cuda":
        check("inv_temperature", inv_temperature, (), SCALAR_DTYPES, device)
        return inv_temperature, True
    check("inv_temperature", inv_temperature, (), SCALAR_DTYPES, torch.device("cpu"))
    return inv_temperature.item(), False


def check(
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
