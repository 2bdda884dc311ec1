"""bank_contrast's Triton kernels without a GPU: run by the interpreter, and compiled for three of
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
TYPES = {torch.float32: "fp32", torch.float64: "fp64"}
CASES = [
    (torch.float32, "fp16", 64, False),
    (torch.float32, "bf16", 128, True),
    (torch.float32, "fp32", 256, False),
    (torch.float64, "fp64", 256, True),
]


def test_interpreted():
    triton_interpreter.run_tests("test_interpreted_bank_contrast.py")


def arguments(arch, dtype, bank_dtype, D, masked):
    """Types and constants of all parameters of the three kernels; `masked`: every option in use."""
    from codir_fast.kernels import bank_contrast, tiles

    table = tiles.BANK_CONTRAST
    by_size = table[max(row for row in table if row <= arch)][dtype]
    tile = by_size[min(size for size in by_size if size >= D)]._asdict()
    arrays = "maximum total rows query positive inv_temperature loss lse dquery dpositive grad"
    types = {f"{name}_ptr": f"*{TYPES[dtype]}:16" for name in arrays.split()}
    types["lse_ptr"] = "*fp64:16"
    types["dinv_temperature_ptr"] = types["loss_ptr"]
    types["bank_ptr"] = types["dbank_ptr"] = f"*{bank_dtype}:16"
    types["scale_ptr"] = types["loss_ptr"] if masked else None
    for name in ("labels", "bank_labels", "exclude"):
        types[f"{name}_ptr"] = "*i64:16" if masked else None
    types["valid_ptr"] = "*u8:16" if masked else None
    types["nce_ptr"] = types["loss_ptr"] if masked else None
    sizes = {"B": "i32", "K": "i32", "D": "i32:16", "rows_per_split": "i32", "splits": "i32"}
    flags = dict.fromkeys(("HAS_SCALE", "HAS_LABELS", "HAS_EXCLUDE", "HAS_VALID", "NCE"), masked)
    precision = {"PRECISION": bank_contrast.PRECISION[dtype]}
    blocks = {"BLOCK_D": D, "BLOCK_S": tiles.COMBINED_SPLITS}
    return {**types, **sizes, **flags, **precision, **tile, **blocks}


@pytest.mark.parametrize(("dtype", "bank_dtype", "D", "masked"), CASES, ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled(arch, dtype, bank_dtype, D, masked, tmp_path):
    from codir_fast.kernels import bank_contrast as module
    from triton_sass import compile_kernel

    given = arguments(arch, dtype, bank_dtype, D, masked)
    options = {name: given[name] for name in ("num_warps", "num_stages")}
    for kernel in (module.bank_contrast_kernel, module.bank_contrast_backward_kernel):
        sass = compile_kernel(kernel, arch, given, tmp_path, **options)
        assert sass.stack == sass.count("LDL") == sass.count("STL") == 0
        matrix_instructions = sass.text.count("HMMA")
        assert matrix_instructions > 0 if dtype == torch.float32 else matrix_instructions == 0
    combine = compile_kernel(module.bank_contrast_combine_kernel, arch, given, tmp_path)
    assert combine.stack == combine.count("LDL") == combine.count("STL") == 0
