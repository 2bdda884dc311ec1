"""Other libraries' losses by their own names, arguments and defaults, over the operators of
codir_fast. One file per library (pytorch_metric_learning.py has two more, for its arguments and
its pairs); what differs from the original is said in each docstring.

pytorch-metric-learning has an NTXentLoss of its own: codir_fast.compat.pytorch_metric_learning.
"""

from codir_fast.compat import pytorch_metric_learning
from codir_fast.compat.info_nce_pytorch import InfoNCE, info_nce
from codir_fast.compat.lightly import NTXentLoss
from codir_fast.compat.moco import memory_queue_from_moco
from codir_fast.compat.open_clip import ClipLoss
from codir_fast.compat.rep_distiller import ContrastMemory, CRDLoss

__all__ = [
    "CRDLoss",
    "ClipLoss",
    "ContrastMemory",
    "InfoNCE",
    "NTXentLoss",
    "info_nce",
    "memory_queue_from_moco",
    "pytorch_metric_learning",
]
