"""Which implementation of an operator runs: the one place where that is decided.

"torch" is Python on any device, streamed; "cpu" the C++ kernels of codir_fast._C; "triton" the
Triton kernels; "cuda" the hand-written ones, CUDA C++ in codir_fast._C. What can't run here says
why; nothing falls back silently.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from codir_fast import _C
from codir_fast.bank_facts import Rows
from codir_fast.checks import check_choice

OPS = ("masked_pool", "bank_contrast", "indexed_contrast", "bank_update")
NAMES = ("torch", "cpu", "triton", "cuda")
_OPS_OF: dict[str, tuple[str, ...]] = {
    "torch": OPS,
    "cpu": (*OPS, "in_batch_contrast"),  # others take bank_contrast in each direction
    "triton": (*OPS, "in_batch_contrast"),
    "cuda": ("masked_pool", "bank_contrast"),
}

# What "auto" takes: (device type, operator) -> backends in order, of which the first that can run
# there is taken: Triton has no float64 but in masked_pool, and embeddings of up to 4096 columns,
# the C++ kernels no float8 banks. What isn't here runs "torch". The rows of the CPU are compared
# with float64 there, in every test run. Those of CUDA, sm_80 and newer, stand on Triton's
# interpreter, on what the compiler makes of the kernels (make static-gpu), and on runs on an H200.
# Hand-written kernels ("cuda") come first only where _is_shown has it; torch.compile, which can't
# see that, takes Triton's.
AUTO = {
    **{("cpu", op): ("cpu", "torch") for op in OPS},
    **{("cuda", op): ("triton", "torch") for op in OPS},
    **{("cuda", op): ("cuda", "triton", "torch") for op in ("masked_pool", "bank_contrast")},
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


def resolve(op: str, backend: str, tensor: torch.Tensor, rows: Rows = Rows()) -> str:  # noqa: B008 (immutable)
    """The backend that runs `op` on tensors like this one (its device, dtype, and last size as the
    width of an embedding) and such rows of a bank: `backend` itself, or what AUTO says.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the backend was named and can't run `op` here.
    """
    check_choice("backend", backend, ("auto", *NAMES))
    inputs = _Inputs(tensor.device, tensor.dtype, tensor.shape[-1])
    is_known = backend == "auto" or inputs.device.type == "cuda"
    if not is_known or torch.compiler.is_compiling() or not isinstance(inputs.dim, int):
        return _decide(op, backend, inputs, rows)
    return _remembered(op, backend, inputs, rows)


def runs_triton(backend: str, tensor: torch.Tensor) -> bool:
    """Whether Triton does what is to be done beside a contrastive operator by this backend, on rows
    like this tensor: for its own kernels and for the hand-written ones, on a GPU.
    """
    if tensor.device.type != "cuda":
        return False
    name = resolve("bank_contrast", backend, tensor)
    return name == "triton" or (name == "cuda" and has_triton())


def in_batch_backend(backend: str, tensor: torch.Tensor, symmetric: bool) -> str | None:
    """Who runs in_batch_contrast on queries like this tensor; None where bank_contrast in each
    direction serves better, or the backend has no more than that.
    """
    name = resolve("bank_contrast", backend, tensor)
    if name == "cuda" and backend == "auto" and has_triton():
        name = "triton"
    if "in_batch_contrast" not in _OPS_OF[name]:
        return None
    return name if name != "triton" or symmetric or _is_small_in_batch(tensor) else None


def _is_small_in_batch(tensor: torch.Tensor) -> bool:
    """Whether what Triton's in_batch_contrast computes beyond bank_contrast, one way, takes less
    time than the launches that it saves. Both ways it computes less.
    """
    B, D = tensor.shape
    if not (isinstance(B, int) and isinstance(D, int)):  # torch.compile would keep to one answer
        return False
    # 2 B^2 D operations for each 256 columns, which at 400 TFLOP/s are 20 us; float32's take three
    # products of half the rate or less.
    operations = 2 * B * B * D * -(-D // 256)
    return operations <= (1 << 33 if tensor.dtype != torch.float32 else 1 << 30)


class _Inputs(NamedTuple):
    """What matters of them: where they are, and the width of an embedding."""

    device: torch.device
    dtype: torch.dtype
    dim: int


def _decide(op: str, backend: str, inputs: _Inputs, rows: Rows) -> str:
    if backend == "auto":
        choices = AUTO.get((inputs.device.type, op), ("torch",))
        if "cuda" in choices and not _is_shown(op, inputs, rows):
            choices = choices[1:]
        if len(choices) == 1:
            return choices[0]
        return next(name for name in choices if not _why_not(op, name, inputs, rows))
    reason = _why_not(op, backend, inputs, rows)
    if reason:
        able = [name for name in NAMES if not _why_not(op, name, inputs, rows)]
        where = f"{op} on {inputs.device}"
        raise RuntimeError(
            f"backend {backend!r} can't run {where}: {reason}; backends that can: {able}"
        )
    return backend


# A loss asks at each call, and a GPU stays what it is as long as the process.
_remembered = functools.lru_cache(maxsize=4096)(_decide)


def _is_shown(op: str, inputs: _Inputs, rows: Rows) -> bool:
    """Whether benchmarks/results shows the hand-written kernel of such a call right and faster than
    Triton's on an H200: masks, NCE and wide rows on the device alone (h200-backends), the others by
    the step around it (h200), most of which is Python; on the device they are within 0.8 and 1.2.
    """
    if _compute_capability(inputs.device) != (9, 0) or inputs.dtype not in _CUDA_DTYPES:
        return False
    is_bfloat16 = inputs.dtype == torch.bfloat16
    if op == "masked_pool":
        return is_bfloat16
    return rows.masked or (rows.warm and (is_bfloat16 or inputs.dim > 256))


def _why_not(op: str, backend: str, inputs: _Inputs, rows: Rows) -> str:
    """Empty when the backend can run the operator on such inputs."""
    device_type = inputs.device.type
    if op not in _OPS_OF[backend]:
        return f"it has no {op}"
    if backend == "cpu":
        if rows.dtype == torch.float8_e4m3fn:
            return "it has no float8 banks"
        return "" if device_type == "cpu" else "it needs tensors on the CPU"
    if backend == "triton" and op != "masked_pool":
        if inputs.dtype == torch.float64:
            return "it has no float64"
        if inputs.dim > _TRITON_MAX_DIM:
            return f"D is {inputs.dim}, it takes up to {_TRITON_MAX_DIM}"
        is_float8 = rows.dtype == torch.float8_e4m3fn
        if is_float8 and _compute_capability(inputs.device) < (8, 9):
            return "a float8 bank needs sm_89 or newer"
    if backend == "cuda" and op == "bank_contrast":
        reason = _why_not_cuda_bank_contrast(inputs, rows)
        if reason:
            return reason
    if torch.compiler.is_compiling():  # the rest can't be traced: the operator itself will say it
        return ""
    if backend == "torch":
        return ""
    if backend == "triton" and has_triton() and _triton_interprets():
        return ""
    reason = _what_is_missing(backend) or _why_no_gpu()
    if reason:
        return reason
    if device_type != "cuda":
        return "it needs tensors on a CUDA GPU"
    capability = _compute_capability(inputs.device)
    if capability < (8, 0):
        return _too_old(capability)
    if backend == "cuda" and op == "bank_contrast" and capability != (9, 0):
        return "it needs a Hopper GPU, sm_90"
    return ""


def _why_not_cuda_bank_contrast(inputs: _Inputs, rows: Rows) -> str:
    """What it lacks for tensors like these, on whatever machine."""
    if inputs.dtype not in _CUDA_DTYPES:
        return f"it takes bfloat16 and float16, `query` is {inputs.dtype}"
    if rows.dtype not in (None, inputs.dtype):
        return f"`query` is {inputs.dtype} and the bank {rows.dtype}: it needs one dtype"
    if rows.scaled:
        return (
            "it takes negatives as they are: keep them in a bank, or normalise them and `query` "
            "beforehand and pass normalize=False"
        )
    if not rows.aligned:
        return "`bank` must begin at a multiple of 16 bytes"
    D = inputs.dim
    if D > _CUDA_MAX_DIM or D % 8 != 0:
        return f"D is {D}, it takes multiples of 8 up to {_CUDA_MAX_DIM}"
    return ""


def _availability(backend: str) -> tuple[bool, str]:
    if backend == "torch":
        return True, "PyTorch on any device"
    if backend == "cpu":
        return True, f"C++, {_C.cpu_isa()} code in use"
    if backend == "triton" and has_triton() and _triton_interprets():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): slow, for tests"
    reason = _what_is_missing(backend) or _why_no_gpu()
    if reason:
        return False, reason
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return False, _too_old(capability)
    where = f"{torch.cuda.get_device_name()}, {_sm(capability)}"
    if backend == "triton":
        return True, f"Triton on {where}"
    contrast = "" if capability == (9, 0) else "; bank_contrast needs sm_90"
    return True, f"hand-written CUDA on {where}{contrast}"


def _what_is_missing(backend: str) -> str:
    """Whatever the GPU; empty if nothing."""
    if backend == "cuda" and not _built_with_cuda():
        return (
            "this build of codir_fast has no CUDA part: made without nvcc or with CODIR_FAST_CUDA=0"
        )
    return "the triton package is not installed" if backend == "triton" and not has_triton() else ""


# What is asked at each call of a loss is asked of the driver once.
@functools.cache
def _built_with_cuda() -> bool:
    return _C.build_info()["cuda"]  # which asks the driver for all that it knows of each GPU


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_gpu() -> str:
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"


def _too_old(capability: tuple[int, int]) -> str:
    return f"the GPU is {_sm(capability)}, the kernels need sm_80 or newer"


def _sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def _compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; nothing is too old for Triton's interpreter, or known while compiling."""
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return (99, 0)
    return _capability_of(device)
