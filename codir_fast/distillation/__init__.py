"""Contrastive distillation of transformers on their intermediate layers (CoDIR)."""

from codir_fast.distillation.config import DistillationConfig
from codir_fast.distillation.model import DistillationModel
from codir_fast.distillation.trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationModel", "DistillationTrainer"]
