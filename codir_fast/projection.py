"""Projection head: from pooled hidden states to the shared space of the contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codir_fast.checks import (
    check_count,
    check_device,
    check_float_dtype,
    check_same_dtype,
    check_tensor,
)
from codir_fast.ops.contrast import compute_dtype


class ProjectionHead(nn.Module):
    """z = W x + b, divided by its L2 norm.

    Args:
        in_features: width of the pooled hidden states, L*H.
        dim: width of the shared space, D.

    Source: Sun et al. 2020, Contrastive Distillation on Intermediate Representations, section 3.2.
    """

    def __init__(self, in_features: int, dim: int = 128) -> None:
        super().__init__()
        in_features, dim = check_count("in_features", in_features), check_count("dim", dim)
        self.linear = nn.Linear(in_features, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Unit rows (..., dim) of `pooled` (..., in_features), in the dtype that the linear layer
        gives.

        Raises:
            ValueError, TypeError: `pooled` is of another width, or no floating-point tensor.
        """
        check_tensor("pooled", pooled)
        check_float_dtype("pooled", pooled.dtype)
        width = self.linear.in_features
        if pooled.ndim == 0 or pooled.shape[-1] != width:
            raise ValueError(f"`pooled` must have shape (..., {width}), got {tuple(pooled.shape)}")
        weight = self.linear.weight
        check_device("pooled", pooled, weight.device, "the head")
        if not torch.is_autocast_enabled(pooled.device.type):
            check_same_dtype("pooled", pooled, weight.dtype, "the head")
        projected = self.linear(pooled)
        # The norm of half-precision rows is taken in float32.
        wide = projected.to(compute_dtype(projected.dtype))
        return F.normalize(wide, dim=-1).to(projected.dtype)
