"""ContrastiveLoss over a process group: loss and every gradient as of one process that has all
queries and all rows.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import codir_fast
from codir_fast.functional import contrastive_loss

D, K, M = 16, 41, 9
TEMPERATURE = 0.2
# Of a loss relative to itself, of a gradient to its largest element.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
# Queries of each rank.
BATCHES = {"even": (3, 3, 3, 3), "ragged": (5, 1, 2, 4), "empty": (0, 4, 0, 3)}
KINDS = (
    "queue",
    "labels",
    "excluded",
    "index",
    "in-batch",
    "in-batch labels",
    "rows",
    "rows labels",
    "rows index",
    "own",
)
OBJECTIVES = ("infonce", "nce")


class Problem(NamedTuple):
    """A loss of all queries; on a rank, those of its own, and its own rows."""

    query: Tensor
    positive: Tensor
    negatives: Any
    picks: dict[str, Any]  # by query
    row_picks: dict[str, Any]  # by row of the negatives


def make_problem(kind: str, B: int, dtype: torch.dtype = torch.float32, group=None) -> Problem:
    """The same on every rank but for its bank, if it has one, which is sharded over the group."""
    generator = torch.Generator().manual_seed(len(kind))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    query, positive = draw(B, D), draw(B, D)
    rows, row_labels = draw(K, D), integers(0, 3, K)
    picks: dict[str, Any] = {}
    if "label" in kind:
        picks["labels"] = integers(0, 3, B)
    if kind in ("excluded", "labels", "index", "rows"):
        picks["exclude_index"] = integers(-1, K, B)
    if "index" in kind:
        picks["negative_index"] = integers(0, K, B, M)
        picks["negative_index"][::2] %= 3  # rows named often, of few ranks, row 0 among them
    row_picks = {"negative_labels": row_labels} if kind == "rows labels" else {}
    if kind.startswith("in-batch"):
        return Problem(query, positive, None, picks, {})
    if kind.startswith("rows"):
        return Problem(query, positive, rows, picks, row_picks)
    if kind == "own":
        return Problem(query, positive, draw(B, M, D), picks, {})
    return Problem(query, positive, make_bank(kind, rows, row_labels, group), picks, {})


def make_bank(kind: str, rows: Tensor, labels: Tensor, group):
    """Filled by rank 0, but for some rows in the middle of an IndexedBank."""
    is_first = group is None or dist.get_rank(group) == 0
    if kind == "queue":
        queue = codir_fast.MemoryQueue(K, D, dtype=rows.dtype, process_group=group)
        queue.enqueue(rows if is_first else rows[:0])
        return queue
    bank = codir_fast.IndexedBank(K, D, dtype=rows.dtype, labels=labels, process_group=group)
    index = torch.cat([torch.arange(13), torch.arange(21, K)])
    bank.update(index if is_first else index[:0], rows[index] if is_first else rows[:0])
    return bank


def own_part(problem: Problem, sizes: tuple[int, ...], rank: int, num_ranks: int) -> Problem:
    own = own_queries(sizes, rank)
    negatives, rows = problem.negatives, own_rows(rank, num_ranks)
    if isinstance(negatives, Tensor):
        negatives = negatives[own if negatives.ndim == 3 else rows].clone()
    return Problem(
        problem.query[own].clone(),
        problem.positive[own].clone(),
        negatives,
        {name: value[own] for name, value in problem.picks.items()},
        {name: value[rows] for name, value in problem.row_picks.items()},
    )


def own_queries(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def own_rows(rank: int, num_ranks: int) -> slice:
    """Of a tensor of rows a rank may have any number, here 0 on rank 1."""
    cuts = [0, 7, 7, 20][:num_ranks] + [K]
    return slice(cuts[rank], cuts[rank + 1])


def loss_and_gradients(problem: Problem, upstream: Tensor | None = None, **options: Any):
    """The loss, and gradients by name; upstream: of the loss of each query."""
    tensors = {"query": problem.query, "positive": problem.positive}
    tensors["temperature"] = torch.tensor(TEMPERATURE, dtype=problem.query.dtype)
    if isinstance(problem.negatives, Tensor):
        tensors["negatives"] = problem.negatives
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    loss = contrastive_loss(
        leaves["query"],
        leaves["positive"],
        leaves.get("negatives", problem.negatives),
        temperature=leaves["temperature"],
        **problem.picks,
        **problem.row_picks,
        **options,
    )
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


class Setting(NamedTuple):
    """One call of the loss, by all ranks."""

    kind: str
    batch: str
    reduction: str = "mean"
    symmetric: bool = False
    weighted: bool = False
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self, own: slice, B: int) -> dict[str, Any]:
        weight = (0.5 + torch.arange(B) % 3)[own] if self.weighted else None
        upstream = (1 + torch.arange(B, dtype=self.dtype))[own]
        return {
            "upstream": upstream if self.reduction == "none" else None,
            "weight": weight,
            "reduction": self.reduction,
            "symmetric": self.symmetric,
            **dict(self.options),
        }


def of_rank(group, settings: list[Setting]) -> list[tuple]:
    """Loss and gradients of this rank, for each setting."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    results = []
    for setting in settings:
        sizes = BATCHES[setting.batch][:num_ranks]
        problem = make_problem(setting.kind, sum(sizes), setting.dtype, group)
        part = own_part(problem, sizes, rank, num_ranks)
        arguments = setting.arguments(own_queries(sizes, rank), sum(sizes))
        loss, gradients = loss_and_gradients(part, process_group=group, **arguments)
        arrays = {name: value.numpy() for name, value in gradients.items()}
        results.append((loss.numpy(), arrays))
    return results


