"""In place of a GPU and its driver: Triton specialises, compiles and launches as it does on sm_90,
up to the call that would hand the kernel to the hardware. What that is called with is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from codir_fast.kernels.launch import forget
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import make_launcher
from triton.runtime import JITFunction

SHARED_MEMORY = 227 << 10  # bytes a program may have on sm_90


class Launched(list[str]):
    """Names of kernels in the order of their launches; of each the compiled form, and its
    arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []


class _Launcher:
    def __init__(self, launched: Launched, source: Any, metadata: Any) -> None:
        names = source.fn.arg_names
        constants = {
            (names.index(key),) if isinstance(key, str) else key: value
            for key, value in source.constants.items()
        }
        # The C function that unpacks the arguments: its text only.
        make_launcher(constants, dict(source.signature), metadata.tensordesc_meta)
        assert metadata.global_scratch_size == 0  # would ask the user for an allocator
        self._launched, self._name = launched, metadata.name

    def __call__(self, *grid_and_arguments: Any) -> None:
        assert all(size > 0 for size in grid_and_arguments[:3])
        assert all(size < 1 << 16 for size in grid_and_arguments[1:3])
        self._launched.append(self._name)
        self._launched.calls.append((self, grid_and_arguments))


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


class _Driver:
    def __init__(self, launched: Launched) -> None:
        self.utils = _Utils()
        self.launcher_cls = lambda source, metadata: _Launcher(launched, source, metadata)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def sm_90(kernels: list[JITFunction]) -> Iterator[Launched]:
    """The launches of these kernels meanwhile."""
    launched = Launched()
    _forget(kernels)
    triton.runtime.driver.set_active(_Driver(launched))
    try:
        yield launched
    finally:
        triton.runtime.driver.set_active(None)  # what is there is found when it is asked for
        _forget(kernels)


def _forget(kernels: list[JITFunction]) -> None:
    forget()
    for kernel in kernels:
        kernel.device_caches.clear()
