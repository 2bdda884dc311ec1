"""What bank_contrast and indexed_contrast share: the objectives as sums over negatives."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.ops.unit_rows import unit_and_norm, unit_rows_backward
from codir_fast.reference import NCE_EPS

_BLOCK_ROWS = 256

# loss, lse, dquery, dpositive, dinv_temperature; all in compute_dtype of the query but lse, see
# `wide`
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic runs in for inputs of this dtype: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class PreparedPair:
    """Query and positive (B, D) as a backend computes with them: in compute_dtype, unit rows if
    `normalize`.
    """

    def __init__(self, query: Tensor, positive: Tensor, normalize: bool) -> None:
        dtype = compute_dtype(query.dtype)
        self.query, self.positive = (x.to(dtype).contiguous() for x in (query, positive))
        self._norms: tuple[Tensor, Tensor] | None = None
        if normalize:
            self.query, query_norm = unit_and_norm(self.query)
            self.positive, positive_norm = unit_and_norm(self.positive)
            self._norms = query_norm, positive_norm

    def bring_back(self, outputs: Outputs) -> Outputs:
        """Outputs with the gradients with respect to what was given."""
        if self._norms is None:
            return outputs
        loss, lse, dquery, dpositive, dinv_temperature = outputs
        query_norm, positive_norm = self._norms
        dquery = unit_rows_backward(dquery, self.query, query_norm)
        dpositive = unit_rows_backward(dpositive, self.positive, positive_norm)
        return loss, lse, dquery, dpositive, dinv_temperature


class Sums(Protocol):
    """The sums over a query's negatives that an objective needs, and what it makes of them."""

    def add(self, logits: Tensor, rows: Tensor) -> None:
        """Adds rows (C, D), or per query (B, C, D), by their logits (B, C), which it overwrites;
        -inf where one is no negative.
        """

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        """Loss and gradients once all rows are added."""


class InfoNceSums:
    """Maximum m (B,) of the logits s, sum of e^{s - m}, and rows (B, D), the sum of e^{s - m} b."""

    def __init__(self, query: Tensor) -> None:
        self.maximum = query.new_full(query.shape[:1], -torch.inf)
        self.total = _CompensatedSum(self.maximum)
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        maximum = torch.maximum(self.maximum, logits.amax(1))
        shift = maximum.masked_fill(maximum == -torch.inf, 0)  # no allowed row yet
        rescale = (self.maximum - shift).exp()
        weights = logits.sub_(shift[:, None]).exp_()
        self.rows = self.rows * rescale[:, None] + _weighted_rows(weights, rows)
        self.maximum = maximum
        self.total.scale(rescale)
        self.total.add(weights.sum(1))

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        total = self.total.value
        positive_logit = (query * positive).sum(1) * inv_t
        # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+
        # is subtracted twice.
        gap = (self.maximum - positive_logit) + total.log()
        lse = torch.logaddexp(wide(self.maximum) + wide(total).log(), wide(positive_logit))
        loss = torch.logaddexp(gap, torch.zeros_like(gap))
        negative_weight = gap.sigmoid()
        mean_negative = self.rows / total.masked_fill(total == 0, 1)[:, None]
        direction = negative_weight[:, None] * (mean_negative - positive)  # d loss / d (query / t)
        dpositive = -negative_weight[:, None] * query * inv_t
        dinv_temperature = (query * direction).sum(1)
        return loss, lse, direction * inv_t, dpositive, dinv_temperature


class NceSums:
    """With a = s - offset and offset = log Z + log(c + eps): sum of softplus(a) + log(1 + eps / c),
    and rows (B, D), the sum of sigmoid(a) b.
    """

    def __init__(self, query: Tensor, log_partition: Tensor, noise_ratio: float) -> None:
        log_noise = math.log(noise_ratio + NCE_EPS)
        self.lse = (wide(log_partition) + log_noise).to(query.device).expand(query.shape[0])
        self.offset = self.lse.to(query.dtype)
        self.extra = math.log1p(NCE_EPS / noise_ratio)
        self.total = _CompensatedSum(query.new_zeros(query.shape[:1]))
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        count = (logits != -torch.inf).sum(1, dtype=logits.dtype)
        gap = logits.sub_(self.offset[:, None])
        self.total.add(softplus(gap).sum(1) + self.extra * count)
        self.rows += _weighted_rows(gap.sigmoid_(), rows)

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        gap = self.offset - (query * positive).sum(1) * inv_t
        positive_weight = gap.sigmoid()[:, None]
        direction = self.rows - positive_weight * positive  # d loss / d (query / t)
        return (
            softplus(gap) + self.total.value,
            wide(self.lse).contiguous(),
            direction * inv_t,
            -positive_weight * query * inv_t,
            (query * direction).sum(1),
        )


def objective_sums(query: Tensor, log_partition: Tensor | None, noise_ratio: float) -> Sums:
    if log_partition is None:
        return InfoNceSums(query)
    return NceSums(query, log_partition, noise_ratio)


def objective_weights(logits: Tensor, lse: Tensor, log_partition: Tensor | None) -> Tensor:
    """d loss / d logit of each negative, (B, C), in place of its logit; `lse` is the forward's."""
    high = lse.to(logits.dtype)
    low = (lse - high).to(logits.dtype)
    gap = logits.sub_(high[:, None]).sub_(low[:, None])  # exact for a logit near lse
    return gap.exp_() if log_partition is None else gap.sigmoid_()


def wide(values: Tensor) -> Tensor:
    """In float64, as lse is kept: e^{s - lse} of a float32 logit s must not be off by e to the
    rounding of a large lse. Apple's GPUs have no float64.
    """
    return values if values.device.type == "mps" else values.to(torch.float64)


def softplus(gap: Tensor) -> Tensor:
    """log(1 + e^gap) without overflow, precise where it is tiny."""
    return F.softplus(gap, threshold=40)  # beyond, log(1 + e^gap) = gap in double


class _CompensatedSum:
    """Kahan's sum: thousands of chunks would otherwise wear off the last digits."""

    def __init__(self, like: Tensor) -> None:
        self.value, self._lost = torch.zeros_like(like), torch.zeros_like(like)

    def scale(self, factor: Tensor) -> None:
        self.value, self._lost = self.value * factor, self._lost * factor

    def add(self, increment: Tensor) -> None:
        increment = increment - self._lost
        value = self.value + increment
        self._lost = (value - self.value) - increment
        self.value = value


def _weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """sum over c of weights[b, c] * rows[c], or rows[b, c]: (B, D), by blocks of rows.

    One product for all would be added up from left to right where there are few queries.
    """
    whole = weights.shape[1] - weights.shape[1] % _BLOCK_ROWS
    rest = torch.einsum(_product(rows), weights[:, whole:], rows[..., whole:, :])
    if whole == 0:
        return rest
    blocks = weights[:, :whole].unflatten(1, (-1, _BLOCK_ROWS))
    parts = rows[..., :whole, :].unflatten(-2, (-1, _BLOCK_ROWS))
    if rows.ndim == 2:
        return torch.bmm(blocks.transpose(0, 1), parts).sum(0) + rest
    return torch.einsum("bnc,bncd->bnd", blocks, parts).sum(1) + rest


def _product(rows: Tensor) -> str:
    return "bc,cd->bd" if rows.ndim == 2 else "bc,bcd->bd"
