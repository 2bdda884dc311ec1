"""What the build asks of torch: headers of the oldest version that the binary is made for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Of torch's headers, what came after 2.11: used without a check, it would need them to build.
NEWER = ("STABLE_TORCH_ERROR_CODE_CHECK",)


def test_nothing_is_named_that_torch_2_11_lacks():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 20
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not [name for name in NEWER if name in text], path.name


@pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("ninja", path=Path(sys.executable).parent)),
    reason="configures the build: needs a C++ compiler, cmake and ninja",
)
def test_pybind11_is_not_the_one_among_the_headers_of_torch(tmp_path):
    """Torch 2.11's stops the compiler where the stable ABI is asked for."""
    tools = Path(sys.executable).parent
    command = [tools / "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path]
    options = {
        "CMAKE_MAKE_PROGRAM": tools / "ninja",
        "Python_EXECUTABLE": sys.executable,
        "CODIR_FAST_CUDA": "OFF",
    }
    command += [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(command, check=True, capture_output=True)
    entries = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    (module,) = (entry["command"] for entry in entries if entry["file"].endswith("module.cpp"))
    words = module.split()
    searched = [words[n + 1] for n, word in enumerate(words) if word == "-isystem"]
    first = next(n for n, folder in enumerate(searched) if folder.endswith("torch/include"))
    assert pybind11.get_include() in searched[:first]
