"""ClipLoss of open_clip, single process (`open_clip.ClipLoss`, versions 2 to 4)."""

from torch import Tensor, nn

from codir_fast.functional import contrastive_loss


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
        """The loss, a scalar.

        Args:
            image_features, text_features: (B, D).
            logit_scale: 1/t, a number or a tensor of one element, which gets its gradient.
            logit_bias: added to every logit; a softmax does not see it, so its gradient is 0.
            output_dict: give {"contrastive_loss": loss}.
        """
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.reshape(())
        loss = contrastive_loss(
            image_features,
            text_features,
            temperature=1 / logit_scale,
            normalize=False,
            symmetric=True,
        )
        if isinstance(logit_bias, Tensor):  # stays in the graph: DDP misses parameters that are not
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss
