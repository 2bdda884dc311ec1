"""bank_update: momentum, renormalisation and scatter into a memory bank, in place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.backend import resolve
from codir_fast.checks import has_values
from codir_fast.ops import registration
from codir_fast.ops.contrast import compute_dtype


def bank_update(
    bank: Tensor,
    index: Tensor,
    keys: Tensor,
    momentum: float,
    filled: Tensor | None = None,
    *,
    backend: str,
) -> None:
    """b_r <- normalise(m * b_r + (1 - m) * key_n) for each n in order, r = index[n]; filled[r] <-
    true.

    m is `momentum`, or 0 where `filled` is given and false at r. Changes `bank` and `filled`; no
    gradient passes.
    """
    op = _OPS[resolve("bank_update", backend, bank)]
    with torch.no_grad():
        keys = keys.detach().to(compute_dtype(bank.dtype)).contiguous()
        if _may_be_rows_of(bank, keys):
            keys = keys.clone()
        op(bank, index, keys, momentum, filled)


def _may_be_rows_of(bank: Tensor, keys: Tensor) -> bool:
    if torch.compiler.is_compiling() or registration.under_functorch() or not has_values(bank):
        return False
    return keys.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr()


def _torch(
    bank: Tensor, index: Tensor, keys: Tensor, momentum: float, filled: Tensor | None = None
) -> None:
    if index.numel() == 0:
        return
    _check_range(bank, index)
    if momentum == 0:
        _write_last(bank, index, keys)
    else:
        _mix_in_order(bank, index, keys, momentum, filled)
    if filled is not None:
        filled.index_fill_(0, index, True)  # `filled[index] = True` would wait for a GPU


def _check_range(bank: Tensor, index: Tensor) -> None:
    # Elsewhere than on the CPU, looking would wait for the device, whose own check catches a bad
    # index.
    if index.device.type == "cpu":
        wrong = index[(index < 0) | (index >= bank.shape[0])]
        if wrong.numel():
            raise RuntimeError(f"`index` must be in [0, {bank.shape[0]}), got {int(wrong[0])}")


def _write_last(bank: Tensor, index: Tensor, keys: Tensor) -> None:
    """Without momentum the last key of a row replaces all before it: no need to know which rows
    repeat.
    """
    position = torch.arange(index.numel(), device=index.device)
    last = index.new_zeros(bank.shape[0]).scatter_reduce_(0, index, position, "amax")
    bank[index] = F.normalize(keys, dim=1)[last[index]].to(bank.dtype)


def _mix_in_order(
    bank: Tensor, index: Tensor, keys: Tensor, momentum: float, filled: Tensor | None
) -> None:
    """Rows that repeat are applied one after the other: round n takes every row's n-th
    occurrence.
    """
    order = torch.argsort(index, stable=True)
    in_order = index[order]
    first = torch.searchsorted(in_order, in_order)
    occurrence = torch.arange(index.numel(), device=index.device) - first
    for n in range(int(occurrence.max()) + 1):
        batch = order[occurrence == n]
        rows, key = index[batch], keys[batch]
        mixed = momentum * bank[rows].to(keys.dtype) + (1 - momentum) * key
        if n == 0 and filled is not None:
            mixed = torch.where(filled[rows, None], mixed, key)
        bank[rows] = F.normalize(mixed, dim=1).to(bank.dtype)


def _triton(*inputs: Any) -> None:
    from codir_fast.kernels import bank_update as kernel  # Triton is loaded on first use

    kernel.bank_update(*inputs)


def _fake(
    bank: Tensor, index: Tensor, keys: Tensor, momentum: float, filled: Tensor | None = None
) -> None:
    return None


registration.add_python_backend("bank_update", "torch", _torch)
registration.add_python_backend("bank_update", "triton", _triton)
_OPS = {name: registration.overload("bank_update", name) for name in ("cpu", "torch", "triton")}
for _op in _OPS.values():
    registration.register_fake(_op, _fake)
    registration.register_mutation(_op, (0, 4))
