"""InfoNCE and info_nce of info-nce-pytorch 0.1.4 (its module is `info_nce`)."""

from torch import Tensor, nn

from codir_fast.checks import check_choice
from codir_fast.functional import contrastive_loss
from codir_fast.loss_arguments import REDUCTIONS, check_temperature

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
        query, positive_key: (B, D), float32, float64, bfloat16 or float16.
        negative_keys: None: the other queries' positive keys; else as `negative_mode` says.
            Gradients flow to them.
        temperature: t > 0; a number, or a 0-d tensor, which gets a gradient if it requires one.
        reduction: "none" gives (B,), "mean" or "sum" a scalar.
        negative_mode: "unpaired": (K, D), shared by all queries. "paired": (B, M, D), each query's
            own.

    Returns:
        The loss in nats, float32 (float64 for float64 input), (B,) or a scalar; differentiable
        once in query, positive_key, negative_keys and temperature.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
            argument.

    Source: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding,
        eq. 4.
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
    """Holds the options of `info_nce`, as `info_nce.InfoNCE` of info-nce-pytorch 0.1.4; they are
    checked at once.

    Example:
        >>> loss = InfoNCE()(query, positive_key, negative_keys)
    """

    def __init__(
        self, temperature: float = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        if not isinstance(temperature, Tensor):  # one that is learnt is looked at in each call
            check_temperature(temperature)
        check_choice("reduction", reduction, REDUCTIONS)
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
