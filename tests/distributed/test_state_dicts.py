"""State dicts of models with sharded banks: banks with two names, extra state, what is refused."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

import codir_fast
from codir_fast.distributed import gather_state, ignore_shards_in_ddp, reshard_state

D, K = 4, 7


class Head(torch.nn.Module):
    """A queue of someone else's, and what torch.save can keep but isn't a tensor."""

    def __init__(self, queue):
        super().__init__()
        self.queue = queue
        self.epoch = 0

    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


class Tied(torch.nn.Module):
    """One bank with two names."""

    def __init__(self, group):
        super().__init__()
        self.queue = codir_fast.MemoryQueue(K, D, process_group=group)
        self.head = Head(self.queue)


def batch(rank):
    return torch.randn(2, D, generator=torch.Generator().manual_seed(rank))


def tied_states(group):
    """Rank 0's state of all rows, and what each rank saves."""
    model = Tied(group)
    model.queue.enqueue(batch(dist.get_rank(group)))
    model.head.epoch = 3
    whole, own = gather_state(model), model.state_dict()
    if whole is not None:
        assert whole["queue.rows"] is whole["head.queue.rows"]  # it was gathered once
    again = Tied(group)
    again.load_state_dict(own)
    assert torch.equal(again.queue.rows, model.queue.rows)
    states = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, own, group=group)
    for given in (states[::-1], [state for state in states if state is not None]):
        again = Tied(group)
        again.load_state_dict(reshard_state(given, again))
        assert torch.equal(again.queue.rows, model.queue.rows) and again.head.epoch == 3
    alone = Tied(None)
    alone.load_state_dict(reshard_state(states, alone))
    if whole is not None:
        direct = Tied(None)
        direct.load_state_dict(whole)
        assert direct.head.epoch == 3
        assert torch.equal(direct.queue.rows, alone.queue.rows)
    return alone.queue.rows.tolist(), alone.queue.position.item()


def test_a_bank_with_two_names_and_extra_state(on_ranks):
    whole = codir_fast.MemoryQueue(K, D)
    whole.enqueue(torch.cat([batch(rank) for rank in range(3)]))
    for rows, position in on_ranks(tied_states, 3):
        assert torch.equal(torch.tensor(rows), whole.rows) and position == whole.position


def ignored_names(group):
    model = Tied(group)
    ignore_shards_in_ddp(model)
    return sorted(model._ddp_params_and_buffers_to_ignore)


def test_ddp_ignores_all_names_of_a_bank(on_ranks):
    names = [f"queue.{name}" for name in ("first_row", "position", "rows", "valid")]
    expected = sorted([*names, *(f"head.{name}" for name in names)])
    assert on_ranks(ignored_names, 2) == 2 * [expected]


def refuse_dst(group):
    queue = codir_fast.MemoryQueue(K, D, process_group=group)
    for dst in (-1, 3, 1.0, "0", None, True):
        message = f"`dst` must be a rank of the banks' process group, an int in [0, 3), got {dst!r}"
        if dst != -1 and dist.get_rank(group) > 0:
            continue  # one rank alone is told so too: nothing was sent
        with pytest.raises(ValueError, match=re.escape(message)):
            gather_state(queue, dst=dst)
    return gather_state(queue, dst=np.int64(2)) is not None


def test_dst_must_be_a_rank(on_ranks):
    assert on_ranks(refuse_dst, 3) == [False, False, True]


def assigned(group):
    """Bytes behind each buffer of a sharded bank that a state of all rows was assigned to."""
    bank = codir_fast.IndexedBank(K, D, labels=torch.arange(K), process_group=group)
    whole = codir_fast.IndexedBank(K, D, labels=torch.arange(K))
    whole.update(torch.arange(K), torch.randn(K, D))
    bank.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(bank.rows, bank.shard.own(whole.rows))
    return [
        buffer.untyped_storage().nbytes() - buffer.nbytes
        for buffer in (bank.rows, bank.valid, bank.row_labels)
    ]


def test_an_assigned_part_keeps_no_other_rows(on_ranks):
    assert on_ranks(assigned, 2) == 2 * [[0, 0, 0]]


def saved(group):
    bank = codir_fast.MemoryQueue(K, D, process_group=group)
    return {name: value.numpy() for name, value in bank.state_dict().items()}


def load_own(group, states):
    """What each rank is told of its own state from a run of more ranks; all name the remedy."""
    state = {name: torch.as_tensor(v) for name, v in states[dist.get_rank(group)].items()}
    for bank in (
        codir_fast.MemoryQueue(K, D, process_group=group),
        codir_fast.MemoryQueue(K, D),  # one process
    ):
        with pytest.raises(RuntimeError, match=r"codir_fast\.distributed\.reshard_state makes"):
            bank.load_state_dict(state)
        assert not bank.valid.any()
    other = codir_fast.MemoryQueue(K, D + 1, process_group=group)  # for which it is none
    with pytest.raises(RuntimeError) as error:
        other.load_state_dict({**other.state_dict(), "rows": torch.zeros(4, D)})
    assert "reshard_state" not in str(error.value)


def test_states_of_another_number_of_ranks_are_told_the_remedy(on_ranks):
    on_ranks(load_own, 2, states=on_ranks(saved, 3))
