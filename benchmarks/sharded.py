"""A loss against a bank that is sharded over R processes, and what they send for it:

    python -m codir_fast.benchmarks.sharded --ranks 1 2 4 --rows 65536 1048576

Processes of this machine, one thread each, talk by gloo; a step is loss and gradient of all ranks'
queries. Beside it, in the same interleaved rounds, what it is made of: each rank's scan of its own
rows alone, and the same step with one row a rank, which is all but the scan. A time is that of the
slowest rank. What must leave a rank is counted as the collectives are called; what the loopback
device sent is counted by the kernel, where it tells.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from codir_fast.benchmarks import measure

import codir_fast
from codir_fast.distributed import partial_sums

_NETWORK = Path("/proc/net/dev")
_TEMPERATURE = 0.07
Step = Callable[[], Any]


def main() -> None:
    options = _parse()
    rows = []
    for num_ranks in options.ranks:
        for K in options.rows:
            row = measure_ranks(num_ranks, options.queries, K, options.dim, options.rounds)
            print(as_line(row) if rows else as_table([row]), flush=True)
            rows.append(row)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        results = {"machine": measure.stamp(), "rows": rows}
        (options.out / "sharded.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "sharded.md").write_text(as_table(rows) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes, R")
    parser.add_argument("--rows", type=int, nargs="+", default=[65536, 1 << 20], help="K, of all")
    parser.add_argument("--queries", type=int, default=256, help="B, of all ranks; R divides it")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for sharded.md and sharded.json")
    options = parser.parse_args()
    for name in ("ranks", "rows", "queries", "dim", "rounds"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} must be at least 1, got {values}")
    if any(options.queries % num_ranks for num_ranks in options.ranks):
        parser.error(f"--queries must be divisible by {options.ranks}, got {options.queries}")
    return options


def measure_ranks(num_ranks: int, B: int, K: int, D: int, num_rounds: int) -> dict[str, Any]:
    """The figures of one table row, from processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, folder, B, K, D, num_rounds)
        torch.multiprocessing.spawn(_run_rank, arguments, nprocs=num_ranks)
        figures = json.loads((Path(folder) / "figures.json").read_text())
    return {"R": num_ranks, "B": B, "K": K, "D": D, **figures}


