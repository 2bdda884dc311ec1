"""The contrastive loss as a function: checks, normalisation, choice of negatives, and one pass of
bank_contrast or indexed_contrast.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codir_fast.checks import (
    check_choice,
    check_count,
    check_device,
    check_flag,
    check_float_dtype,
    check_number,
    check_tensor,
)
from codir_fast.memory_bank import FLOAT8
from codir_fast.negatives import (
    ChosenNegatives,
    Negatives,
    check_input_dtype,
    choose_negatives,
)
from codir_fast.ops.bank_contrast import bank_contrast
from codir_fast.ops.contrast import compute_dtype
from codir_fast.ops.indexed_contrast import indexed_contrast
from codir_fast.ops.unit_rows import unit_rows

OBJECTIVES = ("infonce", "nce")
REDUCTIONS = ("none", "mean", "sum")
_MIN_FLOAT8_TEMPERATURE = 0.0699  # 0.07, in whatever precision it comes


def contrastive_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.07,
    objective: str = "infonce",
    normalize: bool = True,
    reduction: str = "mean",
    symmetric: bool = False,
    backend: str = "auto",
    labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_index: Tensor | None = None,
    exclude_index: Tensor | None = None,
    weight: Tensor | None = None,
    log_partition: float | Tensor | None = None,
    num_data: int | None = None,
) -> Tensor:
    """Each query must recognise its positive key among many negatives.

    With s_i+ = q_i.p_i / t and s_ij = q_i.b_j / t over the allowed negatives A_i, in nats:

    InfoNCE: l_i = log(e^{s_i+} + sum_{j in A_i} e^{s_ij}) - s_i+.
    NCE: l_i = -log(P_i+ / (P_i+ + c + eps)) - sum_{j in A_i} log(c / (P_ij + c + eps)), with P(s) =
    e^s / Z, c = M / n for M negatives offered to each query out of n, and eps = 1e-7.

    Nothing of size B x K is made, and loss and gradients come out of one pass over the negatives.
    On a GPU products run in the dtype of `query` (float32 ones as
    torch.backends.cuda.matmul.allow_tf32 says), sums in float32; on a CPU all runs in float32, or
    float64 for float64 input. A
    query without negatives (an empty A_i, K = 0) has InfoNCE loss 0 and gradient 0; in NCE the
    positive's term stays, and c is 1 where M or n is 0. As in PyTorch, the mean over no query (B =
    0) is NaN.

    Args:
        query: q, (B, D), float32, float64, bfloat16 or float16.
        positive_key: p, (B, D), dtype and device of `query`.
        negative_keys: b. None: the other queries' positive keys, gradient included. (K, D): shared
            by all queries, dtype and device of `query`; gets a gradient if it requires one. A
            MemoryQueue or IndexedBank: its filled rows, without gradient, in the bank's own dtype.
            (B, M, D): M negatives of each query's own, as a (K, D) tensor otherwise.
        temperature: t > 0; a number, or a 0-d tensor, which gets a gradient if it requires one.
        objective: "infonce" or "nce".
        normalize: L2-normalise query, positive and explicit negatives (a bank keeps its own rows
            unit length).
        reduction: "none" gives (B,), "mean" or "sum" a scalar.
        symmetric: the mean of the loss and of the loss with query and positive_key exchanged. In-
            batch, the positive key must then recognise its query among the other queries, as in
            CLIP; other negatives stay what they are.
        backend: see codir_fast.backends().
        labels: (B,) integers. Negatives of the query's own label are left out. With a (K, D) tensor
            `negative_labels` must be given too, a bank has its own, in-batch they are `labels`
            again.
        negative_labels: (K,) integers for a (K, D) tensor, (B, M) for a (B, M, D) one.
        negative_index: (B, M) integers in [0, K): only these rows of a (K, D) tensor or bank count
            for each query, one that is named twice counts twice. Rows are gathered inside the
            kernel, nothing of size B x M x D is made. The whole bank often costs little more: a
            dense pass reads it once for all queries. The range is checked on the CPU; a GPU gives
            NaN for a query with a row out of range, or stops (backend "torch").
        exclude_index: (B,) integers, the row of the negatives that is this query's own example, -1
            for none. In-batch the own row is left out anyway. The range is checked on the CPU only.
        weight: (B,) factor on each query's loss, before the reduction.
        log_partition: log Z of NCE, a number or 0-d tensor, a constant to gradients. Default: of
            these inputs, see estimate_log_partition; ContrastiveLoss keeps that of its first batch.
        num_data: n of NCE, the number of examples that negatives are drawn from. Default: the rows
            of the (K, D) tensor or bank, B in-batch, M of (B, M, D).

    Returns:
        float32 (float64 for float64 input), (B,) or a scalar. Differentiable once in query,
        positive_key, negative_keys (a tensor), temperature (a tensor) and weight. Under autocast
        the three inputs may differ in dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
        argument.
        RuntimeError: the named backend can't run here.

    Example:
        >>> queue = codir_fast.MemoryQueue(65536, 128)
        >>> loss = contrastive_loss(query, positive_key, queue, temperature=0.07)

    Source: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding,
        eq. 4; He et al. 2020, Momentum Contrast, eq. 1. NCE: Tian et al. 2020, Contrastive
        Representation Distillation, eq. 18, and its code.
    """
    check_options(objective, reduction, normalize, symmetric)
    check_nce(objective, log_partition, num_data)
    _check_pair(query, positive_key)
    # The operator brings query and positive to unit length, unless they serve as negatives too.
    by_operator = normalize and not (negative_keys is None or symmetric)
    q, p = (query, positive_key) if by_operator else _prepare(query, positive_key, normalize)
    inv_temperature = _inverse(temperature, query)
    given = (labels, negative_labels, negative_index, exclude_index)
    negatives = choose_negatives(query, p, negative_keys, normalize, *given)
    _check_float8(negatives, temperature)
    log_z, counts = None, (1, 1)
    if objective == "nce":
        counts = (negatives.num_offered, num_data or negatives.num_rows)
        if 0 in counts:
            counts = (1, 1)
        if log_partition is None:
            pair = _prepare(query, positive_key, normalize)
            log_z = _log_partition(*pair, negatives, inv_temperature, symmetric, num_data, backend)
        else:
            log_z = _as_scalar(log_partition, query)
    loss = _losses(q, p, negatives, inv_temperature, log_z, counts, backend, by_operator)
    if symmetric:
        exchanged = _exchange(q, negatives)
        loss = (loss + _losses(p, q, exchanged, inv_temperature, log_z, counts, backend)) / 2
    return _reduce(loss, weight, reduction)


@torch.no_grad()
def estimate_log_partition(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    backend: str = "auto",
    labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_index: Tensor | None = None,
    exclude_index: Tensor | None = None,
    num_data: int | None = None,
) -> Tensor:
    """log Z for the NCE objective, from one batch: Z = n * mean of e^s over all pairs of a query
    with its positive and its allowed negatives, of both directions if `symmetric`.

    Two passes over the negatives; arguments as of contrastive_loss. Returns a 0-d tensor, float32
    (float64 for float64 input), -inf for B = 0.

    Source: Tian et al. 2020, Contrastive Representation Distillation: its code fixes Z so at the
        first batch.
    """
    check_options("nce", "mean", normalize, symmetric)
    check_nce("nce", None, num_data)
    _check_pair(query, positive_key)
    q, p = _prepare(query, positive_key, normalize)
    given = (labels, negative_labels, negative_index, exclude_index)
    negatives = choose_negatives(query, p, negative_keys, normalize, *given)
    inv_temperature = _inverse(temperature, query)
    return _log_partition(q, p, negatives, inv_temperature, symmetric, num_data, backend)


@torch.no_grad()
def _log_partition(
    q: Tensor,
    p: Tensor,
    negatives: ChosenNegatives,
    inv_temperature: Tensor,
    symmetric: bool,
    num_data: int | None,
    backend: str,
) -> Tensor:
    directions = [(q, p, negatives)]
    if symmetric:
        directions.append((p, q, _exchange(q, negatives)))
    lse, pairs = [], []
    for query, positive, chosen in directions:
        loss = _losses(query, positive, chosen, inv_temperature, None, (1, 1), backend)
        lse.append(loss + (query * positive).sum(1) * inv_temperature.to(query.dtype))
        # Where all logits are 0, e^loss is the number of pairs; in double, it is exact: by whatever
        # backend has that.
        zero = torch.zeros_like(query, dtype=torch.float64)
        plain = replace(chosen, scale=None)
        zero_loss = _losses(zero, zero, plain, inv_temperature, None, (1, 1), "auto")
        pairs.append(zero_loss.exp().round())
    log_mean = torch.logsumexp(torch.cat(lse), 0) - torch.cat(pairs).sum().log()
    log_n = log_mean.new_full((), num_data or negatives.num_rows or 1).log()
    return (log_mean + log_n).to(q.dtype)


def _losses(
    query: Tensor,
    positive: Tensor,
    negatives: ChosenNegatives,
    inv_temperature: Tensor,
    log_partition: Tensor | None,
    counts: tuple[int, int],
    backend: str,
    normalize: bool = False,
) -> Tensor:
    vectors = (query, positive, negatives.rows, inv_temperature)
    num_noise, num_data = counts
    picks: dict[str, Any] = {
        "bank_scale": negatives.scale,
        "labels": negatives.labels,
        "bank_labels": negatives.row_labels,
        "exclude_index": negatives.exclude_index,
        "valid": negatives.valid,
        "log_partition": log_partition,
        "num_noise": num_noise,
        "num_data": num_data,
        "normalize": normalize,
    }
    if negatives.index is None:
        return bank_contrast(*vectors, **picks, backend=backend)
    return indexed_contrast(*vectors, negatives.index, **picks, backend=backend)


def _exchange(query: Tensor, negatives: ChosenNegatives) -> ChosenNegatives:
    """The negatives once query and positive have changed places."""
    return replace(negatives, rows=query) if negatives.in_batch else negatives


def check_options(objective: str, reduction: str, normalize: bool, symmetric: bool) -> None:
    check_choice("objective", objective, OBJECTIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_flag("normalize", normalize)
    check_flag("symmetric", symmetric)


def check_nce(objective: str, log_partition: float | Tensor | None, num_data: int | None) -> None:
    for name, value in (("log_partition", log_partition), ("num_data", num_data)):
        if objective != "nce" and value is not None:
            raise ValueError(f'`{name}` needs objective "nce", got {objective!r}')
    if num_data is not None:
        check_count("num_data", num_data)
        if num_data >= 1 << 63:
            raise ValueError(f"`num_data` must be below 2^63, got {num_data}")
    if log_partition is not None and not isinstance(log_partition, Tensor):
        _check_log_partition(log_partition)


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    # Comparisons only: torch.compile can follow them.
    if not (0 < temperature < math.inf and 1 / temperature < math.inf):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}")


def _check_log_partition(log_partition: float) -> None:
    check_number("log_partition", log_partition)
    if not -math.inf < log_partition < math.inf:
        raise ValueError(f"`log_partition` must be finite, got {log_partition}")


def _prepare(query: Tensor, positive_key: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Both in the dtype that the operators compute in, of unit rows if `normalize`."""
    compute = compute_dtype(query.dtype)
    q, p = query.to(compute), positive_key.to(compute)
    if normalize:
        q, p = unit_rows(q), unit_rows(p)
    return q.contiguous(), p.contiguous()


