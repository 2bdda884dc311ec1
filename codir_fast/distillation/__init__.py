"""Contrastive distillation of transformers on their intermediate layers (CoDIR)."""

from codir_fast.distillation.config import DistillationConfig, PretrainingConfig
from codir_fast.distillation.masked_lm import PretrainingModel
from codir_fast.distillation.masked_lm_trainer import PretrainingTrainer
from codir_fast.distillation.model import DistillationModel
from codir_fast.distillation.trainer import DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationModel",
    "DistillationTrainer",
    "PretrainingConfig",
    "PretrainingModel",
    "PretrainingTrainer",
]
