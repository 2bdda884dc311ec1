"""Banks and losses over a process group of torch.distributed.

    torch.distributed.init_process_group()  # under torchrun, accelerate or SLURM
    group = torch.distributed.group.WORLD
    queue = codir_fast.MemoryQueue(1 << 20, 128, process_group=group)
    loss_fn = codir_fast.ContrastiveLoss(process_group=group)
    loss_fn(query, key, queue).backward()  # each rank with its own batch
    queue.enqueue(key)

Rank r of R holds rows [r * ceil(K / R), (r + 1) * ceil(K / R)) of a sharded bank. `enqueue` and
`update` send each key to the rank that holds its row; afterwards the ranks hold together what one
process would that had their batches one after the other, rank 0's first. Row numbers and labels are
those of the whole bank; `rows`, `keys`, `labels` and len() of a sharded bank are of this rank.

All ranks must take the same steps: each loss, `enqueue` and `update` is one on all of them, also
with no rows. Ranks that differ in a setting (D, dtype, temperature, objective, size of the bank)
are told so, by the small exchange of batch sizes that each step begins with. A rank that ends, or
does not come within the timeout of the process group, ends the others' step with a RuntimeError.

Without a process group nothing here is at work: a bank is this process's own, filled by its own
batches, though others run beside it; DistributedDataParallel then copies rank 0's over them in each
forward pass if the bank is part of the model that it wraps. That is rarely meant.

With B queries on all ranks, a loss sends about (R-1)/R * B * (2D + D + 2) numbers from each rank,
whatever K is: queries and positives to all, partial sums back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from codir_fast.bank_rows import ROW_BUFFERS, SHARD_MARK, BankRows
from codir_fast.checks import check_choice, check_flag
from codir_fast.loss_arguments import (
    OBJECTIVES,
    as_scalar,
    check_constants,
    check_float8,
    check_pair,
    inverse_temperature,
    product_dtype,
    refuse_picks,
)
from codir_fast.negative_rows import RowForm
from codir_fast.negatives import Negatives, choose_negatives
from codir_fast.ops.contrast import PreparedPair
from codir_fast.partial_sums import PartialSums, combine_partial_sums
from codir_fast.sharded_contrast import positive_sums, scan
from codir_fast.sharded_passes import Objective
from codir_fast.sharding import GlobalBatch, check_dst

__all__ = [
    "PartialSums",
    "combine_partial_sums",
    "gather_state",
    "ignore_shards_in_ddp",
    "partial_sums",
    "reshard_state",
]


def ignore_shards_in_ddp(model: nn.Module) -> None:
    """Makes DistributedDataParallel leave the sharded banks of `model` alone, whose buffers it
    would overwrite with rank 0's; to be called before it wraps `model`.
    """
    banks = _banks(model, sharded=True).items()
    ignored = {
        f"{prefix}{buffer}"
        for bank, prefixes in banks
        for prefix in prefixes
        for buffer, _ in bank.named_buffers(recurse=False)
    }
    ignored |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def gather_state(module: nn.Module, *, dst: int = 0) -> dict[str, Any] | None:
    """The state_dict of a module with sharded banks, of all their rows, on the CPU: what one
    process would save. A step of all ranks, `dst` of their group gets it, others None.

    It loads with load_state_dict into banks of one process and of any number of ranks, each of
    which takes its own rows. Rank `dst` needs memory for all rows.

    Args:
        module: a bank, or a module with any number of them, sharded or not.
        dst: the rank, in [0, R) of each bank's process group, that gets the state.

    Returns:
        On rank `dst` the state_dict with (K, ...) in place of this rank's rows, without
        `first_row`; None on the others. On each rank its own, where no bank is sharded. A bank with
        two names in `module` has one tensor under both; extra state that is no tensor stays as it
        is, rank `dst`'s.

    Raises:
        ValueError: `dst` is no rank of a sharded bank's process group; nothing was sent.
        RuntimeError: a rank has ended, or did not come in time.
    """
    banks = _banks(module, sharded=True)
    for bank in banks:
        assert bank.shard is not None
        check_dst(dst, bank.shard.ranks)
    state = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in module.state_dict().items()
    }
    is_dst = True
    for bank, prefixes in banks.items():
        assert bank.shard is not None
        is_dst = bank.shard.ranks.rank == dst
        for prefix in prefixes:
            del state[f"{prefix}{SHARD_MARK}"]
        for buffer_name in ROW_BUFFERS:
            buffer = getattr(bank, buffer_name)
            if buffer is not None:
                whole = bank.shard.gathered("gather_state", buffer, dst)
                state |= {f"{prefix}{buffer_name}": whole for prefix in prefixes}
    return state if is_dst else None


def reshard_state(states: Iterable[Mapping[str, Any]], module: nn.Module) -> dict[str, Any]:
    """The state that `module` loads on this rank, out of the state_dicts that all ranks of a run
    saved, of however many ranks, in whatever order.

    Of each state only the rows that this rank holds are kept: a generator that reads one file
    after the other needs no memory for all. What belongs to no sharded bank is taken from the first
    state.

    Args:
        states: state_dicts of modules like `module`, with its names; or one of all rows.
        module: its banks, sharded or not, say which rows are wanted.

    Raises:
        ValueError: rows that are in none of the states; no states.
    """
    result: dict[str, Any] = {}
    banks = _banks(module)
    covered = {bank: torch.zeros(len(bank.rows), dtype=torch.bool) for bank in banks}
    of_banks = {
        f"{prefix}{buffer}"
        for prefixes in banks.values()
        for prefix in prefixes
        for buffer in (*ROW_BUFFERS, SHARD_MARK)
    }
    seen = False
    for state in states:
        seen = True
        for bank, (prefix, *_) in banks.items():
            _take_rows(result, covered[bank], state, prefix, bank)
        for name in state.keys() - result.keys() - of_banks:
            result[name] = state[name]
    if not seen:
        raise ValueError("`states` must hold a state for each rank of the run, got none")
    for bank, (prefix, *others) in banks.items():
        if not bool(covered[bank].all()):
            missing = int((~covered[bank]).nonzero()[0]) + _first(bank)
            raise ValueError(
                f"`states` must hold all rows of `{prefix}rows`, row {missing} is in none"
            )
        if bank.shard is not None:
            result[f"{prefix}{SHARD_MARK}"] = torch.tensor(bank.shard.first)
        for buffer in (*ROW_BUFFERS, SHARD_MARK):
            if f"{prefix}{buffer}" in result:
                value = result[f"{prefix}{buffer}"]
                result |= {f"{other}{buffer}": value for other in others}
    return result


@torch.no_grad()
def partial_sums(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Negatives,
    *,
    temperature: float | Tensor = 0.07,
    objective: str = "infonce",
    normalize: bool = True,
    backend: str = "auto",
    labels: Tensor | None = None,
    negative_labels: Tensor | None = None,
    negative_index: Tensor | None = None,
    exclude_index: Tensor | None = None,
    log_partition: float | Tensor | None = None,
    num_noise: int | None = None,
    num_data: int | None = None,
) -> PartialSums:
    """Loss and gradients of each query over a part of its negatives, for a topology of your own;
    combine_partial_sums makes those of several parts one. Nothing is communicated.

    Of a sharded bank it takes the rows of this rank, numbered from 0 on.

    Args:
        query, positive_key, temperature, objective, normalize, backend: as for contrastive_loss.
        negative_keys: a tensor, of any number of rows, or a bank. None: NCE's term of the
            positive, one part of its sum; 0 in InfoNCE, whose parts all know the positive.
        labels, negative_labels, negative_index, exclude_index: as for contrastive_loss, of these
            negatives; refused with `negative_keys` None.
        log_partition: log Z, a number or 0-d tensor; NCE needs it, InfoNCE has none.
        num_noise, num_data: M and n, at least 1, of all negatives together: the same for every
            part. NCE needs both, InfoNCE has none.

    Returns:
        PartialSums: loss (B,) in nats, dquery (B, D), dinv_temperature (B,); float32, or float64
        for float64 input. Nothing of it is differentiable.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value, one that is missing or does
            not belong to the objective or the part; the message names the argument.
        RuntimeError: the named backend can't run here.

    Example:
        >>> parts = [partial_sums(q, p, rows) for rows in bank.split(1000)]
        >>> loss, dquery, _ = combine_partial_sums(parts)  # as contrastive_loss(q, p, bank)
    """
    check_choice("objective", objective, OBJECTIVES)
    check_flag("normalize", normalize)
    M, n = check_constants(objective, log_partition, num_noise, num_data)
    check_pair(query, positive_key)
    is_of_positive = negative_keys is None
    if negative_keys is None:
        refuse_picks(
            labels=labels,
            negative_labels=negative_labels,
            negative_index=negative_index,
            exclude_index=exclude_index,
        )
        negative_keys = query[:0]
    here = None
    if isinstance(negative_keys, BankRows) and negative_keys.shard is not None:
        ranks, num_rows = negative_keys.shard.ranks, len(negative_keys.rows)
        here = GlobalBatch(ranks, (len(query),), 0, num_rows)
    picks = (labels, negative_labels, negative_index, exclude_index)
    form = RowForm(normalize, product_dtype(query, backend), backend)
    chosen = choose_negatives(query, positive_key, negative_keys, form, *picks, here)
    check_float8(chosen, temperature)
    log_z = None if log_partition is None else as_scalar(log_partition, query)
    inv_temperature = inverse_temperature(temperature, query)
    meant = Objective(inv_temperature, log_z, M, n, normalize, backend)
    if objective == "infonce":
        return scan(query, positive_key, chosen, meant)
    pair, meant = PreparedPair(query, positive_key, normalize), replace(meant, normalize=False)
    if is_of_positive:
        sums, _ = positive_sums(pair.query, pair.positive, chosen, meant)
    else:
        sums = scan(pair.query, pair.positive, chosen, meant)
    loss, dquery, dinv_temperature = sums
    dquery = pair.bring_back((loss, loss, dquery, dquery, dinv_temperature))[2]
    return PartialSums(loss, dquery, dinv_temperature)


def _banks(module: nn.Module, *, sharded: bool = False) -> dict[BankRows, list[str]]:
    """The banks of a module, or the sharded ones, each with the prefixes of its buffers' names: as
    many as it has names, under all of which state_dict has it.
    """
    banks: dict[BankRows, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, BankRows) and not (sharded and part.shard is None):
            banks.setdefault(part, []).append(f"{name}." if name else "")
    return banks


def _first(bank: BankRows) -> int:
    return 0 if bank.shard is None else bank.shard.first


def _take_rows(
    result: dict[str, Any],
    covered: Tensor,
    state: Mapping[str, Any],
    prefix: str,
    bank: BankRows,
) -> None:
    """Copies the rows that `bank` holds out of a state that has some of them."""
    if f"{prefix}rows" not in state:
        raise ValueError(f"`states` must hold `{prefix}rows` as `module` does, one has none")
    wanted, num_rows = _first(bank), len(bank.rows)
    first, rows = int(state.get(f"{prefix}{SHARD_MARK}", 0)), state[f"{prefix}rows"]
    if first + len(rows) > bank.size:
        raise ValueError(
            f"`states` must be of a bank of {bank.size} rows as `{prefix}rows`, got row "
            f"{first + len(rows) - 1}"
        )
    begin = max(wanted, first)
    end = max(begin, min(wanted + num_rows, first + len(rows)))
    for name in (f"{prefix}{name}" for name in ROW_BUFFERS):
        if name in state:
            value = state[name]
            if name not in result:
                result[name] = value.new_zeros(num_rows, *value.shape[1:])
            result[name][begin - wanted : end - wanted] = value[begin - first : end - first]
    covered[begin - wanted : end - wanted] = True
