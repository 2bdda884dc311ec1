"""Drawing negatives of other labels from a bank, on its device."""

import torch
from torch import Tensor

from codir_fast.checks import check_count, check_device, check_flag, check_integers, check_tensor
from codir_fast.memory_bank import IndexedBank, MemoryQueue

# Random keys, or drawn rows, that one part of the queries holds at once.
_PART_ELEMENTS = 1 << 22
# With fewer than this many rows to choose from for each one drawn, all rows get a random key.
_DENSE_RATIO = 4
_SURPLUS = 1.25


@torch.no_grad()
def sample_negatives(
    bank: MemoryQueue | IndexedBank,
    labels: Tensor,
    M: int,
    generator: torch.Generator | None = None,
    *,
    replacement: bool = False,
) -> Tensor:
    """Rows of other labels, drawn uniformly for each query: (B, M) int64, for `negative_index`.

    Nothing of size B x K is made where K is much larger than M. On a GPU it waits for the device
    (how many rows there are decides whether M can be drawn), so that it belongs outside a CUDA
    graph. From a bank that is sharded over ranks each draws for its own queries, numbers of the
    whole bank; all ranks must call it, and labels and fill of all K rows go to each of them, 9
    bytes a row: a loss over all rows sends less.

    Args:
        bank: filled rows only are drawn; it must have labels.
        labels: (B,) integers, the queries' own labels, whose rows are left out.
        M: rows for each query.
        generator: of the bank's device; the same state draws the same rows. Default: torch's own.
        replacement: whether a row may be drawn twice for one query.

    Raises:
        ValueError: fewer than M such rows for a query (none at all, with replacement); names the
            query and how many there are.
        TypeError, ValueError: a wrong type, shape, dtype or device; a bank without labels.

    Example:
        >>> index = codir_fast.sample_negatives(bank, labels, 4096)
        >>> loss = loss_fn(query, positive_key, bank, negative_index=index)
    """
    check_flag("replacement", replacement)
    first, size, rows = _own_rows(bank, labels, M)
    if generator is not None:
        _check_generator(generator, rows.device)
    others = rows.shape[0] - size
    _check_enough(others, M, replacement)
    B = size.shape[0]
    if replacement:
        drawn = _randint(others[:, None], (B, M), generator)
    elif B == 0 or int(others.min()) < M * _DENSE_RATIO:
        drawn = _dense(others, M, generator)
    else:
        drawn = _sparse(others, M, generator)
    # Rows are in the order of their labels: past the query's own block, numbers go on behind it.
    return rows[drawn + (drawn >= first[:, None]) * size[:, None]]


def _own_rows(
    bank: MemoryQueue | IndexedBank, labels: Tensor, M: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Filled rows in the order of their labels, and where each query's own begin and how many they
    are.
    """
    if not isinstance(bank, (MemoryQueue, IndexedBank)):
        raise TypeError(
            f"`bank` must be a MemoryQueue or an IndexedBank, got {type(bank).__name__}"
        )
    M = check_count("M", M)
    if bank.row_labels is None:
        raise ValueError("`bank` must have labels; this one has none")
    check_tensor("labels", labels)
    check_integers("labels", labels, "(B,)", labels.shape[0] if labels.ndim == 1 else 0)
    check_device("labels", labels, bank.rows.device, "the bank")
    valid, row_labels = bank.of_all_rows("sample_negatives", bank.valid, bank.row_labels)
    filled = valid.nonzero()[:, 0]
    ordered, order = torch.sort(row_labels[filled], stable=True)
    own = labels.to(torch.int64)
    first = torch.searchsorted(ordered, own)
    return first, torch.searchsorted(ordered, own, right=True) - first, filled[order]


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(
            f"`generator` must be on the device of the bank, {device}, got {generator.device}"
        )


def _check_enough(others: Tensor, M: int, replacement: bool) -> None:
    if others.numel() == 0:
        return
    fewest, query = others.min(0)
    needed = 1 if replacement else M
    if int(fewest) < needed:
        raise ValueError(
            f"`M` must be at most the number of filled rows of other labels in the bank, "
            f"{int(fewest)} for query {int(query)}, got {M}"
        )


def _randint(high: Tensor, size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Integers in [0, high), with a high for each row."""
    # 63 random bits modulo `high`: for a bank of 2^32 rows, 2^-31 off from uniform.
    bits = torch.empty(size, dtype=torch.int64, device=high.device).random_(generator=generator)
    return bits % high


def _dense(others: Tensor, M: int, generator: torch.Generator | None) -> Tensor:
    """M of each query's `others` numbers: those with the largest random keys."""
    widest = int(others.max()) if others.numel() else M
    number = torch.arange(widest, device=others.device)
    parts = [others.new_empty(0, M)]
    for part in others.split(max(1, _PART_ELEMENTS // widest)):
        size = (part.shape[0], widest)
        keys = torch.rand(size, dtype=torch.float64, device=others.device, generator=generator)
        keys.masked_fill_(number >= part[:, None], -1)
        parts.append(keys.topk(M, dim=1, sorted=False).indices)
    return torch.cat(parts)


def _sparse(others: Tensor, M: int, generator: torch.Generator | None) -> Tensor:
    """M of each query's `others` numbers, at least _DENSE_RATIO * M of them: the first M different
    ones of a sequence of draws. Draws more where there are too few.
    """
    size = int(M * _SURPLUS) + 16
    parts = []
    for part in others.split(max(1, _PART_ELEMENTS // size)):
        drawn = _randint(part[:, None], (part.shape[0], size), generator)
        while True:
            is_new = _first_occurrences(drawn)
            if bool((is_new.sum(1) >= M).all()):
                break
            more = _randint(part[:, None], (part.shape[0], size), generator)
            drawn = torch.cat([drawn, more], dim=1)
        # Of a row's draws the new ones come first, in their order.
        order = torch.sort(is_new, dim=1, descending=True, stable=True).indices[:, :M]
        parts.append(drawn.gather(1, order))
    return torch.cat(parts)


def _first_occurrences(drawn: Tensor) -> Tensor:
    """Whether each number of a row has not come before in it."""
    ordered, order = torch.sort(drawn, dim=1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(is_new).scatter_(1, order, is_new)
