"""Triton's interpreter in the tests: kernels run on CPU tensors, one program after the other.

TRITON_INTERPRET=1 must be there when a kernel is defined, and holds for the whole process. So the
tests in tests/interpreter/ run in a process of their own, which `run_tests` starts and which calls
`install`; directly: TRITON_INTERPRET=1 pytest tests/interpreter
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "interpreter"


def run_tests(file: str) -> None:
    """Runs one file of tests/interpreter/; AssertionError with pytest's report where one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


def install() -> None:
    """Makes bfloat16 right in Triton 3.6's interpreter.

    It holds a bfloat16 as a 16-bit integer, multiplies these integers in tl.dot, makes one of a
    float64's value, and cuts float32 off where a GPU rounds to nearest.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, convert, dot = (
        getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")
    )

    def convert_bfloat16(source: TensorHandle, dtype: tl.dtype) -> TensorHandle | None:
        if (source.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle(_bfloat16_to_float32(source.data), tl.float32)
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64):
            return TensorHandle(_float_to_bfloat16(source.data), tl.bfloat16)
        return None

    def cast_impl(self, source, dtype):
        done = convert_bfloat16(source, dtype)
        return cast(self, source, dtype) if done is None else done

    def create_fp_to_fp(self, source, dtype, rounding):
        done = convert_bfloat16(source, dtype)
        return convert(self, source, dtype, rounding) if done is None else done

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (convert_bfloat16(operand, tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
