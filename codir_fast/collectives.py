"""Collectives of torch.distributed as sharded banks need them: of rows in ragged batches, started
now and waited for later, with a check that all ranks ask for the same.
"""

import functools
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from codir_fast.checks import as_number

T = TypeVar("T")
Settings = tuple[tuple[str, Any], ...]


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """Makes torch.compile run the function as it is. torch.compiler.disable as a decorator would
    load the compiler for everyone.
    """

    @functools.wraps(function)
    def call(*args: Any) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args)
        return function(*args)

    return call


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a group, each with its own part of the rows.

    torch.distributed keeps the group, until it is destroyed. Who kept it for longer would keep its
    threads: where those of gloo outlive Python, the process ends with SIGABRT.
    """

    _group: Callable[[], Any]
    rank: int
    size: int

    @property
    def group(self) -> Any:
        group = self._group()
        if group is None:
            raise RuntimeError(
                "`process_group` was destroyed: a loss or a bank is made for another one anew"
            )
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a process group is no copy of another

    def is_of(self, process_group: Any) -> bool:
        return self._group() is process_group


def ranks_of(process_group: Any) -> Ranks | None:
    """The ranks of a process group; None where this process is alone, in a group or without one.

    Raises:
        TypeError: no process group.
        ValueError: a group that this process is no member of.
    """
    if process_group is None:
        return None
    if process_group is getattr(dist.GroupMember, "NON_GROUP_MEMBER", None):
        raise ValueError("`process_group` must be one that this process is a member of")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "`process_group` must be a torch.distributed.ProcessGroup or None, "
            f"got {type(process_group).__name__}"
        )
    size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return Ranks(weakref.ref(process_group), rank, size) if size > 1 else None


class Pending(Generic[T]):
    """What a collective that runs will have brought."""

    def __init__(self, ranks: Ranks, what: str, work: Any, read: Callable[[], T]) -> None:
        self._ranks, self._what, self._work, self._read = ranks, what, work, read

    def wait(self) -> T:
        with _explained(self._ranks, self._what):
            self._work.wait()
        return self._read()


def gather(
    ranks: Ranks, what: str, columns: Sequence[Tensor], sizes: Sequence[int]
) -> Pending[list[Tensor]]:
    """Every rank's rows of each column, in the order of ranks; this rank has sizes[rank] of them.

    Ranks with fewer rows send as many bytes as the one with most.
    """
    packed, most = _pack(columns), max(sizes)
    block = packed
    if len(packed) < most:
        block = packed.new_zeros(most, packed.shape[1])
        block[: len(packed)] = packed
    out = packed.new_empty(ranks.size * most, packed.shape[1])
    work = _launch(ranks, what, _all_gather(), out, block)

    def read() -> list[Tensor]:
        if sum(sizes) == len(out):
            return _unpack(out, columns)
        blocks = zip(out.split(most), sizes, strict=True)
        return _unpack(torch.cat([block[:size] for block, size in blocks]), columns)

    return Pending(ranks, what, work, read)


def exchange(
    ranks: Ranks, what: str, columns: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]
) -> Pending[list[Tensor]]:
    """Sends the first send[0] rows of each column to rank 0, the next send[1] to rank 1, and so on;
    gives what came, receive[0] rows of rank 0 first.
    """
    packed = _pack(columns)
    out = packed.new_empty(sum(receive), packed.shape[1])
    work = _launch(ranks, what, dist.all_to_all_single, out, packed, list(receive), list(send))
    return Pending(ranks, what, work, lambda: _unpack(out, columns))


def agree(
    ranks: Ranks,
    what: str,
    settings: Settings,
    counts: tuple[int, int],
    device: torch.device,
    mark: Tensor | None = None,
) -> list[tuple[int, int, int]]:
    """Every rank's two counts and its mark, a number on the device; one small collective, which
    tells too whether all ranks mean the same.

    Raises:
        ValueError: ranks differ in a setting; on each of them, naming it.
    """
    digest = _digest(what, settings)
    header = torch.tensor([[digest, *counts, 0]], dtype=torch.int64).to(device)
    if mark is not None:
        header[0, 3] = mark
    out = header.new_empty(ranks.size, 4)
    work = _launch(ranks, what, _all_gather(), out, header)
    rows = Pending(ranks, what, work, out.tolist).wait()
    if any(row[0] != digest for row in rows):
        raise ValueError(_difference(ranks, what, settings, device))
    return [tuple(row[1:]) for row in rows]


def exchange_counts(ranks: Ranks, what: str, send: Tensor) -> list[int]:
    """How many rows each rank will send here, (R,), as it says there how many to each."""
    out = torch.empty_like(send)
    work = _launch(ranks, what, dist.all_to_all_single, out, send)
    return Pending(ranks, what, work, out.tolist).wait()


def gather_blocks(ranks: Ranks, what: str, block: Tensor, dst: int) -> list[Tensor] | None:
    """Every rank's block, all of one shape and dtype, on rank dst; None on the others."""
    sent = _as_bytes(block)
    blocks = [torch.empty_like(sent) for _ in range(ranks.size)] if ranks.rank == dst else None
    group = ranks.group
    with _explained(ranks, what):
        dist.gather(sent, blocks, group=group, group_dst=dst)
    if blocks is None:
        return None
    return [_of_bytes(block_bytes, block) for block_bytes in blocks]


