"""What the choice of a backend asks of a bank's rows."""

from typing import NamedTuple

import torch

from codir_fast.checks import has_values, is_readable

_LARGEST_SHOWN = 43.3  # 1/t: beyond, the hand-written kernel follows the running maximum


class Rows(NamedTuple):
    """What matters of a bank's rows: their dtype (None: that of the queries), whether they come
    with factors, whether they count otherwise than all alike by InfoNCE, whether the temperature
    is known not to be low, and whether they begin where a copy engine can read.
    """

    dtype: torch.dtype | None = None
    scaled: bool = False
    masked: bool = False
    warm: bool = True
    aligned: bool = True


def rows_of(
    bank: torch.Tensor,
    scale: torch.Tensor | None,
    inv_temperature: torch.Tensor,
    *picks: torch.Tensor | None,
) -> Rows:
    """`picks`: what leaves rows out, and log Z of NCE."""
    if not bank.is_cuda or torch.compiler.is_compiling():  # which can't see the rest
        return Rows(bank.dtype, scale is not None)
    return Rows(
        bank.dtype,
        scale is not None,
        any(pick is not None for pick in picks),
        is_readable(inv_temperature) and inv_temperature.item() <= _LARGEST_SHOWN,
        _address(bank) % 16 == 0,
    )


def _address(tensor: torch.Tensor) -> int:
    """Where it begins; where that can't be known, counted from its allocation, which begins at more
    than the copy engine asks for.
    """
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if is_wrapped or not has_values(tensor):
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
