"""Build of codir_fast: setuptools for the package, CMake and Ninja for the extension.

Environment variables: CODIR_FAST_CUDA=0|1 leaves the CUDA part out or insists on it (default: built
when nvcc is found), CODIR_FAST_BUILD_TYPE (Release), MAX_JOBS (parallel compilations).
"""

import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "codir_fast" / "version.py"))["__version__"]
CUDA_CHOICES = {"": "AUTO", "0": "OFF", "1": "ON"}


def find_tool(name: str, bin_dir: str) -> str:
    """The program of the pip package (whose module says where: `bin_dir`), else the one on PATH."""
    if importlib.util.find_spec(name) is not None:
        return str(Path(getattr(importlib.import_module(name), bin_dir)) / name)
    found = shutil.which(name)
    if found is None:
        sys.exit(
            f"codir_fast: {name} is needed for the build and was not found; pip install {name}"
        )
    return found


def cuda_choice() -> str:
    value = os.environ.get("CODIR_FAST_CUDA", "")
    if value not in CUDA_CHOICES:
        sys.exit(f"codir_fast: CODIR_FAST_CUDA must be 0 or 1, got {value!r}")
    return CUDA_CHOICES[value]


class CMakeBuild(build_ext):
    """Runs CMake and Ninja for the one extension, into the place that setuptools expects."""

    def build_extension(self, ext: Extension) -> None:
        for package in ("torch", "pybind11"):
            if importlib.util.find_spec(package) is None:
                sys.exit(
                    f"codir_fast: {package} must be installed for the build, and is not; "
                    f"pip install it, or leave out --no-build-isolation"
                )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CODIR_FAST_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCODIR_FAST_VERSION={VERSION}",
            f"-DCODIR_FAST_CUDA={cuda_choice()}",
            f"-DCODIR_FAST_OUTPUT={target}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "-j", jobs], check=True)


setup(
    packages=[
        "codir_fast",
        "codir_fast.benchmarks",
        "codir_fast.benchmarks.peers",
        "codir_fast.compat",
        "codir_fast.distillation",
        "codir_fast.distillation.report",
        "codir_fast.ops",
        "codir_fast.kernels",
    ],
    package_dir={"codir_fast.kernels": "kernels", "codir_fast.benchmarks": "benchmarks"},
    package_data={"codir_fast": ["py.typed"]},
    include_package_data=False,  # results are for readers of the source
    ext_modules=[Extension("codir_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
