"""Steps that ranks take together: what they must have alike, what else they meet on the way, and
how one that fails ends the others.
"""

import math
import multiprocessing
import os
import re
import time
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import PRELOADED
from torch.nn.parallel import DistributedDataParallel

import codir_fast
from codir_fast.collectives import agree, exchange, gather, ranks_of
from codir_fast.distributed import ignore_shards_in_ddp
from codir_fast.functional import contrastive_loss

B, D, K = 4, 8, 20


def pair(**options):
    return torch.randn(B, D, **options), torch.randn(B, D, **options)


def loss_of(group, *vectors, **options):
    return contrastive_loss(*vectors, process_group=group, **options)


def queue(group, size=K, dim=D, **options):
    return codir_fast.MemoryQueue(size, dim, process_group=group, **options)


def bank(group, **options):
    return codir_fast.IndexedBank(K, D, process_group=group, **options)


# What rank 0 does, what the others do, and what all of them are told.
DIFFERENT = {
    "temperature": (
        lambda group: loss_of(group, *pair(), temperature=0.1),
        lambda group: loss_of(group, *pair(), temperature=0.2),
        "`temperature` must be the same on all ranks in contrastive_loss, got 0.1 on rank 0 and "
        "0.2 on rank 1",
    ),
    "learnt temperature": (
        lambda group: loss_of(group, *pair(), temperature=torch.tensor(0.5)),
        lambda group: loss_of(group, *pair(), temperature=torch.tensor(0.25)),
        "`temperature` must be the same on all ranks in contrastive_loss, got 0.5 on rank 0 and "
        "0.25 on rank 1",
    ),
    "objective": (
        lambda group: loss_of(group, *pair(), objective="nce", log_partition=1.0),
        lambda group: loss_of(group, *pair()),
        "`objective` must be the same on all ranks in contrastive_loss, got nce on rank 0 and "
        "infonce on rank 1",
    ),
    "width": (
        lambda group: loss_of(group, *pair()),
        lambda group: loss_of(group, torch.randn(B, D + 1), torch.randn(B, D + 1)),
        "`D` must be the same on all ranks in contrastive_loss, got 8 on rank 0 and 9 on rank 1",
    ),
    "dtype": (
        lambda group: loss_of(group, *pair()),
        lambda group: loss_of(group, *pair(dtype=torch.bfloat16)),
        "`query.dtype` must be the same on all ranks",
    ),
    "labels": (
        lambda group: loss_of(group, *pair(), labels=torch.arange(B)),
        lambda group: loss_of(group, *pair()),
        "`labels` must be the same on all ranks in contrastive_loss, got given on rank 0 and None",
    ),
    "negatives": (
        lambda group: loss_of(group, *pair()),
        lambda group: loss_of(group, *pair(), torch.randn(K, D)),
        "`negative_keys` must be the same on all ranks in contrastive_loss, got None on rank 0 and "
        "a 2-d Tensor on rank 1",
    ),
    "size of a bank in a loss": (
        lambda group: loss_of(group, *pair(), queue(group)),
        lambda group: loss_of(group, *pair(), queue(group, size=K + 1)),
        "got a MemoryQueue of 20 rows on rank 0 and a MemoryQueue of 21 rows on rank 1",
    ),
    "gradient": (
        lambda group: loss_of(group, *pair(requires_grad=True)),
        lambda group: loss_of(group, *pair()),
        "`positive_key.requires_grad` must be the same on all ranks in contrastive_loss, got True",
    ),
    "queue": (
        lambda group: queue(group).enqueue(torch.randn(1, D)),
        lambda group: queue(group, size=K + 1).enqueue(torch.randn(1, D)),
        "`size` must be the same on all ranks in MemoryQueue.enqueue, got 20 on rank 0 and 21 on",
    ),
    "bank": (
        lambda group: bank(group).update(torch.arange(2), torch.randn(2, D)),
        lambda group: bank(group, momentum=0.9).update(torch.arange(2), torch.randn(2, D)),
        "`momentum` must be the same on all ranks in IndexedBank.update, got 0.5 on rank 0 and 0.9",
    ),
    "step": (
        lambda group: loss_of(group, *pair()),
        lambda group: queue(group).enqueue(torch.randn(1, D)),
        "ranks must take the same step, got contrastive_loss on rank 0 and MemoryQueue.enqueue on "
        "rank 1",
    ),
}


