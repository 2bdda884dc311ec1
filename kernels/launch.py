"""Launches of Triton kernels with little Python: what Triton finds out about the arguments each
time, which of its compiled kernels they need, is remembered.
"""

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

_MOST = 4096  # launches remembered: each costs a few hundred bytes
_COMPILED: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants). `constants` are the kernel's tl.constexpr, which it
    declares after all `arguments`, and options of the compiler. The first argument is a tensor, or
    a tuple of them, on the current device.

    What Triton's knobs say of debugging and instrumentation holds from a kernel's first launch on.
    """
    first = arguments[0]
    device = (first[0] if isinstance(first, tuple) else first).get_device()
    key = (id(kernel), device, *constants.items(), *map(_kind, arguments))
    known = _COMPILED.get(key)
    if known is None or kernel.pre_run_hooks:
        compiled = kernel[grid](*arguments, **constants)
        if isinstance(compiled, CompiledKernel):  # None in the interpreter
            if len(_COMPILED) >= _MOST:
                _COMPILED.clear()
            names = kernel.arg_names[len(arguments) :]
            _COMPILED[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, rest = known
    compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def _kind(argument: Any) -> Any:
    """What Triton compiles for: types, and whether an address or a number is a multiple of 16."""
    cls = type(argument)
    if cls is int:
        return argument == 1, argument % 16 == 0, argument >= 1 << 31
    if cls is TensorDescriptor:
        return argument.base.dtype, *argument.block_shape
    if cls is tuple:
        return tuple(map(_kind, argument))
    if cls is Tensor or isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return cls


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, and its next_power_of_2, take 20 times as long."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, for n from 1 on."""
    return 1 << (n - 1).bit_length()


def forget() -> None:
    """Every launch: where Triton was given another driver."""
    _COMPILED.clear()