def _run_rank(
    rank: int, num_ranks: int, folder: str, B: int, K: int, D: int, num_rounds: int
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    torch.manual_seed(rank)
    group = dist.group.WORLD
    steps = _steps(group, B, K, D)
    times = _slowest(_interleaved(list(steps.values()), num_rounds), num_ranks)
    figures: dict[str, Any] = {
        name: statistics.median(taken) for name, taken in zip(steps, times, strict=True)
    }
    for name in ("step", "enqueue"):
        figures[f"{name}_sent"] = _sent(steps[name])
        figures[f"{name}_on_loopback"] = _on_loopback(steps[name], num_ranks)
    if rank == 0:
        (Path(folder) / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def _steps(group: Any, B: int, K: int, D: int) -> dict[str, Step]:
    """What is timed, by name."""
    num_ranks = dist.get_world_size(group)
    own = B // num_ranks
    loss_fn = codir_fast.ContrastiveLoss(_TEMPERATURE, process_group=group)
    bank, nearly_empty = (_full_queue(rows, D, group) for rows in (K, num_ranks))
    query, key = torch.randn(own, D, requires_grad=True), torch.randn(own, D)
    every_query, every_key = torch.randn(B, D), torch.randn(B, D)

    def step(queue: codir_fast.MemoryQueue) -> None:
        query.grad = None
        loss_fn(query, key, queue).backward()

    return {
        "step": lambda: step(bank),
        "scan": lambda: partial_sums(every_query, every_key, bank, temperature=_TEMPERATURE),
        "rest": lambda: step(nearly_empty),
        "enqueue": lambda: bank.enqueue(key),
    }


def _full_queue(K: int, D: int, group: Any) -> codir_fast.MemoryQueue:
    queue = codir_fast.MemoryQueue(K, D, process_group=group)
    rows = torch.nn.functional.normalize(torch.randn(queue.rows.shape), dim=1)
    filled = {"rows": rows, "valid": torch.ones_like(queue.valid)}
    queue.load_state_dict({**queue.state_dict(), **filled})
    return queue


def _interleaved(runs: list[Step], num_rounds: int) -> list[list[float]]:
    """Seconds of each function in each round, on this rank; all ranks start it together."""
    taken: list[list[float]] = [[] for _ in runs]
    order, shuffle = list(range(len(runs))), random.Random(0).shuffle
    for run in runs:  # the first call of each pays for what is made once
        run()
    for _ in range(num_rounds):
        shuffle(order)  # alike on all ranks
        for n in order:
            dist.barrier()
            start = time.perf_counter()
            runs[n]()
            taken[n].append(time.perf_counter() - start)
    return taken


def _slowest(taken: list[list[float]], num_ranks: int) -> list[list[float]]:
    """The same, of the slowest rank in each round."""
    longest = torch.tensor(taken, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()


def _sent(run: Step) -> int:
    """Bytes that must leave the rank which sends most, in one call."""
    with _counted() as sent:
        run()
    most = torch.tensor(sent[0])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Adds up what this rank's collectives must send to others: of an all-gather its block to each,
    of an all-to-all what is not its own.
    """
    sent, rank, num_ranks = [0], dist.get_rank(), dist.get_world_size()
    gather_name = (
        "all_gather_single" if hasattr(dist, "all_gather_single") else ("all_gather_into_tensor")
    )
    gather, exchange = getattr(dist, gather_name), dist.all_to_all_single

    def counted_gather(output: Any, block: Any, **options: Any) -> Any:
        sent[0] += (num_ranks - 1) * block.numel() * block.element_size()
        return gather(output, block, **options)

    def counted_exchange(output: Any, given: Any, *splits: Any, **options: Any) -> Any:
        own = splits[1][rank] if splits else len(given) // num_ranks
        row_bytes = given.element_size() * given.shape[1:].numel()
        sent[0] += (len(given) - own) * row_bytes
        return exchange(output, given, *splits, **options)

    setattr(dist, gather_name, counted_gather)
    dist.all_to_all_single = counted_exchange
    try:
        yield sent
    finally:
        setattr(dist, gather_name, gather)
        dist.all_to_all_single = exchange


def _on_loopback(run: Step, num_ranks: int, calls: int = 5) -> float | None:
    """Bytes that the kernel sent over the loopback device in a call, of all ranks and whoever else
    uses it, divided by the ranks; the least of several calls.
    """
    least = None
    for _ in range(calls):
        dist.barrier()
        before = _loopback_bytes()
        dist.barrier()
        run()
        dist.barrier()
        after = _loopback_bytes()
        if before is None or after is None:
            return None
        each = (after - before) / num_ranks
        least = each if least is None else min(least, each)
        dist.barrier()
    return least


def _loopback_bytes() -> int | None:
    """Sent since the machine started."""
    try:
        lines = _NETWORK.read_text().splitlines()
    except OSError:
        return None
    loopback = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(loopback[0][8]) if loopback else None


_COLUMNS = (
    "R",
    "K",
    "ms a step",
    "scan alone",
    "all but the scan",
    "KB sent by a rank",
    "on loopback",
    "ms an enqueue",
    "KB sent by a rank",
)


def as_table(rows: list[dict[str, Any]]) -> str:
    head = [f"| {' | '.join(_COLUMNS)} |", f"|{'---:|' * len(_COLUMNS)}"]
    return "\n".join([*head, *map(as_line, rows)])


def as_line(row: dict[str, Any]) -> str:
    ms = {name: 1e3 * row[name] for name in ("step", "scan", "rest", "enqueue")}
    loopback = row["step_on_loopback"]
    cells = [
        str(row["R"]),
        f"{row['K']:,}",
        *(f"{ms[name]:.3g}" for name in ("step", "scan", "rest")),
        f"{row['step_sent'] / 1e3:.1f}",
        "unknown" if loopback is None else f"{loopback / 1e3:.1f}",
        f"{ms['enqueue']:.3g}",
        f"{row['enqueue_sent'] / 1e3:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