def gather_bytes(ranks: Ranks, what: str, data: bytes, device: torch.device) -> list[bytes]:
    """Every rank's bytes, of any number, on all ranks."""
    every = agree(ranks, what, (), (len(data), 0), device)
    sizes = [size for size, *_ in every]
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    (all_bytes,) = gather(ranks, what, [own], sizes).wait()
    return [part.cpu().numpy().tobytes() for part in all_bytes.split(sizes)]


def _difference(ranks: Ranks, what: str, settings: Settings, device: torch.device) -> str:
    """Which setting ranks differ in, as all of them see it."""
    given = {name: as_number(value) for name, value in settings}
    text = json.dumps([what, given], default=str).encode()
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    lengths = torch.empty(ranks.size, dtype=torch.int64, device=device)
    length = torch.tensor([len(text)], device=device)
    Pending(ranks, what, _launch(ranks, what, _all_gather(), lengths, length), list).wait()
    texts = gather(ranks, what, [own], sizes := lengths.tolist()).wait()[0].split(sizes)
    every = [json.loads(bytes(text.tolist())) for text in texts]
    if len({name for name, _ in every}) > 1:
        return f"ranks must take the same step, got {_by_rank([name for name, _ in every])}"
    names = dict.fromkeys(name for _, given in every for name in given)
    values = {name: [given.get(name) for _, given in every] for name in names}
    differing = next((name for name in names if len(set(map(_written, values[name]))) > 1), None)
    if differing is None:  # objects that only look alike
        return f"ranks must pass the same settings to {what}, got others: {values}"
    return (
        f"`{differing}` must be the same on all ranks in {what}, got {_by_rank(values[differing])}"
    )


def _by_rank(values: Sequence[Any]) -> str:
    """At most as many ranks as a reader can compare."""
    first = next(n for n, value in enumerate(values) if _written(value) != _written(values[0]))
    return f"{values[0]} on rank 0 and {values[first]} on rank {first}"


def _digest(what: str, settings: Settings) -> int:
    # Not cached: a cache would take its time for keys that are equal but written differently.
    meant = repr((what, [(name, _written(value)) for name, value in settings]))
    digest = hashlib.blake2b(meant.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _written(value: Any) -> str:
    """How a setting is compared: equal numbers are written alike, 1 and 1.0 and True; NaN too."""
    number = as_number(value)
    if isinstance(number, int):
        return repr(int(number))
    if isinstance(number, float):
        number = float(number)  # numpy's float64 is one, but is written differently
        return repr(int(number) if number.is_integer() else number)
    return repr(value)


def _all_gather() -> Callable[..., Any]:
    # all_gather_into_tensor is its name up to torch 2.12.
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _launch(ranks: Ranks, what: str, collective: Callable[..., Any], *arguments: Any) -> Any:
    group = ranks.group
    with _explained(ranks, what):
        return collective(*arguments, group=group, async_op=True)


@contextmanager
def _explained(ranks: Ranks, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"codir_fast: {what} could not talk to all ranks (this is rank {ranks.rank} of "
            f"{ranks.size}): one of them has ended, or did not come to this step in time; its own "
            f"output says why. {error}"
        ) from error


def _pack(columns: Sequence[Tensor]) -> Tensor:
    """All columns of a row side by side, as bytes, so that they travel at once."""
    packed = [_as_bytes(column) for column in columns]
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)


def _as_bytes(column: Tensor) -> Tensor:
    """(N, bytes of a row)."""
    rows = column.detach().reshape(len(column), _width(column)).contiguous()
    if rows.stride(-1) != 1:  # of a single number per row, which counts as contiguous all the same
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.uint8)


def _width(column: Tensor) -> int:
    """Elements of a row, also where there is none."""
    return column.shape[1:].numel()


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [_width(column) * column.element_size() for column in like]
    parts = packed.split(sizes, dim=1)
    return [_of_bytes(part, column) for part, column in zip(parts, like, strict=True)]


def _of_bytes(rows: Tensor, like: Tensor) -> Tensor:
    if len(rows) < 2:  # counts as contiguous wherever it begins, also between two elements
        rows = rows.clone(memory_format=torch.contiguous_format)
    rows = rows.contiguous()
    return rows.view(like.dtype).reshape(len(rows), *like.shape[1:])
