"""Contrastive learning against large banks of negatives, at the speed of the hardware."""

import importlib
from typing import Any

import torch  # noqa: F401  (loads the libraries that _C links against)

try:
    import codir_fast._C  # noqa: F401  (registers the C++ operators)
except ImportError as error:
    if "CODIR_FAST_CPU_ISA" in str(error):  # a setting that it refuses: it is built and there
        raise ImportError(f"codir_fast: {error}") from error
    raise ImportError(
        f"codir_fast: the compiled part codir_fast._C can't be loaded ({error}); build it with "
        "`pip install --no-build-isolation .` in the source folder (with -e to work on it)"
    ) from error

from codir_fast import distributed, functional
from codir_fast.backend import BackendStatus, backends
from codir_fast.losses import ContrastiveLoss
from codir_fast.memory_bank import IndexedBank, MemoryQueue
from codir_fast.pooling import pool_hidden_states
from codir_fast.projection import ProjectionHead
from codir_fast.sampling import sample_negatives
from codir_fast.version import __version__

# Loaded on first use, because they need transformers.
_DISTILLATION = (
    "DistillationConfig",
    "DistillationModel",
    "DistillationTrainer",
    "PretrainingConfig",
    "PretrainingModel",
    "PretrainingTrainer",
)

__all__ = [
    "BackendStatus",
    "ContrastiveLoss",
    "DistillationConfig",
    "DistillationModel",
    "DistillationTrainer",
    "IndexedBank",
    "MemoryQueue",
    "PretrainingConfig",
    "PretrainingModel",
    "PretrainingTrainer",
    "ProjectionHead",
    "__version__",
    "backends",
    "compat",
    "distributed",
    "functional",
    "pool_hidden_states",
    "sample_negatives",
]


def __getattr__(name: str) -> Any:
    if name == "compat":
        return importlib.import_module("codir_fast.compat")
    if name in _DISTILLATION:
        return getattr(importlib.import_module("codir_fast.distillation"), name)
    raise AttributeError(f"module 'codir_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
