"""Which implementation of an operator runs: the one place where that is decided.

"torch" is Python on any device, streamed; "cpu" the C++ kernels of codir_fast._C; "triton" the
Triton kernels; "cuda" the hand-written ones, CUDA C++ in codir_fast._C. What can't run here says
why; nothing falls back silently.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from codir_fast import _C
from codir_fast.checks import check_choice

OPS = ("masked_pool", "bank_contrast", "indexed_contrast", "bank_update")
NAMES = ("torch", "cpu", "triton", "cuda")
_OPS_OF: dict[str, tuple[str, ...]] = {
    "torch": OPS,
    "cpu": OPS,
    "triton": OPS,
    "cuda": ("masked_pool", "bank_contrast"),
}

# What "auto" takes: (device type, operator) -> backends in order, of which the first that can run
# there is taken: Triton has no float64 but in masked_pool, and embeddings of up to 4096 columns,
# the C++ kernels no float8 banks. What isn't here runs "torch". The rows of the CPU are compared
# with float64 there, in every test run. Those of CUDA, sm_80 and newer, stand on Triton's
# interpreter and on what the compiler makes of the kernels (make static-gpu): no row of it has been
# seen on a GPU yet. Hand-written kernels ("cuda") come in once a committed result file shows them
# right and faster than Triton's on the hardware that a row names; until then they run by name.
AUTO = {
    **{("cpu", op): ("cpu", "torch") for op in OPS},
    **{("cuda", op): ("triton", "torch") for op in OPS},
}
_TRITON_MAX_DIM = 4096
_CUDA_MAX_DIM = 512
_CUDA_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, why (or why not), and the operators it has."""

    available: bool
    reason: str
    ops: tuple[str, ...]


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and the reason.

    Example:
        >>> codir_fast.backends()["triton"].reason
        'torch sees no CUDA GPU'
    """
    status = {}
    for name in NAMES:
        available, reason = _availability(name)
        status[name] = BackendStatus(available, reason, _OPS_OF[name])
    return status


def resolve(
    op: str, backend: str, inputs: torch.Tensor, bank_dtype: torch.dtype | None = None
) -> str:
    """The backend that runs `op` on tensors like `inputs` (its device, dtype, and last size as the
    width of an embedding) and a bank of `bank_dtype`: `backend` itself, or what AUTO says.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the backend was named and can't run `op` here.
    """
    check_choice("backend", backend, ("auto", *NAMES))
    if backend == "auto":
        choices = AUTO.get((inputs.device.type, op), ("torch",))
        if len(choices) == 1:
            return choices[0]
        return next(name for name in choices if not _why_not(op, name, inputs, bank_dtype))
    reason = _why_not(op, backend, inputs, bank_dtype)
    if reason:
        able = [name for name in NAMES if not _why_not(op, name, inputs, bank_dtype)]
        where = f"{op} on {inputs.device}"
        raise RuntimeError(
            f"backend {backend!r} can't run {where}: {reason}; backends that can: {able}"
        )
    return backend


def _why_not(op: str, backend: str, inputs: torch.Tensor, bank_dtype: torch.dtype | None) -> str:
    """Empty when the backend can run the operator on such inputs."""
    device_type = inputs.device.type
    if op not in _OPS_OF[backend]:
        return f"it has no {op}"
    if backend == "cpu":
        if bank_dtype == torch.float8_e4m3fn:
            return "it has no float8 banks"
        return "" if device_type == "cpu" else "it needs tensors on the CPU"
    if backend == "triton" and op != "masked_pool":
        if inputs.dtype == torch.float64:
            return "it has no float64"
        if inputs.shape[-1] > _TRITON_MAX_DIM:
            return f"D is {inputs.shape[-1]}, it takes up to {_TRITON_MAX_DIM}"
        if bank_dtype == torch.float8_e4m3fn and _compute_capability(device_type) < (8, 9):
            return "a float8 bank needs sm_89 or newer"
    if backend == "cuda" and op == "bank_contrast":
        reason = _why_not_cuda_bank_contrast(inputs, bank_dtype)
        if reason:
            return reason
    if torch.compiler.is_compiling():  # the rest can't be traced: the operator itself will say it
        return ""
    available, reason = _availability(backend)
    if not available:
        return reason
    if backend == "cuda" and device_type != "cuda":
        return "it needs tensors on a CUDA GPU"
    if backend == "cuda" and op == "bank_contrast" and _compute_capability(device_type) != (9, 0):
        return "it needs a Hopper GPU, sm_90"
    if backend == "triton" and device_type != "cuda" and not _triton_interprets():
        return "it needs tensors on a CUDA GPU"
    return ""


def _why_not_cuda_bank_contrast(inputs: torch.Tensor, bank_dtype: torch.dtype | None) -> str:
    """What it lacks for tensors like these, on whatever machine."""
    if inputs.dtype not in _CUDA_DTYPES:
        return f"it takes bfloat16 and float16, `query` is {inputs.dtype}"
    if bank_dtype not in (None, inputs.dtype):
        return f"`query` is {inputs.dtype} and the bank {bank_dtype}: it needs one dtype"
    D = inputs.shape[-1]
    if D > _CUDA_MAX_DIM or D % 8 != 0:
        return f"D is {D}, it takes multiples of 8 up to {_CUDA_MAX_DIM}"
    return ""


def _availability(backend: str) -> tuple[bool, str]:
    if backend == "torch":
        return True, "PyTorch on any device"
    if backend == "cpu":
        return True, f"C++, {_C.cpu_isa()} code in use"
    return _cuda_availability() if backend == "cuda" else _triton_availability()


def _cuda_availability() -> tuple[bool, str]:
    if not _built_with_cuda():
        return False, "this build of codir_fast has no CUDA part: nvcc was not found"
    reason = _why_no_gpu()
    if reason:
        return False, reason
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    on_hopper = (major, minor) == (9, 0)
    contrast = "" if on_hopper else "; bank_contrast needs sm_90"
    return True, f"hand-written CUDA on {name}, sm_{major}{minor}{contrast}; not timed on a GPU yet"


@functools.cache
def _built_with_cuda() -> bool:
    return _C.build_info()["cuda"]  # which asks the driver for all that it knows of each GPU


def _why_no_gpu() -> str:
    """Empty where torch has a GPU that is new enough for the kernels."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"


def _compute_capability(device_type: str) -> tuple[int, int]:
    """Of the GPU; nothing is too old for Triton's interpreter, or known while compiling."""
    if device_type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return (99, 0)
    return torch.cuda.get_device_capability()


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_availability() -> tuple[bool, str]:
    if not _has_triton():
        return False, "the triton package is not installed"
    if _triton_interprets():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): slow, for tests"
    reason = _why_no_gpu()
    if reason:
        return False, reason
    major, minor = torch.cuda.get_device_capability()
    return True, f"Triton on {torch.cuda.get_device_name()}, sm_{major}{minor}"
