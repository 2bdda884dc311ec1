"""The host's side of bank_contrast and indexed_contrast: their arguments, checked, as kernels take
them, the launches before the pass and after it, and what all launchers check.
"""

import math
from typing import Any

import torch
from codir_fast.kernels.contrast import combine_kernel, prepare_kernel
from codir_fast.kernels.labels import LABEL_BLOCK, as_sought, is_sorted, label_blocks
from codir_fast.kernels.launch import launch, next_power_of_2
from torch import Tensor

MAX_DIM = 4096
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BANK_DTYPES = (*QUERY_DTYPES, torch.float8_e4m3fn)
SCALAR_DTYPES = (torch.float32, torch.float64)

NCE_EPS = 1e-7  # as in codir_fast.reference


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
        self.inv_temperature, on_device = number(inv_temperature, device)
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


def number(inv_temperature: Tensor, device: torch.device) -> tuple[Tensor | float, bool]:
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