def assert_settings(on_ranks, num_ranks: int, settings: list[Setting]) -> None:
    answers = on_ranks(of_rank, num_ranks, settings=settings)
    for setting, *of_ranks in zip(settings, *answers, strict=True):
        losses, gradients = zip(*of_ranks, strict=True)
        assert_one_process_gives(setting, losses, gradients)


def assert_one_process_gives(setting: Setting, losses, gradients) -> None:
    num_ranks = len(losses)
    sizes = BATCHES[setting.batch][:num_ranks]
    problem = make_problem(setting.kind, sum(sizes), setting.dtype)
    arguments = setting.arguments(slice(None), sum(sizes))
    expected, whole = loss_and_gradients(problem, **arguments)
    of_ranks = [torch.as_tensor(loss) for loss in losses]
    # "none" leaves to the user what makes the mean over ranks, DDP's, the global mean.
    share = 1.0 if setting.reduction == "none" else 1 / num_ranks
    got = (
        torch.cat(of_ranks) if setting.reduction == "none" else torch.stack(of_ranks).sum() * share
    )
    assert_same(got, expected, setting, "loss")
    for name, gradient in whole.items():
        parts = [torch.as_tensor(of_rank[name]) for of_rank in gradients]
        scale = 0.0
        if name == "temperature":  # a sum of terms up to logit / t each, of which little is left
            flow = {"none": sum(range(1, sum(sizes) + 1)), "mean": 1, "sum": sum(sizes)}
            scale = flow[setting.reduction] / TEMPERATURE**2
        got = torch.stack(parts).sum(0) if name == "temperature" else torch.cat(parts)
        assert_same(got * share, gradient, setting, name, scale)


def assert_same(got: Tensor, expected: Tensor, setting: Setting, name: str, scale=0.0) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, (setting, name)
    scale = max(scale, expected.abs().max().item())
    error = (got - expected).abs().max() / scale
    assert error <= TOLERANCE[setting.dtype], f"{setting}: {name} {error:.1e}"


@RANKS
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_gives_the_same(on_ranks, ranks, kind, objective):
    options = (("objective", objective),)
    settings = [
        Setting(kind, "even", weighted=True, options=options),
        Setting(kind, "ragged", reduction="none", options=options),
        Setting(kind, "empty", reduction="sum", weighted=True, options=options),
        Setting(kind, "ragged", symmetric=True, options=options),
        Setting(kind, "empty", dtype=torch.float64, options=options),
    ]
    assert_settings(on_ranks, ranks, settings)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"backend": "torch"},
        {"objective": "nce", "log_partition": 3.0, "num_data": 1000},
        {"objective": "nce", "normalize": False, "backend": "torch"},
    ],
    ids=str,
)
def test_options(on_ranks, options):
    kinds = ("labels", "index", "in-batch")
    settings = [Setting(kind, "ragged", options=tuple(options.items())) for kind in kinds]
    assert_settings(on_ranks, 3, settings)
