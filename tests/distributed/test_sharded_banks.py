"""Sharded MemoryQueue and IndexedBank: the rows of one process, whoever brings them."""

import copy
import random
import re

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import codir_fast
from codir_fast.distributed import gather_state, reshard_state

D, K = 6, 23
RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)


def make_queue(dtype, group=None):
    return codir_fast.MemoryQueue(K, D, dtype=dtype, with_labels=True, process_group=group)


def make_bank(dtype, group=None):
    labels = torch.arange(K) % 3
    return codir_fast.IndexedBank(K, D, dtype=dtype, labels=labels, process_group=group)


MAKE = {"queue": make_queue, "bank": make_bank}


def batches(seed, steps, num_ranks):
    """Rows, keys and labels of each rank, step by step: often none, sometimes more than K."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        sizes = [rng.choice((0, 1, rng.randint(0, 6), 2 * K)) for _ in range(num_ranks)]
        yield [
            (
                torch.randint(0, K, (size,), generator=generator),
                torch.randn(size, D, generator=generator),
            )
            for size in sizes
        ]


def write(bank, index, keys):
    if isinstance(bank, codir_fast.MemoryQueue):
        bank.enqueue(keys, 10 * index)
    else:
        bank.update(index, keys)


def whole_bank(kind, dtype, steps, num_ranks):
    """What one process has that took the batches of rank 0 first."""
    bank = MAKE[kind](dtype)
    for batch in batches(7, steps, num_ranks):
        index, keys = (torch.cat(of_all) for of_all in zip(*batch, strict=True))
        write(bank, index, keys)
    return bank


def sharded_bank(group, kind, dtype, steps):
    bank = MAKE[kind](dtype, group)
    for batch in batches(7, steps, dist.get_world_size(group)):
        write(bank, *batch[dist.get_rank(group)])
    return bank


def state_of(bank):
    """The state_dict as what travels between processes."""
    return {
        name: value.view(torch.uint8).numpy() if value.ndim else value.item()
        for name, value in bank.state_dict().items()
    }


def as_tensors(state, like):
    expected = like.state_dict()
    return {
        name: torch.as_tensor(value).view(expected[name].dtype)
        if name in expected and expected[name].ndim
        else torch.tensor(value)
        for name, value in state.items()
    }


def follow(group, kind, dtype, steps):
    """Row by row, after each of many steps, as the bank of one process."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    whole, sharded = MAKE[kind](dtype), MAKE[kind](dtype, group)
    first, end = sharded.shard.first, sharded.shard.first + sharded.shard.num_rows
    for batch in batches(7, steps, num_ranks):
        index, keys = (torch.cat(of_all) for of_all in zip(*batch, strict=True))
        write(whole, index, keys)
        write(sharded, *batch[rank])
        for name, value in whole.state_dict().items():
            own = sharded.state_dict()[name]
            expected = value[first:end] if value.ndim else value
            assert torch.equal(own.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
        assert len(sharded) == int(whole.valid[first:end].sum())
        assert sharded.is_full == bool(whole.valid[first:end].all())
        if kind == "queue":
            # Oldest first: the whole queue's, without the rows of others.
            own_rows = whole._oldest_first()
            own_rows = own_rows[(own_rows >= first) & (own_rows < end)]
            assert torch.equal(sharded.labels, whole.row_labels[own_rows])
            assert torch.equal(sharded.keys, whole._rows_at(own_rows))


@RANKS
@pytest.mark.parametrize("kind", MAKE)
def test_random_life(on_ranks, ranks, kind):
    on_ranks(follow, ranks, kind=kind, dtype=torch.float32, steps=200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", MAKE)
def test_random_life_in_other_dtypes(on_ranks, kind, dtype):
    on_ranks(follow, 3, kind=kind, dtype=dtype, steps=30)


def few_rows(group):
    queue = codir_fast.MemoryQueue(3, D, process_group=group)
    rank = dist.get_rank(group)
    queue.enqueue(torch.eye(D)[rank : rank + 1])
    queue.enqueue(torch.zeros(0, D))
    loss = codir_fast.ContrastiveLoss(process_group=group)(
        torch.eye(D)[:1], torch.eye(D)[:1], queue
    )
    return queue.rows.numpy().tolist(), len(queue), loss.item()


def test_more_ranks_than_rows(on_ranks):
    answers = on_ranks(few_rows, 4)
    rows = [row for rows, *_ in answers for row in rows]
    assert rows == torch.eye(D)[[3, 1, 2]].tolist()
    assert [count for _, count, _ in answers] == [1, 1, 1, 0]
    whole = codir_fast.MemoryQueue(3, D)
    whole.enqueue(torch.eye(D)[:4])
    loss = codir_fast.ContrastiveLoss()(torch.eye(D)[:1], torch.eye(D)[:1], whole)
    assert sum(loss for *_, loss in answers) / 4 == pytest.approx(loss.item(), rel=1e-6)


def save_shard(group, kind, dtype, steps):
    return state_of(sharded_bank(group, kind, dtype, steps))


def load_shards(group, kind, dtype, states, steps):
    """The state of other ranks, and of the whole bank as rank 0 gathers it after more steps."""
    bank = MAKE[kind](dtype, group)
    bank.load_state_dict(reshard_state((as_tensors(state, bank) for state in states), bank))
    for batch in batches(8, steps, 1):
        index, keys = batch[0]
        is_first = group is None or dist.get_rank(group) == 0
        write(bank, index if is_first else index[:0], keys if is_first else keys[:0])
    state = gather_state(bank)
    if state is None:
        return None
    whole = MAKE[kind](dtype)
    whole.load_state_dict(state)
    return state_of(whole)


@DTYPES
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 3), (1, 4), (2, 1)])
def test_another_number_of_ranks_goes_on(on_ranks, kind, dtype, before, after):
    def one_process(function, _, **options):
        return [function(None, **options)]

    whole = whole_bank(kind, dtype, 5, before)
    states = [state_of(whole)]
    if before > 1:
        states = on_ranks(save_shard, before, kind=kind, dtype=dtype, steps=5)
    run = on_ranks if after > 1 else one_process
    state, *others = run(load_shards, after, kind=kind, dtype=dtype, states=states[::-1], steps=5)
    assert others == [None] * (after - 1)
    for batch in batches(8, 5, 1):
        write(whole, *batch[0])
    for name, value in as_tensors(state, whole).items():
        expected = whole.state_dict()[name]
        assert torch.equal(value.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


class Model(torch.nn.Module):
    def __init__(self, group):
        super().__init__()
        self.head = torch.nn.Linear(D, D)
        self.banks = torch.nn.ModuleDict({kind: MAKE[kind](None, group) for kind in MAKE})

    def fill(self, rank, num_ranks):
        for bank in self.banks.values():
            for batch in batches(3, 3, num_ranks):
                write(bank, *batch[rank])


def gather_and_load(group, folder):
    """Banks within a module: one file of all rows, and a file for each rank."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    model = Model(group)
    model.fill(rank, num_ranks)
    state = gather_state(model, dst=1)
    assert (state is None) == (rank != 1)
    save_file(model.state_dict(), f"{folder}/{rank}.safetensors")
    if state is not None:
        save_file(state, f"{folder}/whole.safetensors")
    dist.barrier(group)
    for names in (["whole"], list(range(num_ranks))):
        other = Model(group)
        files = (load_file(f"{folder}/{name}.safetensors") for name in names)
        other.load_state_dict(reshard_state(files, other))
        for name in ("banks.queue.rows", "banks.bank.valid", "banks.bank.row_labels"):
            assert torch.equal(other.state_dict()[name], model.state_dict()[name])
    direct = Model(group)  # each rank takes its own of a state of all rows
    direct.load_state_dict(load_file(f"{folder}/whole.safetensors"))
    assert torch.equal(direct.banks["queue"].rows, model.banks["queue"].rows)
    assert torch.equal(direct.banks["queue"].position, model.banks["queue"].position)


def test_states_of_a_module(on_ranks, tmp_path):
    on_ranks(gather_and_load, 3, folder=str(tmp_path))
    whole = Model(None)
    whole.load_state_dict(load_file(tmp_path / "whole.safetensors"))
    assert len(whole.banks["queue"]) == K


def refuse_states(group):
    rank = dist.get_rank(group)
    bank = make_bank(None, group)
    kept = copy.deepcopy(bank.state_dict())
    state = {**bank.state_dict(), "first_row": torch.tensor([12, 0][rank])}
    message = f"rows must be rows from {[0, 12][rank]} on, this rank's, or all 23, got rows from"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bank.load_state_dict(state)
    shape = ([12, 11][rank], D)
    message = f"rows must have shape {shape}, the size of this IndexedBank, got (9, 6)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bank.load_state_dict({**kept, "rows": torch.zeros(9, D)})
    larger = codir_fast.IndexedBank(K + 1, D, labels=torch.zeros(K + 1).int())
    with pytest.raises(RuntimeError, match="rows must have shape"):
        bank.load_state_dict(larger.state_dict())
    assert all(torch.equal(value, kept[name]) for name, value in bank.state_dict().items())
    return state_of(bank)


def test_what_is_no_state_of_this_rank_is_refused(on_ranks):
    first, second = on_ranks(refuse_states, 2)
    whole = make_bank(None)
    first, second = (as_tensors(state, whole) for state in (first, second))
    with pytest.raises(ValueError, match="row 12 is in none"):
        reshard_state([first], whole)
    with pytest.raises(ValueError, match="a state for each rank of the run, got none"):
        reshard_state([], whole)
    with pytest.raises(ValueError, match="`states` must hold `rows` as `module` does"):
        reshard_state([{"weight": torch.ones(2)}], whole)
    smaller = codir_fast.IndexedBank(20, D, labels=torch.zeros(20).int())
    with pytest.raises(ValueError, match="a bank of 20 rows as `rows`, got row 22"):
        reshard_state([first, second], smaller)


def quiet(group):
    """In eval mode nothing is written, and nothing is said to others."""
    bank = make_bank(None, group)
    bank.update(torch.arange(K), torch.randn(K, D))
    kept = bank.rows.clone()
    bank.eval()
    if dist.get_rank(group) == 0:
        bank.update(torch.arange(2), torch.randn(2, D))
    assert torch.equal(bank.rows, kept)
    copied = copy.deepcopy(bank)
    assert copied.shard.ranks.is_of(group) and torch.equal(copied.rows, kept)
    assert f"rows {bank.shard.first} to" in repr(bank)


def test_eval_mode_copies_and_repr(on_ranks):
    on_ranks(quiet, 2)


def draw(group):
    """Half of the rows are filled, by rank 0; each rank draws for queries of its own."""
    rank = dist.get_rank(group)
    labels = torch.arange(K) % 3
    bank = make_bank(torch.float32, group)
    assert bank.is_empty()
    filled = torch.arange(0, K, 2)[: K if rank == 0 else 0]
    bank.update(filled, torch.randn(len(filled), D))
    assert not bank.is_empty()  # also where this rank has no row
    own = torch.randint(0, 3, (4 * rank,), generator=torch.Generator().manual_seed(rank))
    drawn = codir_fast.sample_negatives(bank, own, 5)
    again = codir_fast.sample_negatives(bank, own, 400, replacement=True)
    for rows in (drawn, again):
        assert (labels[rows] != own[:, None]).all() and (rows % 2 == 0).all()
    if len(own):
        assert all(len(row.unique()) == 5 for row in drawn)
        reachable = torch.arange(0, K, 2)[(torch.arange(0, K, 2) % 3) != own[0]]
        assert set(again[0].tolist()) == set(reachable.tolist())
    with pytest.raises(ValueError, match="`M` must be at most the number of filled rows"):
        codir_fast.sample_negatives(bank, torch.tensor([0]), K)


@RANKS
def test_negatives_are_drawn_from_the_rows_of_all_ranks(on_ranks, ranks):
    on_ranks(draw, ranks)


def fetch(group):
    rank = dist.get_rank(group)
    bank = make_bank(torch.float32, group)
    keys = torch.nn.functional.normalize(
        torch.randn(K, D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    bank.update(torch.arange(K)[: K if rank == 0 else 0], keys[: K if rank == 0 else 0])
    index = torch.randint(0, K, (7 * rank,), generator=torch.Generator().manual_seed(rank))
    valid, rows = bank.shard.from_owners("rows", index, bank.valid, bank.rows)
    assert valid.all() and valid.shape == index.shape
    assert torch.allclose(rows, keys[index], atol=1e-6)
    labels, everything = bank.shard.whole("rows", bank.row_labels, bank.rows)
    assert torch.equal(labels, torch.arange(K) % 3)
    assert torch.allclose(everything, keys, atol=1e-6)


@RANKS
def test_rows_of_other_ranks_are_fetched(on_ranks, ranks):
    on_ranks(fetch, ranks)