def _check_pair(query: Tensor, positive_key: Tensor) -> None:
    for name, value in (("query", query), ("positive_key", positive_key)):
        check_tensor(name, value)
        check_float_dtype(name, value.dtype)
    if query.ndim != 2 or query.shape[1] == 0:
        raise ValueError(
            f"`query` must have shape (B, D) with D at least 1, got {tuple(query.shape)}"
        )
    if positive_key.shape != query.shape:
        B, D = query.shape
        raise ValueError(
            f"`positive_key` must have shape (B, D) with B={B}, D={D} as `query`, "
            f"got {tuple(positive_key.shape)}"
        )
    check_device("positive_key", positive_key, query.device, "`query`")
    check_input_dtype("positive_key", positive_key, query)


def _inverse(temperature: float | Tensor, query: Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return torch.full((), 1 / temperature, dtype=torch.float64, device="cpu")
    check_tensor("temperature", temperature)
    if temperature.ndim != 0:
        raise ValueError(f"`temperature` must be 0-d, got shape {tuple(temperature.shape)}")
    check_float_dtype("temperature", temperature.dtype)
    if temperature.device.type != "cpu":
        check_device("temperature", temperature, query.device, "`query` or on the CPU")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(temperature.item())
    return temperature.to(compute_dtype(query.dtype)).reciprocal()


def _check_float8(negatives: ChosenNegatives, temperature: float | Tensor) -> None:
    """Colder, the rounding of the rows would show: where looking does not wait for a device."""
    if negatives.rows.dtype != FLOAT8 or torch.compiler.is_compiling():
        return
    if isinstance(temperature, Tensor):
        if temperature.device.type != "cpu":
            return
        temperature = temperature.item()
    if temperature < _MIN_FLOAT8_TEMPERATURE:
        raise ValueError(
            f"`temperature` must be at least 0.07 with a float8 bank, got {temperature}"
        )


def _as_scalar(log_partition: float | Tensor, query: Tensor) -> Tensor:
    if not isinstance(log_partition, Tensor):
        return torch.full((), log_partition, dtype=torch.float64, device=query.device)
    check_tensor("log_partition", log_partition)
    if log_partition.ndim != 0:
        raise ValueError(f"`log_partition` must be 0-d, got shape {tuple(log_partition.shape)}")
    check_float_dtype("log_partition", log_partition.dtype)
    check_device("log_partition", log_partition, query.device, "`query`")
    if log_partition.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_log_partition(log_partition.item())
    wide = torch.float64 if log_partition.dtype == torch.float64 else torch.float32
    return log_partition.detach().to(wide)


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        check_tensor("weight", weight)
        if weight.shape != loss.shape:
            raise ValueError(
                f"`weight` must have shape (B,) with B={loss.shape[0]}, got {tuple(weight.shape)}"
            )
        if weight.is_complex():
            raise TypeError(f"`weight` must be real, got {weight.dtype}")
        check_device("weight", weight, loss.device, "`query`")
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