def differ(group, case):
    first, other, message = DIFFERENT[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        (first if dist.get_rank(group) == 0 else other)(group)
    assert torch.isfinite(loss_of(group, *pair()))  # nothing was left on the way


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_are_told(on_ranks, case):
    on_ranks(differ, 3, case=case)


def equal_numbers(group):
    """A number is the same setting in whatever type, whatever was passed before."""
    rank = dist.get_rank(group)
    for given in ((1, 1.0), (2.0, 2), (2, 2.0), (np.int64(2), 2), (np.float64(0.5), 0.5)):
        assert torch.isfinite(loss_of(group, *pair(), temperature=given[min(rank, 1)]))
    if rank < 2:  # who passed an equal number before
        some = dist.new_group([0, 1], use_local_synchronization=True)
        assert torch.isfinite(loss_of(some, *pair(), temperature=3))
    assert torch.isfinite(loss_of(group, *pair(), temperature=3.0))
    # What is NaN, as a temperature that can't be read is, is alike on all ranks.
    settings = (("temperature", math.nan), ("labels", rank))
    with pytest.raises(ValueError, match="`labels` must be the same on all ranks in a test, got 0"):
        agree(ranks_of(group), "a test", settings, (0, 0), torch.device("cpu"))
    # Objects may differ without a sign of it.
    unlike = type(
        "Setting", (), {"__repr__": lambda self: f"<{rank}>", "__str__": lambda self: "s"}
    )
    with pytest.raises(ValueError, match="ranks must pass the same settings to a test, got others"):
        agree(ranks_of(group), "a test", (("it", unlike()),), (0, 0), torch.device("cpu"))


def test_equal_numbers_are_the_same_setting(on_ranks):
    on_ranks(equal_numbers, 3)


def transformed(group):
    """One rank alone is told, before it waits for others; functional_call transforms nothing."""
    query, key = pair()
    sharded = queue(group)
    loss_fn = codir_fast.ContrastiveLoss(process_group=group)
    nce = codir_fast.ContrastiveLoss(objective="nce", process_group=group)
    if dist.get_rank(group) == 0:
        for function, what in (
            (lambda x: loss_fn(x, key, sharded), "contrastive_loss"),
            (lambda x: loss_of(group, x, key), "contrastive_loss"),
            (lambda x: nce(x, key), "estimate_log_partition"),
        ):
            message = f"{what} with a `process_group` can't run under torch.func's transforms"
            for run, x in (
                (torch.func.grad(function), query),
                (torch.vmap(function), torch.stack([query, query])),
                (lambda x, function=function: torch.func.jvp(function, (x,), (x,)), query),
            ):
                with pytest.raises(RuntimeError, match=re.escape(message)):
                    run(x)
    loss = torch.func.functional_call(loss_fn, {}, (query, key, sharded))
    torch.testing.assert_close(loss, loss_fn(query, key, sharded))
    # One rank is this process alone, which may.
    alone = dist.new_group([dist.get_rank(group)], use_local_synchronization=True)
    dquery = torch.func.grad(lambda x: loss_of(alone, x, key))(query)
    torch.testing.assert_close(dquery, torch.func.grad(lambda x: contrastive_loss(x, key))(query))


def test_transforms_are_refused_at_the_door(on_ranks):
    on_ranks(transformed, 2)


def misuse(group):
    query, key = pair()
    sharded, whole = queue(group), codir_fast.MemoryQueue(K, D)
    with pytest.raises(ValueError, match="give the loss the same `process_group`"):
        codir_fast.ContrastiveLoss()(query, key, sharded)
    with pytest.raises(ValueError, match="got one without: each rank would have a bank of its own"):
        loss_of(group, query, key, whole)
    with pytest.raises(ValueError, match="a bank with the `process_group` of the loss, got"):
        loss_of(dist.group.WORLD, query, key, sharded)
    with pytest.raises(TypeError, match="`process_group` must be a torch.distributed.ProcessGroup"):
        codir_fast.ContrastiveLoss(process_group="gloo")
    # Alone beside others: nothing is shared.
    torch.manual_seed(dist.get_rank(group))
    whole.enqueue(torch.randn(2, D))
    assert len(whole) == 2 and torch.isfinite(codir_fast.ContrastiveLoss()(query, key, whole))


def test_misuse(on_ranks):
    on_ranks(misuse, 2)


class Encoders(torch.nn.Module):
    """Two towers, a queue of one's embeddings, and a learnt temperature."""

    def __init__(self, group, **options):
        super().__init__()
        self.query = torch.nn.Linear(D, D)
        self.key = torch.nn.Linear(D, D)
        self.queue = codir_fast.MemoryQueue(K, D, process_group=group)
        self.loss = codir_fast.ContrastiveLoss(
            0.5, learnable_temperature=True, process_group=group, **options
        )

    def forward(self, x, y, in_batch):
        query, key = self.query(x), self.key(y)
        loss = self.loss(query, key, None if in_batch else self.queue)
        return loss, key


def train(group, objective):
    """A model under DistributedDataParallel, on ragged batches, and one process's."""
    torch.manual_seed(0)
    rank = dist.get_rank(group)
    # `key` has no gradient from a queue: DDP must be told that it may go without.
    whole, model = (Encoders(of, objective=objective, symmetric=True) for of in (None, group))
    model.load_state_dict(whole.state_dict())
    ignore_shards_in_ddp(model)
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (whole, wrapped)]
    for step in range(6):
        sizes = [(3, 0, 2), (1, 4, 1), (2, 2, 2)][step % 3]
        x, y = torch.randn(2, sum(sizes), D)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for each, optimizer, part in zip(
            (whole, wrapped), optimizers, (slice(None), own), strict=True
        ):
            optimizer.zero_grad()
            loss, key = each(x[part], y[part], step % 2 == 0)
            loss.backward()
            optimizer.step()
            getattr(each, "module", each).queue.enqueue(key)
        for (name, expected), got in zip(whole.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=f"{step} {name}")
    shard = model.queue.shard
    torch.testing.assert_close(model.queue.rows, shard.own(whole.queue.rows))
    if objective == "nce":
        torch.testing.assert_close(model.loss.log_partition, whole.loss.log_partition)


