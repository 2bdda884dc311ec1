"""The contrastive loss as a function: checks, normalisation, choice of negatives, and one pass of
bank_contrast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.checks import (
    check_choice,
    check_device,
    check_float_dtype,
    check_tensor,
)
from codir_fast.negatives import (
    EPS,
    Negatives,
    check_input_dtype,
    choose_exclusion,
    choose_labels,
    choose_negatives,
)
from codir_fast.ops.bank_contrast import bank_contrast
from codir_fast.ops.indexed_contrast import indexed_contrast

OBJECTIVES = ("infonce", "nce")
REDUCTIONS = ("none", "mean", "sum")


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
) -> Tensor:
    """InfoNCE: each query must recognise its positive key among many negatives.

    l_i = log(e^{q_i.p_i/t} + sum_{j in A_i} e^{q_i.b_j/t}) - q_i.p_i/t, in nats. Nothing of size B
    x K is made, and loss and gradients come out of one pass over the negatives. A query without
    negatives (an empty A_i) has loss 0 and gradient 0. As in PyTorch, the mean over no query (B =
    0) is NaN.

    Args:
        query: q, (B, D), float32, float64, bfloat16 or float16.
        positive_key: p, (B, D), dtype and device of `query`.
        negative_keys: b. None: the other queries' positive keys, gradient included. (K, D): shared
            by all queries, dtype and device of `query`; gets a gradient if it requires one. A
            MemoryQueue or IndexedBank: its filled rows, without gradient, in the bank's own dtype.
            (B, M, D): M negatives of each query's own, as a (K, D) tensor otherwise.
        temperature: t > 0; a number, or a 0-d tensor, which gets a gradient if it requires one.
        objective: "infonce".
        normalize: L2-normalise query, positive and explicit negatives (a bank keeps its own rows
            unit length).
        reduction: "none" gives (B,), "mean" or "sum" a scalar.
        symmetric: not built yet.
        backend: see codir_fast.backends().
        labels: (B,) integers. Negatives of the query's own label are left out. With a (K, D) tensor
            `negative_labels` must be given too, a bank has its own, in-batch they are `labels`
            again.
        negative_labels: (K,) integers for a (K, D) tensor, (B, M) for a (B, M, D) one.
        negative_index: (B, M) integers in [0, K): only these rows of a (K, D) tensor or bank count
            for each query, one that is named twice counts twice. Rows are gathered inside the
            kernel, nothing of size B x M x D is made. The whole bank often costs little more: a
            dense pass reads it once for all queries.
        exclude_index: (B,) integers, the row of the negatives that is this query's own example, -1
            for none. In-batch the own row is left out anyway. The range is checked on the CPU only.
        weight: (B,) factor on each query's loss, before the reduction.

    Returns:
        float32 (float64 for float64 input), (B,) or a scalar. Differentiable once in query,
        positive_key, negative_keys (a tensor), temperature (a tensor) and weight. Under autocast
        the three inputs may differ in dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
        argument.
        NotImplementedError: objective "nce", symmetric=True.
        RuntimeError: the named backend can't run here.

    Example:
        >>> queue = codir_fast.MemoryQueue(65536, 128)
        >>> loss = contrastive_loss(query, positive_key, queue, temperature=0.07)

    Source: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding,
        eq. 4; He et al. 2020, Momentum Contrast, eq. 1.
    """
    check_options(objective, reduction, symmetric)
    _check_pair(query, positive_key)
    inv_temperature = _inverse(temperature)
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, p = query.to(compute), positive_key.to(compute)
    if normalize:
        q, p = F.normalize(q, dim=1, eps=EPS), F.normalize(p, dim=1, eps=EPS)
    negatives = choose_negatives(query, p, negative_keys, negative_index, normalize)
    vectors = (q.contiguous(), p.contiguous(), negatives.rows, inv_temperature)
    picks = (
        negatives.scale,
        *choose_labels(query, negatives, labels, negative_labels),
        choose_exclusion(query, negatives, exclude_index),
        negatives.valid,
    )
    if negatives.index is None:
        loss = bank_contrast(*vectors, *picks, backend=backend)
    else:
        loss = indexed_contrast(*vectors, negatives.index, *picks, backend=backend)
    return _reduce(loss, weight, reduction)


def check_options(objective: str, reduction: str, symmetric: bool) -> None:
    check_choice("objective", objective, OBJECTIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    if objective == "nce":
        raise NotImplementedError('`objective` "nce" is not built yet; "infonce" is')
    if symmetric:
        raise NotImplementedError("`symmetric=True` is not built yet")


def check_temperature(temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"`temperature` must be a number, got {type(temperature).__name__}")
    # Comparisons only: torch.compile can follow them.
    if not (0 < temperature < math.inf and 1 / temperature < math.inf):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}")


def _check_pair(query: Tensor, positive_key: Tensor) -> None:
    for name, value in (("query", query), ("positive_key", positive_key)):
        check_tensor(name, value)
        check_float_dtype(name, value.dtype)
    if query.ndim != 2:
        raise ValueError(f"`query` must have shape (B, D), got {tuple(query.shape)}")
    if positive_key.shape != query.shape:
        B, D = query.shape
        raise ValueError(
            f"`positive_key` must have shape (B, D) with B={B}, D={D} as `query`, "
            f"got {tuple(positive_key.shape)}"
        )
    check_device("positive_key", positive_key, query.device, "`query`")
    check_input_dtype("positive_key", positive_key, query)


def _inverse(temperature: float | Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
        return torch.full((), 1 / temperature, dtype=torch.float64, device="cpu")
    if temperature.ndim != 0:
        raise ValueError(f"`temperature` must be 0-d, got shape {tuple(temperature.shape)}")
    check_float_dtype("temperature", temperature.dtype)
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        check_temperature(temperature.item())
    wide = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return temperature.to(wide).reciprocal()


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        check_tensor("weight", weight)
        if weight.shape != loss.shape:
            raise ValueError(
                f"`weight` must have shape (B,) with B={loss.shape[0]}, got {tuple(weight.shape)}"
            )
        check_device("weight", weight, loss.device, "`query`")
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
