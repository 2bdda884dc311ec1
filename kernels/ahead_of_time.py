"""Compiles Triton kernels for a GPU that need not be there, and reads what the compiler made of
them.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
# Matrix instructions of sm_80 (sm_89 and sm_120 too), sm_90 and sm_100, waits for those of sm_90,
# local loads and stores.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "WARPGROUP.DEPBAR", "UTMALDG", "LDL", "STL")


@dataclass(frozen=True)
class Type:
    """Of a parameter: "i32", "fp32", "*bf16", "tensordesc<bf16[64, 128]>"; `divisible` by 16, as
    addresses that an allocator gives are.
    """

    name: str
    divisible: bool = False


def pointer(dtype: torch.dtype) -> Type:
    return Type(f"*{TYPES[dtype]}", divisible=True)


def descriptor(dtype: torch.dtype, rows: int, columns: int) -> Type:
    return Type(f"tensordesc<{TYPES[dtype]}[{rows}, {columns}]>")


@dataclass(frozen=True)
class Built:
    """Registers, local memory (stack) and spills a thread in bytes, shared memory a program in
    bytes, how often each of INSTRUCTIONS occurs, how many local loads and stores are in loops, and
    the machine code.
    """

    registers: int
    stack: int
    shared: int
    counts: dict[str, int]
    local_in_loops: int
    sass: str
    cubin: bytes


def build(kernel: JITFunction, arch: int, arguments: dict[str, Any], **options: int) -> Built:
    """Compiles `kernel` for sm_`arch`. `arguments` gives each parameter a Type (or a tuple of them)
    or the value of a constant; `options`: num_warps, num_stages.
    """
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, Type):
            types[name] = value.name
            if value.divisible:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            types[name] = tuple(part.name for part in value)
            for n, part in enumerate(value):
                if part.divisible:
                    attributes[(position, n)] = [["tt.divisibility", 16]]
        else:
            types[name] = "constexpr"
            constants[(position,)] = value
    source = ASTSource(kernel, types, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = built.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (_cuobjdump(option, file) for option in ("-res-usage", "-sass"))
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in INSTRUCTIONS}
    shared, in_loops = built.metadata.shared, local_in_loops(sass)
    return Built(int(registers), int(stack), shared, counts, in_loops, sass, cubin)


def local_in_loops(sass: str) -> int:
    """Loads and stores of local memory between a branch and where it goes back to."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.MULTILINE)
    ]
    back = [
        (int(target, 16), address)
        for address, text in code
        for target in re.findall(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if int(target, 16) < address  # a branch to itself ends the code
    ]
    return sum(
        any(begin <= address <= end for begin, end in back)
        for address, text in code
        if re.search(r"\b(LDL|STL)\b", text)
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(CUOBJDUMP), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