@pytest.mark.parametrize("objective", ["infonce", "nce"])
def test_distributed_data_parallel(on_ranks, objective):
    on_ranks(train, 3, objective=objective)


def overwrite(group):
    model = Encoders(group)
    wrapped = DistributedDataParallel(model, process_group=group)
    wrapped(*torch.randn(2, 1, D), True)[0].backward()
    for step in (
        lambda: model.queue.enqueue(torch.randn(1, D)),
        lambda: wrapped(*torch.randn(2, 1, D), False),
    ):
        with pytest.raises(RuntimeError, match=r"ignore_shards_in_ddp\(model\) before it wraps"):
            step()


def test_a_bank_that_ddp_overwrites_is_noticed(on_ranks):
    on_ranks(overwrite, 2)


def compiled(group):
    sharded = queue(group)
    loss_fn = codir_fast.ContrastiveLoss(process_group=group)

    def step(query, key):
        loss = loss_fn(2 * query, key, sharded)
        sharded.enqueue(key)
        return loss + 1

    # The compiler takes seconds to start, which one rank is enough for.
    run = torch.compile(step, backend="eager") if dist.get_rank(group) == 0 else step
    sharded.enqueue(torch.randn(3, D))
    for _ in range(2):
        kept = sharded.state_dict()
        kept = {name: value.clone() for name, value in kept.items()}
        query, key = pair()
        query.requires_grad_()
        results = []
        for each in (step, run):
            sharded.load_state_dict(kept)
            loss = each(query, key)
            results.append((loss.detach(), *torch.autograd.grad(loss, query), sharded.keys))
        torch.testing.assert_close(*results)


