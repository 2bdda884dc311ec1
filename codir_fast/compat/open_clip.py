"""ClipLoss of open_clip, single process (`open_clip.ClipLoss`, versions 2 to 4)."""

import math

import torch
from torch import Tensor, nn

from codir_fast.checks import INTEGERS, check_float_dtype, check_number, check_tensor, is_readable
from codir_fast.functional import contrastive_loss
from codir_fast.loss_arguments import check_pair
from codir_fast.ops.contrast import compute_dtype


class ClipLoss(nn.Module):
    """Each image must find its text in the batch and each text its image: the mean of both losses.

    Logits are `logit_scale` x image . text, features as they come (open_clip normalises them in its
    model). Differs from open_clip in that neither B x B matrix is stored, and that the result is
    float32 at least.

    Args:
        local_loss, gather_with_grad, cache_labels, rank: without effect in a single process, as
            there.
        world_size: only 1; more raises NotImplementedError.
        use_horovod: only False (open_clip had it until 2025).

    Example:
        >>> loss = ClipLoss()(image_features, text_features, logit_scale.exp())

    Source: Radford et al. 2021, CLIP, figure 3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if world_size != 1:
            raise NotImplementedError(
                f"`world_size` must be 1, got {world_size}: features of other processes are not "
                "gathered"
            )
        if use_horovod:
            raise NotImplementedError("`use_horovod=True` is not supported")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean of -log softmax(logit_scale * image @ text.T) at each image's own text, over the
        texts and over the images, in nats.

        Args:
            image_features, text_features: (B, D), float32, float64, bfloat16 or float16.
            logit_scale: 1/t > 0, a number or a tensor of one element, which gets its gradient, in
                its dtype. Half precision is widened before t is taken of it.
            logit_bias: added to every logit; a softmax does not see it, so its gradient is 0.
            output_dict: give {"contrastive_loss": loss}.

        Returns:
            The loss, a scalar, float32 (float64 for float64 features), or a dictionary with it;
            differentiable once in both features and logit_scale.

        Raises:
            ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
                argument.
        """
        check_pair(image_features, text_features, ("image_features", "text_features"))
        loss = contrastive_loss(
            image_features,
            text_features,
            temperature=_temperature(logit_scale),
            normalize=False,
            symmetric=True,
        )
        if isinstance(logit_bias, Tensor):  # stays in the graph: DDP misses parameters that are not
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


def _temperature(logit_scale: Tensor | float) -> Tensor | float:
    """t = 1 / logit_scale, in float32 at least: a half-precision t would be off by up to 0.2%."""
    if not isinstance(logit_scale, Tensor):
        scale = check_number("logit_scale", logit_scale)
        _check_scale(scale, torch.float64)
        return 1 / scale
    check_tensor("logit_scale", logit_scale)
    if logit_scale.numel() != 1:
        raise ValueError(
            f"`logit_scale` must have one element, got shape {tuple(logit_scale.shape)}"
        )
    if logit_scale.dtype not in INTEGERS:
        check_float_dtype("logit_scale", logit_scale.dtype)
    wide = logit_scale.reshape(()).to(compute_dtype(logit_scale.dtype))
    if is_readable(wide):
        _check_scale(wide.item(), wide.dtype)
    return 1 / wide


def _check_scale(scale: float, dtype: torch.dtype) -> None:
    # Comparisons only: torch.compile can follow them. t must be finite in its dtype, too.
    if not (0 < scale < math.inf and 1 / scale <= torch.finfo(dtype).max):
        raise ValueError(f"`logit_scale` must be positive and finite, got {scale}")
