"""masked_pool's Triton kernels without a GPU: run by the interpreter, and compiled for three of
them.
"""

import importlib.util
import platform
import sys

import pytest
import torch
import triton_interpreter

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="Triton's compiler and interpreter come for x86-64 Linux",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the triton package is not installed"
    ),
]
ARCHITECTURES = (80, 90, 100)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
CASES = [
    ("mean", torch.bfloat16, "i64"),
    ("mean", torch.float64, None),
    ("max", torch.float16, "u8"),
    ("max", torch.float64, "i64"),
    ("last", torch.float32, "i64"),
]


def test_interpreted():
    triton_interpreter.run_tests("test_interpreted_masked_pool.py")


def compiled(kernel, arch, mode, dtype, mask, folder):
    from codir_fast.kernels import tiles
    from triton_sass import compile_kernel

    table = tiles.MASKED_POOL
    tile = table[max(row for row in table if row <= arch)][dtype]._asdict()
    states = f"*{TYPES[dtype]}:16"
    arguments = {
        "pooled_ptr": states,
        "dhidden_ptrs": "*i64:16",
        "grad_ptr": states,
        "argmax_ptr": "*i64:16",
        "layer_ptrs": "*i64:16",
        "mask_ptr": mask and f"*{mask}:16",
        "T": "i32",
        "H": "i32:16",
        "stride_b": "i32:16",
        "stride_t": "i32:16",
        "stride_mb": "i32",
        "stride_mt": 1,
        "MODE": mode,
        "HAS_MASK": mask is not None,
        "ALIGNED": True,
    }
    return compile_kernel(kernel, arch, {**arguments, **tile}, folder, num_warps=tile["num_warps"])


@pytest.mark.parametrize(("mode", "dtype", "mask"), CASES, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled(arch, mode, dtype, mask, tmp_path):
    from codir_fast.kernels import masked_pool as module

    for kernel in (module.masked_pool_kernel, module.masked_pool_backward_kernel):
        sass = compiled(kernel, arch, mode, dtype, mask, tmp_path)
        assert sass.stack == sass.count("LDL") == sass.count("STL") == 0
        assert sass.registers <= 128  # at least four programs of 128 threads on an SM
        if kernel is module.masked_pool_backward_kernel:
            assert sass.count("STG.E.128") > 0
        elif mode in ("mean", "max"):
            assert sass.count("LDG.E.128") > 0
