"""InfoNCE and info_nce of info-nce-pytorch 0.1.4 (its module is `info_nce`)."""

from torch import Tensor, nn

from codir_fast.checks import check_choice
from codir_fast.functional import contrastive_loss

_MODES = {"unpaired": (2, "(K, D)"), "paired": (3, "(B, M, D)")}


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of cosine similarities, as `info_nce.info_nce` of info-nce-pytorch 0.1.4.

    Differs from it in that nothing of size B x K is stored, that the result is float32 at least,
    and that `temperature` must be positive.

    Args:
        query, positive_key: (B, D).
        negative_keys: None: the other queries' positive keys; else as `negative_mode` says.
            Gradients flow to them.
        temperature: t > 0.
        reduction: "none" gives (B,), "mean" or "sum" a scalar.
        negative_mode: "unpaired": (K, D), shared by all queries. "paired": (B, M, D), each query's
            own.
    """
    check_choice("negative_mode", negative_mode, tuple(_MODES))
    ndim, shape = _MODES[negative_mode]
    if isinstance(negative_keys, Tensor) and negative_keys.ndim != ndim:
        raise ValueError(
            f"`negative_keys` must have shape {shape} for `negative_mode` {negative_mode!r}, "
            f"got {tuple(negative_keys.shape)}"
        )
    return contrastive_loss(
        query, positive_key, negative_keys, temperature=temperature, reduction=reduction
    )


class InfoNCE(nn.Module):
    """Holds the options of `info_nce`, as `info_nce.InfoNCE` of info-nce-pytorch 0.1.4.

    Example:
        >>> loss = InfoNCE()(query, positive_key, negative_keys)
    """

    def __init__(
        self, temperature: float = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        check_choice("negative_mode", negative_mode, tuple(_MODES))
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )
