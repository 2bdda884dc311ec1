"""Specification of the operators in plain PyTorch: dense, differentiable, right in float64. Tests
hold every backend to it, benchmarks time it as "eager". Nothing of the library calls it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NCE_EPS = 1e-7  # as in the code of Tian et al. 2020, and as kNceEps in csrc/bank_contrast.h


def masked_pool(
    hidden_states: Sequence[Tensor], attention_mask: Tensor | None, mode: str
) -> Tensor:
    """Pools each (B, T, H) layer over its real tokens; (B, L*H), layer after layer.

    `mode` is mean, max, first or last, over the tokens whose `attention_mask` (B, T) is not zero.
    A row without a real token gives 0.
    """
    num_rows, num_tokens, _ = hidden_states[0].shape
    if attention_mask is None:
        attention_mask = hidden_states[0].new_ones(num_rows, num_tokens, dtype=torch.bool)
    real = attention_mask != 0
    return torch.cat([_pool_layer(layer, real, mode) for layer in hidden_states], dim=1)


def _pool_layer(layer: Tensor, real: Tensor, mode: str) -> Tensor:
    rows = [_pool_row(tokens[mask], mode) for tokens, mask in zip(layer, real, strict=True)]
    return torch.stack(rows) if rows else layer.sum(1)


def _pool_row(tokens: Tensor, mode: str) -> Tensor:
    if tokens.shape[0] == 0:
        return tokens.sum(0)
    if mode == "mean":
        return tokens.mean(0)
    if mode == "max":
        return tokens.max(0).values
    return tokens[0 if mode == "first" else -1]


def allowed_negatives(
    num_queries: int,
    bank: Tensor,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The sets A_i as a (B, K) bool mask: row j is valid, of another label, and not excluded."""
    num_bank_rows = bank.shape[0]
    allowed = torch.ones(num_queries, num_bank_rows, dtype=torch.bool, device=bank.device)
    if valid is not None:
        allowed = allowed & valid
    if labels is not None and bank_labels is not None:
        allowed = allowed & (labels[:, None] != bank_labels)
    if exclude_index is not None:
        rows = torch.arange(num_bank_rows, device=bank.device)
        allowed = allowed & (exclude_index[:, None] != rows)
    return allowed


def bank_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor | float,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
) -> Tensor:
    """Loss of each query against all allowed bank rows, (B,), with s_i+ = q_i.p_i / t and
    s_ij = q_i.b_j / t.

    InfoNCE: l_i = log(e^{s_i+} + sum_{j in A_i} e^{s_ij}) - s_i+.
    NCE, where log Z is given as `log_partition`, with P(s) = e^s / Z and c = num_noise / num_data:
    l_i = -log(P_i+ / (P_i+ + c + eps)) - sum_{j in A_i} log(c / (P_ij + c + eps)).
    """
    allowed = allowed_negatives(len(query), bank, labels, bank_labels, exclude_index, valid)
    rows = bank.to(query.dtype)
    if bank_scale is not None:
        rows = rows * bank_scale[:, None]
    if valid is not None:  # what lies in an invalid row, NaN included, doesn't count
        rows = torch.where(valid[:, None], rows, 0)
    positive_logit = (query * positive).sum(1) * inv_temperature
    negative_logits = (query @ rows.T * inv_temperature).masked_fill(~allowed, -torch.inf)
    return _objective(positive_logit, negative_logits, log_partition, num_noise / num_data)


def in_batch_contrast(
    query: Tensor,
    positive: Tensor,
    inv_temperature: Tensor | float,
    labels: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE of each query against the positives of the others, (B,), as bank_contrast; if
    `symmetric`, its mean with the loss of each positive against the other queries. Left out: what
    has the query's own label.
    """
    own = torch.arange(len(query), device=query.device)
    pairs = [(query, positive), (positive, query)] if symmetric else [(query, positive)]
    masks = (None, labels, labels, own)
    losses = [bank_contrast(q, p, p, inv_temperature, *masks) for q, p in pairs]
    return sum(losses[1:], losses[0]) / len(losses)


def _objective(
    positive: Tensor, negatives: Tensor, log_partition: Tensor | None, noise_ratio: float
) -> Tensor:
    """The loss from logits (B,) and (B, N), -inf where a negative is not allowed."""
    if log_partition is None:
        lse = torch.logsumexp(torch.cat([positive[:, None], negatives], dim=1), dim=1)
        return lse - positive
    # In log space: P / (P + c + eps) = sigmoid(s - log Z - log(c + eps)).
    offset = log_partition + math.log(noise_ratio + NCE_EPS)
    term = F.softplus(negatives - offset, threshold=40) + math.log1p(NCE_EPS / noise_ratio)
    term = term.masked_fill(negatives == -torch.inf, 0)
    return F.softplus(offset - positive, threshold=40) + term.sum(1)


def indexed_contrast(
    query: Tensor,
    positive: Tensor,
    bank: Tensor,
    inv_temperature: Tensor | float,
    index: Tensor,
    bank_scale: Tensor | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    exclude_index: Tensor | None = None,
    valid: Tensor | None = None,
    log_partition: Tensor | None = None,
    num_noise: int = 1,
    num_data: int = 1,
) -> Tensor:
    """Loss of each query against the allowed ones of its own rows index[i], (B,).

    As bank_contrast with A_i the positions m whose row index[i, m] is allowed; a row that is named
    twice counts twice.
    """
    masks = (labels, bank_labels, exclude_index, valid)
    allowed = allowed_negatives(len(query), bank, *masks).gather(1, index)
    rows = bank[index].to(query.dtype)
    if bank_scale is not None:
        rows = rows * bank_scale[index][:, :, None]
    rows = torch.where(allowed[:, :, None], rows, 0)
    positive_logit = (query * positive).sum(1) * inv_temperature
    logits = torch.einsum("bd,bmd->bm", query, rows) * inv_temperature
    negative_logits = logits.masked_fill(~allowed, -torch.inf)
    return _objective(positive_logit, negative_logits, log_partition, num_noise / num_data)


def bank_update(
    bank: Tensor, index: Tensor, keys: Tensor, momentum: float, filled: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The bank and `filled` after b_r <- normalise(m * b_r + (1 - m) * key_n) for each n in order.

    r = index[n]; m is `momentum`, or 0 where `filled` is given and false at r.
    """
    bank, filled = bank.clone(), None if filled is None else filled.clone()
    for row, key in zip(index.tolist(), keys, strict=True):
        m = momentum if filled is None or filled[row] else 0.0
        mixed = (1 - m) * key + (m * bank[row].to(key.dtype) if m else 0)
        bank[row] = F.normalize(mixed, dim=0).to(bank.dtype)
        if filled is not None:
            filled[row] = True
    return bank, filled