def test_torch_compile(on_ranks):
    on_ranks(compiled, 2)


def no_second_derivative(group):
    query, key = (x.requires_grad_() for x in pair())
    loss = loss_of(group, query, key)
    (dquery,) = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dquery.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(dquery.sum(), query)


def test_a_second_derivative_is_refused(on_ranks):
    on_ranks(no_second_derivative, 2)


def ragged(group):
    """Columns of all dtypes and shapes, ragged and empty."""
    ranks = ranks_of(group)
    sizes = [2, 0, 3]
    columns = [
        torch.arange(2 * size).view(size, 2).bfloat16() + 10 * n for n, size in enumerate(sizes)
    ]
    flags = [torch.ones(size, dtype=torch.bool) for size in sizes]
    one = [torch.full((), float(n)).expand(size) for n, size in enumerate(sizes)]
    given = [columns, flags, one]
    own = [each[ranks.rank] for each in given]
    for got, expected in zip(gather(ranks, "a test", own, sizes).wait(), given, strict=True):
        assert torch.equal(got, torch.cat(expected)) and got.dtype == expected[0].dtype
    assert gather(ranks, "a test", [torch.zeros(0, 2)], [0, 0, 0]).wait()[0].shape == (0, 2)
    counts = torch.tensor([[0, 2, 1], [1, 0, 0], [2, 2, 2]])
    send, receive = counts[ranks.rank].tolist(), counts[:, ranks.rank].tolist()
    row = torch.arange(sum(send), dtype=torch.int32)[:, None] + 100 * ranks.rank
    (got,) = exchange(ranks, "a test", [row], send, receive).wait()
    begin = counts.cumsum(1) - counts
    expected = [
        100 * source + int(begin[source, ranks.rank]) + n
        for source, count in enumerate(receive)
        for n in range(count)
    ]
    assert got.flatten().tolist() == expected


def test_ragged_collectives(on_ranks):
    on_ranks(ragged, 3)


def fail(rank, store, pipe):
    """Rank 1 comes too late to a step, then dies before another; what rank 0 is told, and when."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    groups = [dist.new_group(timeout=timedelta(seconds=seconds)) for seconds in (2, 30)]
    for group in groups:
        loss_of(group, *pair())
    told = []
    for n, group in enumerate(groups):
        if rank == 1 and n == 0:
            time.sleep(6)
            continue
        if rank == 1:
            os._exit(1)
        start = time.monotonic()
        try:
            loss_of(group, *pair())
        except RuntimeError as error:
            told.append((str(error), time.monotonic() - start))
    pipe.send(told)


def test_a_rank_that_fails_ends_the_others(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=fail, args=(rank, str(tmp_path / "store"), theirs), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert ours.poll(60), "rank 0 hung"
        (late, waited), (dead, seconds) = ours.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    for message in (late, dead):
        assert "contrastive_loss could not talk to all ranks (this is rank 0 of 2)" in message
    assert 1.5 < waited < 20 and seconds < 20


def outlive_the_group(group):
    """Whether it is gone when torch.distributed lets it go, and what loss and bank say then."""
    own = dist.new_group(list(range(dist.get_world_size(group))))
    loss_fn, negatives = codir_fast.ContrastiveLoss(process_group=own), queue(own)
    query, key = pair(requires_grad=True)
    negatives.enqueue(key)
    loss_fn(query, key, negatives).backward()
    group_of_ours = weakref.ref(own)
    dist.destroy_process_group(own)
    del own
    is_gone, said = group_of_ours() is None, []
    for step in (lambda: negatives.enqueue(key), lambda: loss_fn(query, key, negatives)):
        with pytest.raises(RuntimeError) as error:
            step()
        said.append(str(error.value))
    return is_gone, said


def test_nothing_keeps_a_group_that_was_destroyed(on_ranks):
    """Its threads would outlive Python, which ends in SIGABRT."""
    for is_gone, said in on_ranks(outlive_the_group, 4):
        assert is_gone
        assert [line.partition(": ")[0] for line in said] == 2 * ["`process_group` was destroyed"]
