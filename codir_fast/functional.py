"""The contrastive loss as a function, and the estimate of NCE's constant: arguments are checked, in
a process group agreed on, and the losses of the directions reduced.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codir_fast.backend import in_batch_backend
from codir_fast.checks import check_device, check_tensor
from codir_fast.directions import arrange, losses_of
from codir_fast.global_batch import agree_on_batch, alike
from codir_fast.loss_arguments import (
    as_scalar,
    check_nce,
    check_options,
    check_pair,
    inverse_temperature,
    prepare,
)
from codir_fast.negatives import Negatives, in_batch_labels
from codir_fast.ops.in_batch_contrast import in_batch_contrast
from codir_fast.ops.loss_autograd import reduced
from codir_fast.sharded_contrast import gather_numbers
from codir_fast.sharded_passes import Direction, Objective
from codir_fast.sharding import GlobalBatch, refuse_transforms


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
    process_group: Any = None,
) -> Tensor:
    """Each query must recognise its positive key among many negatives.

    With s_i+ = q_i.p_i / t and s_ij = q_i.b_j / t over the allowed negatives A_i, in nats:

    InfoNCE: l_i = log(e^{s_i+} + sum_{j in A_i} e^{s_ij}) - s_i+.
    NCE: l_i = -log(P_i+ / (P_i+ + c + eps)) - sum_{j in A_i} log(c / (P_ij + c + eps)), with P(s) =
    e^s / Z, c = M / n for M negatives offered to each query out of n, and eps = 1e-7.

    Nothing of size B x K is made (by Triton, for D too wide for one pass, a block of weights at a
    time, of 16 MiB or of 128 negatives), and loss and gradients come out of one pass over the
    negatives. On a GPU products run in the dtype of `query`, float32 ones as
    torch.backends.cuda.matmul.fp32_precision says, and sums in float32 (NCE over several ranks: all
    in float32). On a CPU all runs in float32, or float64 for float64 input. In-batch InfoNCE
    that gives keys a gradient takes one pass forward and one backward, for one way or both, on a
    CPU and by Triton (there one way only while that is less work than two passes); `query` and
    `positive_key` may not change in between, as is usual in PyTorch. A query without
    negatives (an empty A_i, K = 0) has InfoNCE loss 0 and gradient 0; in NCE the positive's term
    stays, and c is 1 where M or n is 0. As in PyTorch, the mean over no query (B = 0) is NaN.

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
            for none. In-batch the own row is left out anyway. The range is checked on the CPU only,
            and not while compiling or under vmap.
        weight: (B,) factor on each query's loss, before the reduction.
        log_partition: log Z of NCE, a number or 0-d tensor, a constant to gradients. Default: of
            these inputs, see estimate_log_partition; ContrastiveLoss keeps that of its first batch.
        num_data: n of NCE, the number of examples that negatives are drawn from. Default: the rows
            of the (K, D) tensor or bank, B in-batch, M of (B, M, D).
        process_group: ranks of torch.distributed that have the queries and share the negatives, see
            below. Default: this process is alone, whether others run or not.

    Over a process group of R ranks, queries and negatives are those of all ranks, in rank order:
    in-batch the positive keys of all ranks; of a (K_r, D) tensor on each rank, all of them (the
    gradient comes back to each rank's own); a bank must be sharded over the same group. B is the
    sum of all B_r and K that of all K_r; `exclude_index` and `negative_index` are row numbers among
    all K. (B_r, M, D) negatives stay each query's own. A rank may have any number of queries, none
    too, but all ranks must call this at the same time with the same options, and go backward
    together where negatives need a gradient. Rank r returns, with S_r its own queries and
    l_i what one process would have for query i among all queries and negatives:

    mean: R / B * sum_{i in S_r} weight_i l_i. sum: R * sum_{i in S_r} weight_i l_i. none: l_i.

    So the mean of mean or sum over ranks is what one process would return, and so is the mean of
    the gradients, which DistributedDataParallel takes: a parameter gets
    1/R sum_r dloss_r = d(1/B sum_i weight_i l_i). Each rank's backward pass gives its inputs the
    gradient of the sum of all ranks' losses, other ranks' share in its negatives included.

    Returns:
        float32 (float64 for float64 input), (B,) or a scalar. Differentiable once in query,
        positive_key, negative_keys (a tensor), temperature (a tensor) and weight. Under autocast
        the three inputs may differ in dtype.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value, or one that differs between
            ranks; the message names the argument.
        RuntimeError: the named backend can't run here; a rank has ended, or did not come in time; a
            transform of torch.func, as grad or vmap, over several ranks.

    Example:
        >>> queue = codir_fast.MemoryQueue(65536, 128)
        >>> loss = contrastive_loss(query, positive_key, queue, temperature=0.07)

    Source: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding,
        eq. 4; He et al. 2020, Momentum Contrast, eq. 1. NCE: Tian et al. 2020, Contrastive
        Representation Distillation, eq. 18, and its code.
    """
    check_options(objective, reduction, normalize, symmetric)
    check_nce(objective, log_partition, num_data)
    check_pair(query, positive_key)
    given = (labels, negative_labels, negative_index, exclude_index)
    vectors, batch = (query, positive_key, negative_keys), None
    if process_group is not None:
        refuse_transforms("contrastive_loss", process_group)
        known = None if log_partition is None else "given"
        options = (("objective", objective), ("reduction", reduction), ("log_partition", known))
        settings = (*options, *alike(temperature, normalize, symmetric, num_data, *given))
        batch = agree_on_batch("contrastive_loss", process_group, vectors, settings)
    is_nce = objective == "nce"
    fused = None
    if batch is None and not is_nce and negative_keys is None:
        fused = _fused_backend(query, positive_key, symmetric, backend)
    if fused is not None:
        loss = in_batch_contrast(
            query,
            positive_key,
            inverse_temperature(temperature, query),
            in_batch_labels(query, *given),
            symmetric,
            normalize,
            backend=fused,
            reduction=reduction if weight is None else "none",
        )
        return loss if weight is None else _reduce(loss, weight, reduction, batch)
    ways, meant = arrange(vectors, temperature, normalize, symmetric, backend, given, batch, is_nce)
    if is_nce:
        if log_partition is None:
            log_z = _log_partition(ways, meant, num_data, batch)
        else:
            log_z = as_scalar(log_partition, query)
        negatives = ways[0][2]
        counts = (negatives.num_offered, num_data or negatives.num_rows)
        num_noise, num_data = counts if 0 not in counts else (1, 1)
        meant = replace(meant, log_partition=log_z, num_noise=num_noise, num_data=num_data)
    if weight is None and batch is None and not symmetric:
        return losses_of(ways, meant, batch, reduction)[0]
    per_query = losses_of(ways, meant, batch)
    loss = (per_query[0] + per_query[1]) / 2 if symmetric else per_query[0]
    return _reduce(loss, weight, reduction, batch)


def _fused_backend(
    query: Tensor, positive_key: Tensor, symmetric: bool, backend: str
) -> str | None:
    """Whose in_batch_contrast InfoNCE among the queries of this process is. One way, for keys that
    get no gradient, bank_contrast takes half of its operations.
    """
    if symmetric or positive_key.requires_grad or not torch.is_grad_enabled():
        return in_batch_backend(backend, query, symmetric)
    return None


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
    process_group: Any = None,
) -> Tensor:
    """log Z for the NCE objective, from one batch: Z = n * mean of e^s over all pairs of a query
    with its positive and its allowed negatives, of both directions if `symmetric`.

    Two passes over the negatives; over a process group of the batch of all ranks.

    Args:
        As of contrastive_loss. `num_data` is n; None: the number of all negatives there are.

    Returns:
        A 0-d tensor, float32 (float64 for float64 input), the same on each rank; -inf for B = 0.
        Not differentiable.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value; the message names the
            argument.
        RuntimeError: the backend can't run here; a rank has ended.

    Source: Tian et al. 2020, Contrastive Representation Distillation: its code fixes Z so at the
        first batch.
    """
    check_options("nce", "mean", normalize, symmetric)
    check_nce("nce", None, num_data)
    check_pair(query, positive_key)
    given = (labels, negative_labels, negative_index, exclude_index)
    vectors, batch = (query, positive_key, negative_keys), None
    if process_group is not None:
        refuse_transforms("estimate_log_partition", process_group)
        settings = alike(temperature, normalize, symmetric, num_data, *given)
        batch = agree_on_batch("estimate_log_partition", process_group, vectors, settings)
    ways, meant = arrange(vectors, temperature, normalize, symmetric, backend, given, batch, True)
    return _log_partition(ways, meant, num_data, batch)


@torch.no_grad()
def _log_partition(
    directions: list[Direction],
    objective: Objective,
    num_data: int | None,
    batch: GlobalBatch | None,
) -> Tensor:
    """`objective`: InfoNCE's."""
    per_query, lse = losses_of(directions, objective, batch), []
    for loss, (query, positive, _) in zip(per_query, directions, strict=True):
        q, p = prepare(query, positive, objective.normalize, objective.backend)
        lse.append(loss + (q * p).sum(1) * objective.inv_temperature.to(q.dtype))
    # Where all logits are 0, e^loss is the number of pairs; in double, it is exact: by whatever
    # backend has that.
    zero = torch.zeros_like(directions[0][0], dtype=torch.float64)
    zeros = [(zero, zero, replace(chosen, scale=None)) for *_, chosen in directions]
    zero_losses = losses_of(zeros, replace(objective, normalize=False, backend="auto"), batch)
    log_sum = torch.logsumexp(torch.cat(lse), 0)
    pairs = torch.cat(zero_losses).exp().round().sum()
    if batch is not None:
        numbers = gather_numbers(batch, torch.stack([log_sum.to(pairs.dtype), pairs]))
        log_sum, pairs = torch.logsumexp(numbers[:, 0], 0), numbers[:, 1].sum()
    log_mean = torch.where(pairs > 0, log_sum - pairs.log(), -torch.inf)
    log_n = log_mean.new_full((), num_data or directions[0][2].num_rows or 1).log()
    return (log_mean + log_n).to(per_query[0].dtype)


def _reduce(
    loss: Tensor, weight: Tensor | None, reduction: str, batch: GlobalBatch | None
) -> Tensor:
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
    if batch is None or reduction == "none":
        return reduced(loss, reduction)
    num_ranks = batch.ranks.size  # by which DDP will divide
    if reduction == "sum":
        return loss.sum() * num_ranks
    return loss.sum() * (num_ranks / batch.size if batch.size else math.nan)
