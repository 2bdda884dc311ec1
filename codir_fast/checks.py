"""Checks of arguments at the public door: one line that names the argument, what was expected and
what came.
"""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_number(value: Any) -> Any:
    """A number of another library, numpy's say, as Python has it; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_count(name: str, value: Any) -> int:
    """`value` as Python has it."""
    value = as_number(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
    if value >= 1 << 63:
        raise ValueError(f"`{name}` must be below 2^63, got {value}")
    return value


def check_number(name: str, value: Any) -> float:
    """`value` as Python has it."""
    value = as_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    return value


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        # What is no string may be long: a list, a tensor.
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {got}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a Tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"`{name}` must be a dense Tensor, got a {layout} one")


def check_float_dtype(name: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`{name}` must be a torch.dtype, got {type(dtype).__name__}")
    if dtype not in FLOATS:
        names = "float32, float64, bfloat16 or float16"
        raise TypeError(f"`{name}` must be {names}, got {_dtype_name(dtype)}")


def check_integers(name: str, value: Any, shape: str, length: int) -> None:
    """A tensor (length,) of integers; `shape` says it in the reader's letters, as "(B,) with
    B=32".
    """
    check_tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"`{name}` must be of an integer dtype, got {_dtype_name(value.dtype)}")
    if value.shape != (length,):
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(value.shape)}")


def check_device(name: str, value: Tensor, device: torch.device, whose: str) -> None:
    if value.device != device:
        raise ValueError(f"`{name}` must be on the device of {whose}, {device}, got {value.device}")


def check_same_dtype(name: str, value: Tensor, dtype: torch.dtype, whose: str) -> None:
    if value.dtype != dtype:
        raise ValueError(
            f"`{name}` must have the dtype of {whose}, {_dtype_name(dtype)}, "
            f"got {_dtype_name(value.dtype)}"
        )


def has_values(tensor: Tensor) -> bool:
    """Whether it is more than a shape: neither on meta nor fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_readable(tensor: Tensor) -> bool:
    """Whether looking at its values costs nothing: not on a GPU, not while compiling or under
    vmap.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or not has_values(tensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def check_index(name: str, index: Tensor, low: int, high: int) -> None:
    """Values in [low, high), where they can be read."""
    if index.numel() == 0 or not is_readable(index):
        return
    smallest, largest = (int(value) for value in index.aminmax())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"`{name}` must be in [{low}, {high}), got {wrong}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
