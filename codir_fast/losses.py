"""The contrastive loss as a module: it holds the options, functional.contrastive_loss does the
work.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.backend import NAMES as BACKENDS
from codir_fast.checks import check_choice
from codir_fast.functional import check_options, check_temperature, contrastive_loss
from codir_fast.negatives import Negatives

_MIN_LOG_INV, _MAX_LOG_INV = math.log(0.01), math.log(100)
_MARGIN_ARGUMENTS = ("margin", "pos_margin", "neg_margin")


class ContrastiveLoss(nn.Module):
    """InfoNCE against in-batch, shared or banked negatives; see
    codir_fast.functional.contrastive_loss.

    Args:
        temperature: t > 0, where learning starts if it is learnt.
        objective, normalize, reduction, symmetric, backend: as for the function.
        learnable_temperature: makes log(1/t) a parameter, `log_inv_temperature`, kept where 1/t is
            in [0.01, 100].

    Example:
        >>> loss_fn = codir_fast.ContrastiveLoss(temperature=0.07)
        >>> loss_fn(query, positive_key, negative_keys).backward()

    Source: learnt temperature as in Radford et al. 2021, CLIP, section 2.5.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        objective: str = "infonce",
        normalize: bool = True,
        reduction: str = "mean",
        learnable_temperature: bool = False,
        symmetric: bool = False,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        super().__init__()
        check_options(objective, reduction, symmetric)
        check_temperature(temperature)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.objective, self.normalize, self.reduction = objective, normalize, reduction
        self.symmetric, self.backend = symmetric, backend
        self.learnable_temperature = learnable_temperature
        if not learnable_temperature:
            self._temperature = temperature
            return
        start = -math.log(temperature)
        if not _MIN_LOG_INV <= start <= _MAX_LOG_INV:
            raise ValueError(
                f"`temperature` must be in [0.01, 100] to be learnt, got {temperature}"
            )
        self.log_inv_temperature = nn.Parameter(torch.tensor(start))

    @property
    def temperature(self) -> float | Tensor:
        """t: a number, or where it is learnt a 0-d tensor with gradient."""
        if not self.learnable_temperature:
            return self._temperature
        return self.log_inv_temperature.clamp(_MIN_LOG_INV, _MAX_LOG_INV).neg().exp()

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Negatives = None,
        *,
        labels: Tensor | None = None,
        negative_labels: Tensor | None = None,
        negative_index: Tensor | None = None,
        exclude_index: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        if self.learnable_temperature and self.training:
            # The parameter itself is held in range, as CLIP does: beyond it there is no gradient to
            # come back.
            with torch.no_grad():
                self.log_inv_temperature.clamp_(_MIN_LOG_INV, _MAX_LOG_INV)
        return contrastive_loss(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            objective=self.objective,
            normalize=self.normalize,
            reduction=self.reduction,
            symmetric=self.symmetric,
            backend=self.backend,
            labels=labels,
            negative_labels=negative_labels,
            negative_index=negative_index,
            exclude_index=exclude_index,
            weight=weight,
        )

    def extra_repr(self) -> str:
        t = float(self.temperature)
        return (
            f"temperature={t:.4g}, objective={self.objective!r}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, learnable_temperature={self.learnable_temperature}, "
            f"backend={self.backend!r}"
        )


def _refuse(unknown: dict[str, Any]) -> None:
    margins = [name for name in _MARGIN_ARGUMENTS if name in unknown]
    if margins:
        raise TypeError(
            f"`{margins[0]}` belongs to a margin loss, ContrastiveLoss of pytorch_metric_learning; "
            "codir_fast.ContrastiveLoss is InfoNCE and has a `temperature`"
        )
    if unknown:
        raise TypeError(f"ContrastiveLoss got an unexpected argument `{next(iter(unknown))}`")
