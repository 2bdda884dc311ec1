"""What the compiler makes of a Triton kernel for a GPU that need not be there."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPE = re.compile(r"\*?(i|u|fp|bf)\d+(:16)?")


@dataclass(frozen=True)
class Sass:
    """Registers a thread, bytes of local memory a thread, and the machine code."""

    registers: int
    stack: int
    text: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.text))


def compile_kernel(
    kernel: JITFunction,
    arch: int,
    arguments: dict[str, Any],
    folder: Path,
    **options: int,
) -> Sass:
    """Compiles for sm_`arch`, with nothing but files in `folder` and Triton's cache written.

    `arguments` gives each parameter a type ("*fp32", "i32"; with ":16" where it is a multiple of
    16, as an allocation is) or the value of a constant.
    """
    types, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        is_type = isinstance(value, str) and TYPE.fullmatch(value)
        types[name] = value.removesuffix(":16") if is_type else "constexpr"
        if not is_type:
            constants[(position,)] = value
        elif value.endswith(":16"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage = _cuobjdump("-res-usage", cubin)
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return Sass(int(registers), int(stack), _cuobjdump("-sass", cubin))


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [str(CUOBJDUMP), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
