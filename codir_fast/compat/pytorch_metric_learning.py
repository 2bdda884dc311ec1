"""NTXentLoss and CrossBatchMemory of pytorch-metric-learning 2.9.0
(`pytorch_metric_learning.losses`). Cosine similarity and the mean over positive pairs, its
defaults, are what there is here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codir_fast.checks import check_count, check_device, check_same_dtype
from codir_fast.compat.metric_learning_arguments import (
    as_labels,
    check_mask,
    check_rows,
    listed_pairs,
)
from codir_fast.compat.positive_pairs import (
    mean,
    nothing,
    pairs_of_equal_label,
    scatter_logsumexp,
    unit,
)
from codir_fast.functional import contrastive_loss
from codir_fast.loss_arguments import check_temperature

# What the original takes too, with its default.
_NOT_SUPPORTED = {
    "distance": None,
    "reducer": None,
    "embedding_regularizer": None,
    "embedding_reg_weight": 1,
    "collect_stats": None,
}
_INSTEAD = {
    "distance": "cosine similarity is used",
    "reducer": "the mean over positive pairs is taken",
    "miner": "mine outside, and give NTXentLoss `indices_tuple`",
}


class NTXentLoss(nn.Module):
    """The mean over all positive pairs (a, p) of log(e^{s_ap} + sum_n e^{s_an}) - s_ap, s cosine
    similarity / temperature, n the rows of other labels than a: `losses.NTXentLoss` of
    pytorch-metric-learning 2.9.0.

    The sum over n is taken once per anchor, in one pass over the rows. Memory grows with the number
    P of positive pairs, P x D (rows of a class squared, summed over the classes), not with
    P x (number of negative pairs) as in the original. With `indices_tuple` the pairs are taken as
    listed, in (number of listed pairs) x D.

    Differs from the original in that its loss of a pair stops at -log(smallest float) (87 in
    float32) and this one does not, and that it gives 0 for one positive and one negative pair in
    all, and this one their loss. Without a positive or without a negative pair both give 0.

    Args:
        temperature: t > 0.
        distance, reducer, embedding_regularizer, embedding_reg_weight, collect_stats: only the
            original's defaults; anything else raises NotImplementedError.

    Example:
        >>> loss = NTXentLoss(temperature=0.07)(embeddings, labels)

    Source: Sohn 2016, Improved Deep Metric Learning with Multi-class N-pair Loss Objective; Chen et
        al. 2020, SimCLR.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        _refuse("NTXentLoss", kwargs)
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; differentiable in embeddings and ref_emb.

        Args:
            embeddings: (B, D).
            labels: (B,) integers; not needed with `indices_tuple`.
            indices_tuple: (anchors, positives, anchors, negatives) or (anchors, positives,
                negatives), as miners give it: rows of embeddings and of ref_emb.
            ref_emb: (R, D), where positives and negatives come from; None: the embeddings, each
                without itself.
            ref_labels: (R,) integers. As in the original, giving the very tensor that is `labels`
                leaves row i out of anchor i's positives.

        Raises:
            ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
                argument.
        """
        check_rows("embeddings", embeddings)
        if ref_emb is not None:
            check_rows("ref_emb", ref_emb, "R", embeddings.shape[1], "as `embeddings`")
            check_device("ref_emb", ref_emb, embeddings.device, "`embeddings`")
        if ref_emb is None and ref_labels is not None:
            raise ValueError("`ref_labels` needs `ref_emb`, got None")
        if indices_tuple is not None:
            rows = embeddings if ref_emb is None else ref_emb
            pairs = listed_pairs(indices_tuple, len(embeddings), len(rows))
            return self._of_listed_pairs(embeddings, rows, *pairs)
        if labels is None:
            raise ValueError("`labels` or `indices_tuple` must be given, got None for both")
        same = ref_emb is None or ref_labels is labels
        own_row = torch.arange(len(embeddings), device=embeddings.device) if same else None
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        if ref_labels is None:
            raise ValueError("`ref_emb` needs `ref_labels` or `indices_tuple`, got None for both")
        if not torch.is_autocast_enabled(embeddings.device.type):
            check_same_dtype("ref_emb", ref_emb, embeddings.dtype, "`embeddings`")
        return self.by_labels(embeddings, labels, ref_emb, ref_labels, own_row)

    def by_labels(
        self,
        embeddings: Tensor,
        labels: Tensor,
        rows: Tensor,
        row_labels: Tensor,
        own_row: Tensor | None,
    ) -> Tensor:
        """The loss over all pairs; row own_row[a] is the anchor's own copy and no positive of
        it.
        """
        labels = as_labels("labels", labels, embeddings)
        row_labels = as_labels("ref_labels", row_labels, rows, "R")
        anchors, positives = pairs_of_equal_label(labels, row_labels)
        if own_row is not None:
            others = positives != own_row[anchors]
            anchors, positives = anchors[others], positives[others]
        if len(anchors) == 0:
            return nothing(embeddings)
        log_sum = self._log_sum_over_negatives(embeddings, labels, rows, row_labels)
        return mean(self._logits(embeddings, rows, anchors, positives), log_sum[anchors])

    def _of_listed_pairs(
        self,
        embeddings: Tensor,
        rows: Tensor,
        anchors: Tensor,
        positives: Tensor,
        negative_anchors: Tensor,
        negatives: Tensor,
    ) -> Tensor:
        if len(anchors) == 0 or len(negatives) == 0:
            return nothing(embeddings)
        logits = self._logits(embeddings, rows, negative_anchors, negatives)
        log_sum = scatter_logsumexp(logits, negative_anchors, len(embeddings))
        return mean(self._logits(embeddings, rows, anchors, positives), log_sum[anchors])

    def _logits(self, embeddings: Tensor, rows: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
        anchor_vectors = unit(embeddings)[anchors]
        return (anchor_vectors * unit(rows[others])).sum(1) / self.temperature

    def _log_sum_over_negatives(
        self, embeddings: Tensor, labels: Tensor, rows: Tensor, row_labels: Tensor
    ) -> Tensor:
        """log sum_n e^{s_an} over the rows of other labels, (B,); -inf for none.

        With the opposite of the anchor as positive, whose logit s+ = -1/t no other is below, the
        loss l = log(e^{s+} + sum) - s+ is at least log 2, and log sum = s+ + l + log(1 - e^-l)
        loses nothing.
        """
        loss = contrastive_loss(
            embeddings,
            -embeddings,
            rows,
            temperature=self.temperature,
            reduction="none",
            labels=labels,
            negative_labels=row_labels,
        )
        lowest = -unit(embeddings).square().sum(1) / self.temperature
        found = loss > 0
        loss = torch.where(found, loss, 1)  # keeps the gradient of the branch not taken finite
        return torch.where(found, lowest + loss + torch.log1p(-torch.exp(-loss)), -torch.inf)


class CrossBatchMemory(nn.Module):
    """A loss against the embeddings of the last batches, as `losses.CrossBatchMemory` of
    pytorch-metric-learning 2.9.0.

    Each batch first goes into the memory, over its oldest rows; then its embeddings are the anchors
    and the memory's rows the positives and negatives, an anchor's own copy left out. Rows carry no
    gradient. The loss reads the memory in place.

    Same buffers as the original. As there, position and fill are not in the state_dict: a loaded
    memory counts as empty. (codir_fast.MemoryQueue keeps its whole state.)

    Differs from the original in that the memory does not change in eval mode, and that the own copy
    is left out for a batch of one too.

    Args:
        loss: a codir_fast.compat.pytorch_metric_learning.NTXentLoss.
        embedding_size: width of a row, D.
        memory_size: number of rows.
        miner: only None; miners raise NotImplementedError.

    Example:
        >>> loss_fn = CrossBatchMemory(NTXentLoss(), embedding_size=128, memory_size=4096)
        >>> loss = loss_fn(embeddings, labels)

    Source: Wang et al. 2020, Cross-Batch Memory for Embedding Learning.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self,
        loss: NTXentLoss,
        embedding_size: int,
        memory_size: int = 1024,
        miner: None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(loss, NTXentLoss):
            raise TypeError(
                "`loss` must be codir_fast.compat.pytorch_metric_learning.NTXentLoss, "
                f"got {type(loss).__module__}.{type(loss).__name__}"
            )
        _refuse("CrossBatchMemory", {**kwargs, "miner": miner}, {"miner": None})
        super().__init__()
        self.loss = loss
        self.embedding_size = check_count("embedding_size", embedding_size)
        self.memory_size = check_count("memory_size", memory_size)
        self.reset_queue()

    def reset_queue(self) -> None:
        """Empties the memory."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.int64))
        self.has_been_filled = False
        self.queue_idx = 0

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; differentiable in embeddings.

        Args:
            embeddings: (B, D) with D=embedding_size, at most memory_size go into the memory.
            labels: (B,) integers.
            indices_tuple: only None.
            enqueue_mask: (B,) bool. Only these go into the memory, and only the others are anchors.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or value; the message names the argument.
            NotImplementedError: `indices_tuple` is given.
        """
        if indices_tuple is not None:
            raise NotImplementedError("`indices_tuple` is not supported by CrossBatchMemory")
        check_rows("embeddings", embeddings, "B", self.embedding_size, "the `embedding_size`")
        labels = as_labels("labels", labels, embeddings)
        if enqueue_mask is not None:
            check_mask("enqueue_mask", enqueue_mask, len(embeddings))
        with torch.inference_mode(False):  # what training may write to
            self.embedding_memory = self.embedding_memory.to(embeddings.device, embeddings.dtype)
            self.label_memory = self.label_memory.to(labels.device)
        own_row = None
        if enqueue_mask is None:
            own_row = self._enqueue(embeddings, labels)
        else:
            self._enqueue(embeddings[enqueue_mask], labels[enqueue_mask])
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        filled = self.memory_size if self.has_been_filled else self.queue_idx
        memory, memory_labels = self.embedding_memory[:filled], self.label_memory[:filled]
        return self.loss.by_labels(embeddings, labels, memory, memory_labels, own_row)

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        """The rows that were written, (B,); None in eval mode."""
        B = len(embeddings)
        if self.memory_size < B:
            raise ValueError(
                f"`embeddings` must have at most memory_size={self.memory_size} rows, got {B}"
            )
        if not self.training:
            return None
        rows = torch.arange(self.queue_idx, self.queue_idx + B, device=embeddings.device)
        rows = rows % self.memory_size
        self.embedding_memory[rows] = embeddings.detach()
        self.label_memory[rows] = labels
        self.has_been_filled |= self.queue_idx + B >= self.memory_size
        self.queue_idx = (self.queue_idx + B) % self.memory_size
        return rows

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"


def _refuse(
    whose: str, given: dict[str, Any], not_supported: dict[str, Any] = _NOT_SUPPORTED
) -> None:
    for name, value in given.items():
        if name not in not_supported:
            raise TypeError(f"{whose} got an unexpected argument `{name}`")
        if value not in (not_supported[name], None, False):
            instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise NotImplementedError(f"`{name}` is not supported{instead}")
