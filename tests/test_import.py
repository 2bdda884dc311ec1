"""`import codir_fast`: light, quick, and clear when the compiled part is missing."""

import subprocess
import sys

import pytest

import codir_fast


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_heavy_packages_stay_out():
    heavy = "triton transformers datasets accelerate matplotlib torch._dynamo torch._inductor"
    code = "import sys, torch; had = set(sys.modules); import codir_fast; "
    code += f"print([name for name in {heavy.split()} if name in sys.modules and name not in had])"
    assert run(code).strip() == "[]"


def test_import_takes_less_than_0_3_s():
    code = "import time, torch; start = time.perf_counter(); import codir_fast; "
    code += "print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(4)) < 0.3


def test_public_names():
    lazy = {"DistillationConfig", "DistillationModel", "DistillationTrainer"}
    for name in codir_fast.__all__:
        if name not in lazy:
            assert getattr(codir_fast, name) is not None
    assert lazy <= set(dir(codir_fast))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = codir_fast.Nothing


def test_version_matches_the_binary():
    from codir_fast import _C

    assert _C.build_info()["version"] == codir_fast.__version__


def test_missing_binary_says_how_to_build():
    code = (
        "import sys; sys.modules['codir_fast._C'] = None\n"
        "try:\n    import codir_fast\n"
        "except ImportError as error:\n    print(error)"
    )
    assert "pip install --no-build-isolation ." in run(code)


def test_a_bad_instruction_set_is_no_matter_of_building():
    code = (
        "import os; os.environ['CODIR_FAST_CPU_ISA'] = 'plain'\n"
        "try:\n    import codir_fast\n"
        "except ImportError as error:\n    print(error)"
    )
    expected = "codir_fast: CODIR_FAST_CPU_ISA must be baseline, avx2 or avx512, got 'plain'\n"
    assert run(code) == expected
