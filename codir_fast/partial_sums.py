"""Loss and gradients over parts of the negatives, and what they make together: how ranks, or any
other parts of a bank, add up to one loss.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codir_fast.checks import check_choice
from codir_fast.loss_arguments import OBJECTIVES
from codir_fast.ops.contrast import softplus, wide


class PartialSums(NamedTuple):
    """What some of the negatives give for each query: loss (B,), dquery (B, D) and
    dinv_temperature (B,), float32, or float64 for float64 input.

    InfoNCE: the loss as if they were all, and its gradients. With l = sum_j e^{s_ij - s_i+} over
    these negatives and O = dl / dq, which add up over parts, loss = log(1 + l) and
    dquery = O / (1 + l): so kept, they neither overflow nor vanish, at whatever temperature.
    NCE: the sum over these negatives, and its gradients. The positive's term is a part of its own.
    """

    loss: Tensor
    dquery: Tensor
    dinv_temperature: Tensor

    def packed(self) -> Tensor:
        """All in one, (B, D + 2)."""
        numbers = (self.loss[:, None], self.dinv_temperature[:, None], self.dquery)
        return torch.cat(numbers, dim=1)


def unpack(packed: Tensor) -> PartialSums:
    return PartialSums(packed[:, 0], packed[:, 2:], packed[:, 1])


def combine_partial_sums(
    parts: Sequence[PartialSums], *, objective: str = "infonce"
) -> PartialSums:
    """Partial sums over the union of disjoint sets of negatives, and of the positive.

    InfoNCE: loss = log(1 + sum_r (e^{loss_r} - 1)), dquery = sum_r e^{loss_r - loss} dquery_r, and
    dinv_temperature alike. NCE: the sums. Added up in float64, in the order of the parts.

    Args:
        parts: at least one, of the same B queries, positives and temperature.
        objective: "infonce" or "nce".

    Returns:
        The sums over all parts, in the shapes and the dtype of the first one's.

    Raises:
        ValueError: another objective; no part; parts of another B or D.
    """
    check_choice("objective", objective, OBJECTIVES)
    if len(parts) == 0:
        raise ValueError("`parts` must hold the sums of at least one part, got none")
    B, D = parts[0].dquery.shape
    for n, part in enumerate(parts):
        if tuple(x.shape for x in part) != ((B,), (B, D), (B,)):
            raise ValueError(
                f"`parts` must be of the same queries, (B, D) with B={B}, D={D} as part 0, got "
                f"{tuple(part.dquery.shape)} as part {n}"
            )
    return combine_repeated(parts, [None] * len(parts), objective == "nce")


def combine_repeated(
    parts: Sequence[PartialSums], counts: Sequence[Tensor | None], is_nce: bool
) -> PartialSums:
    """The same where each part's negatives count counts[r] times, (B,), for each query; None is
    once.
    """
    losses = torch.stack([wide(part.loss) for part in parts])
    times = torch.ones_like(losses)
    for n, count in enumerate(counts):
        if count is not None:
            times[n] = count
    if is_nce:
        return _weighted(parts, times, (times * losses).sum(0))
    # log l_r: e^{loss} - 1 would overflow.
    gaps = losses + torch.log(-torch.expm1(-losses)) + times.log()
    loss = softplus(torch.logsumexp(gaps, 0))
    return _weighted(parts, times * (losses - loss).exp(), loss)


def _weighted(parts: Sequence[PartialSums], factors: Tensor, loss: Tensor) -> PartialSums:
    """This loss, with the gradients' sum times their factors (R, B)."""
    dquery = torch.zeros_like(wide(parts[0].dquery))
    dinv_temperature = torch.zeros_like(loss)
    for part, factor in zip(parts, factors, strict=True):
        dquery += factor[:, None] * wide(part.dquery)
        dinv_temperature += factor * wide(part.dinv_temperature)
    dtype = parts[0].loss.dtype
    return PartialSums(loss.to(dtype), dquery.to(dtype), dinv_temperature.to(dtype))
