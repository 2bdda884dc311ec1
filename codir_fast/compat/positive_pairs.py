"""What the losses of pytorch_metric_learning.py sum over pairs of an anchor and a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.ops.contrast import compute_dtype


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least."""
    return F.normalize(rows.to(compute_dtype(rows.dtype)), dim=1)


def pairs_of_equal_label(labels: Tensor, row_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and rows of all P pairs of equal label, (P,) each, without a B x R matrix."""
    ordered, order = torch.sort(row_labels, stable=True)
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first
    anchors = torch.repeat_interleave(torch.arange(len(labels), device=labels.device), count)
    place = torch.arange(len(anchors), device=labels.device) - (count.cumsum(0) - count)[anchors]
    return anchors, order[first[anchors] + place]


def scatter_logsumexp(logits: Tensor, anchors: Tensor, B: int) -> Tensor:
    """log sum of e^logit over each anchor's own logits, (B,); -inf for none."""
    fixed = logits.detach()
    largest = fixed.new_full((B,), -torch.inf).scatter_reduce(0, anchors, fixed, "amax")
    parts = torch.exp(logits - largest[anchors])
    total = torch.zeros_like(largest).index_add(0, anchors, parts)
    return largest + torch.where(total > 0, total, 1).log()  # largest is -inf where total is 0


def nothing(embeddings: Tensor) -> Tensor:
    """A loss of 0, with gradient 0."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return (0 * embeddings).sum(dtype=dtype)


def mean(positive_logits: Tensor, log_sums: Tensor) -> Tensor:
    """The mean of log(e^{s+} + sum) - s+."""
    excess = log_sums - positive_logits
    return torch.logaddexp(excess, torch.zeros_like(excess)).mean()
