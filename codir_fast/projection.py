"""Projection head: from pooled hidden states to the shared space of the contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """z = W x + b, divided by its L2 norm.

    Args:
        in_features: width of the pooled hidden states, L*H.
        dim: width of the shared space, D.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.2.
    """

    def __init__(self, in_features: int, dim: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Unit rows (..., dim) of `pooled` (..., in_features), in the dtype that the linear layer
        gives.
        """
        projected = self.linear(pooled)
        # The norm of half-precision rows is taken in float32.
        wide = torch.float64 if projected.dtype == torch.float64 else torch.float32
        return F.normalize(projected.to(wide), dim=-1).to(projected.dtype)
