"""What the loss side of the public API says to bad input: the class of the error, and one line that
names the argument, what was expected and what came. And the operators, called directly with wrong
tensors: they raise, whatever comes.

Each row of a table changes some arguments of a call that works. test_contrastive_loss.py,
test_memory_bank.py and test_pooling.py hold the plain cases of their own modules.
"""

import inspect
import math
import re
from functools import partial

import numpy as np
import pytest
import torch

import codir_fast
from codir_fast.functional import contrastive_loss, estimate_log_partition

B, K, D, M = 6, 40, 9, 3
NAN, INF = math.nan, math.inf
FLOATS = "float32, float64, bfloat16 or float16"
q, rows, own = torch.ones(B, D), torch.ones(K, D), torch.ones(B, M, D)
labels, row_labels = torch.arange(B) % 3, torch.arange(K) % 3
index = torch.zeros(B, M, dtype=torch.int64)
nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)


def meta(tensor):
    return tensor.to("meta")


def make_queue(filled=4, **options):
    queue = codir_fast.MemoryQueue(K, D, **{"with_labels": True, **options})
    queue.enqueue(
        torch.ones(filled, D), *([torch.arange(filled)] if queue.labels is not None else [])
    )
    return queue


def table(rows):
    """Rows (changes, error, message), or (name, changes, error, message); ids say what changes."""
    names = ["name", "changes", "error", "message"][-len(rows[0]) :]
    ids = [f"{n}-{'-'.join([*row[:-3], *row[-3]])}" for n, row in enumerate(rows)]
    return pytest.mark.parametrize(names, rows, ids=ids)


def refused(changes, error, message, call):
    """In one line, which begins with one of the arguments that were changed."""
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert caught.type is error
    said = str(caught.value)
    assert said.startswith(tuple(f"`{name}`" for name in changes))
    assert "\n" not in said and len(said) < 200


def nce(**changes):
    return {"objective": "nce", **changes}


LOSS = [
    # query
    ({"query": None}, TypeError, "`query` must be a Tensor, got NoneType"),
    ({"query": "q"}, TypeError, "`query` must be a Tensor, got str"),
    ({"query": q.numpy()}, TypeError, "`query` must be a Tensor, got ndarray"),
    (
        {"query": q[None]},
        ValueError,
        "`query` must have shape (B, D) with D at least 1, got (1, 6,",
    ),
    ({"query": q[0, 0]}, ValueError, "`query` must have shape (B, D) with D at least 1, got ()"),
    (
        {"query": q[:, :0]},
        ValueError,
        "`query` must have shape (B, D) with D at least 1, got (6, 0)",
    ),
    ({"query": q.bool()}, TypeError, f"`query` must be {FLOATS}, got bool"),
    ({"query": q.cfloat()}, TypeError, f"`query` must be {FLOATS}, got complex64"),
    (
        {"query": q.to(torch.float8_e4m3fn)},
        TypeError,
        f"`query` must be {FLOATS}, got float8_e4m3fn",
    ),
    ({"query": q.to_sparse()}, TypeError, "`query` must be a dense Tensor, got a sparse_coo one"),
    ({"query": nested}, TypeError, "`query` must be a dense Tensor, got a nested one"),
    # positive_key
    ({"positive_key": None}, TypeError, "`positive_key` must be a Tensor, got NoneType"),
    ({"positive_key": [q]}, TypeError, "`positive_key` must be a Tensor, got list"),
    ({"positive_key": q.numpy()}, TypeError, "`positive_key` must be a Tensor, got ndarray"),
    ({"positive_key": q.long()}, TypeError, f"`positive_key` must be {FLOATS}, got int64"),
    (
        {"positive_key": q[None]},
        ValueError,
        "`positive_key` must have shape (B, D) with B=6, D=9 as",
    ),
    ({"positive_key": q.half()}, ValueError, "the dtype of `query`, float32, got float16"),
    ({"positive_key": q.to_sparse()}, TypeError, "`positive_key` must be a dense Tensor"),
    # negative_keys
    ({"negative_keys": "bank"}, TypeError, "an IndexedBank, got str"),
    ({"negative_keys": rows.numpy()}, TypeError, "`negative_keys` must be None, a Tensor, a Mem"),
    ({"negative_keys": {"rows": rows}}, TypeError, "an IndexedBank, got dict"),
    ({"negative_keys": codir_fast.MemoryQueue}, TypeError, "an IndexedBank, got type"),
    ({"negative_keys": 1.0}, TypeError, "an IndexedBank, got float"),
    (
        {"negative_keys": rows[0, 0]},
        ValueError,
        "`negative_keys` must have shape (K, D) or (B, M, D)",
    ),
    ({"negative_keys": own[None]}, ValueError, "B=6, D=9 as `query`, got (1, 6, 3, 9)"),
    ({"negative_keys": own[1:]}, ValueError, "B=6, D=9 as `query`, got (5, 3, 9)"),
    ({"negative_keys": own[..., 1:]}, ValueError, "B=6, D=9 as `query`, got (6, 3, 8)"),
    ({"negative_keys": rows.bool()}, TypeError, f"`negative_keys` must be {FLOATS}, got bool"),
    (
        {"negative_keys": rows.cdouble()},
        TypeError,
        f"`negative_keys` must be {FLOATS}, got complex128",
    ),
    ({"negative_keys": own.double()}, ValueError, "the dtype of `query`, float32, got float64"),
    ({"negative_keys": meta(own)}, ValueError, "the device of `query`, cpu, got meta"),
    ({"negative_keys": rows.to_sparse()}, TypeError, "`negative_keys` must be a dense Tensor"),
    ({"negative_keys": nested}, TypeError, "`negative_keys` must be a dense Tensor"),
    (
        {"negative_keys": codir_fast.IndexedBank(K, D + 1)},
        ValueError,
        "`negative_keys` must be a bank of dim D=9 as `query`, got 10",
    ),
    (
        {"negative_keys": codir_fast.IndexedBank(K, D).to("meta")},
        ValueError,
        "`negative_keys` must be on the device of `query`, cpu, got meta",
    ),
    (
        {"negative_keys": codir_fast.IndexedBank(K, D, dtype=torch.float64)},
        ValueError,
        "`negative_keys` is a float64 bank, which needs a float64 `query`",
    ),
    # temperature
    ({"temperature": None}, TypeError, "`temperature` must be a number, got NoneType"),
    ({"temperature": [0.1]}, TypeError, "`temperature` must be a number, got list"),
    ({"temperature": True}, TypeError, "`temperature` must be a number, got bool"),
    ({"temperature": 1j}, TypeError, "`temperature` must be a number, got complex"),
    ({"temperature": np.ones(())}, TypeError, "`temperature` must be a number, got ndarray"),
    ({"temperature": -INF}, ValueError, "`temperature` must be positive and finite, got -inf"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "must be positive and finite, got 0.0"),
    ({"temperature": torch.tensor(NAN)}, ValueError, "must be positive and finite, got nan"),
    ({"temperature": torch.tensor(INF)}, ValueError, "must be positive and finite, got inf"),
    ({"temperature": torch.tensor(1)}, TypeError, f"`temperature` must be {FLOATS}, got int64"),
    ({"temperature": torch.tensor(True)}, TypeError, f"`temperature` must be {FLOATS}, got bool"),
    ({"temperature": torch.ones(1)}, ValueError, "`temperature` must be 0-d, got shape (1,)"),
    ({"temperature": meta(torch.ones(()))}, ValueError, "`temperature` must be on the "),
    ({"temperature": nested}, TypeError, "`temperature` must be a dense Tensor, got a nested one"),
    # options
    (
        {"objective": None},
        ValueError,
        "`objective` must be one of ('infonce', 'nce'), got NoneType",
    ),
    ({"objective": ["nce"]}, ValueError, "`objective` must be one of ('infonce', 'nce'), got list"),
    ({"objective": "NCE"}, ValueError, "`objective` must be one of ('infonce', 'nce'), got 'NCE'"),
    (
        {"reduction": None},
        ValueError,
        "`reduction` must be one of ('none', 'mean', 'sum'), got None",
    ),
    ({"reduction": 1}, ValueError, "`reduction` must be one of ('none', 'mean', 'sum'), got int"),
    ({"reduction": np.ones(3)}, ValueError, "('none', 'mean', 'sum'), got ndarray"),
    ({"backend": None}, ValueError, "`backend` must be one of ('auto', 'torch', 'cpu', "),
    ({"backend": "CPU"}, ValueError, "`backend` must be one of ('auto', 'torch', 'cpu', "),
    ({"backend": np.ones(3)}, ValueError, "`backend` must be one of ('auto', 'torch', 'cpu', "),
    ({"normalize": "no"}, TypeError, "`normalize` must be True or False, got str"),
    ({"normalize": torch.ones(2)}, TypeError, "`normalize` must be True or False, got Tensor"),
    ({"symmetric": "no"}, TypeError, "`symmetric` must be True or False, got str"),
    # labels and negative_labels
    ({"labels": labels.numpy()}, TypeError, "`labels` must be a Tensor, got ndarray"),
    ({"labels": 3}, TypeError, "`labels` must be a Tensor, got int"),
    ({"labels": labels[:, None]}, ValueError, "`labels` must have shape (B,) with B=6, got (6, 1)"),
    ({"labels": labels[0]}, ValueError, "`labels` must have shape (B,) with B=6, got ()"),
    ({"labels": labels.bool()}, TypeError, "`labels` must be of an integer dtype, got bool"),
    (
        {"negative_keys": codir_fast.IndexedBank(K, D), "labels": labels},
        ValueError,
        "`labels` needs a bank that has labels",
    ),
    (
        {"negative_keys": rows, "labels": labels, "negative_labels": [0] * K},
        TypeError,
        "`negative_labels` must be a Tensor, got list",
    ),
    (
        {"negative_keys": rows, "labels": labels, "negative_labels": row_labels.float()},
        TypeError,
        "`negative_labels` must be of an integer dtype, got float32",
    ),
    (
        {"negative_keys": rows, "labels": labels, "negative_labels": meta(row_labels)},
        ValueError,
        "`negative_labels` must be on the device of `query`, cpu, got meta",
    ),
    (
        {"negative_keys": own, "labels": labels, "negative_labels": index[:, :2]},
        ValueError,
        "`negative_labels` must have shape (B, M) with B=6, M=3 as `negative_keys`, got (6, 2)",
    ),
    (
        {"negative_keys": own, "labels": labels, "negative_labels": index.tolist()},
        TypeError,
        "`negative_labels` must be a Tensor, got list",
    ),
    (
        {"negative_keys": own, "labels": labels, "negative_labels": index.float()},
        TypeError,
        "`negative_labels` must be of an integer dtype, got float32",
    ),
    # negative_index
    (
        {"negative_keys": rows, "negative_index": index.tolist()},
        TypeError,
        "`negative_index` must be a Tensor, got list",
    ),
    (
        {"negative_keys": rows, "negative_index": index[:, 0]},
        ValueError,
        "`negative_index` must have shape (B, M) with B=6, got (6,)",
    ),
    (
        {"negative_keys": rows, "negative_index": index[None]},
        ValueError,
        "`negative_index` must have shape (B, M) with B=6, got (1, 6, 3)",
    ),
    (
        {"negative_keys": rows, "negative_index": index.bool()},
        TypeError,
        "`negative_index` must be of an integer dtype, got torch.bool",
    ),
    (
        {"negative_keys": rows, "negative_index": meta(index)},
        ValueError,
        "`negative_index` must be on the device of `query`, cpu, got meta",
    ),
    (
        {"negative_keys": rows, "negative_index": index - 1},
        ValueError,
        "`negative_index` must be in [0, 40), got -1",
    ),
    (
        {"negative_keys": make_queue(), "negative_index": index + 2**40},
        ValueError,
        "`negative_index` must be in [0, 40), got 1099511627776",
    ),
    # exclude_index
    (
        {"negative_keys": rows, "exclude_index": [0] * B},
        TypeError,
        "`exclude_index` must be a Tensor, got list",
    ),
    (
        {"negative_keys": rows, "exclude_index": labels.float()},
        TypeError,
        "`exclude_index` must be of an integer dtype, got float32",
    ),
    (
        {"negative_keys": rows, "exclude_index": labels[0]},
        ValueError,
        "`exclude_index` must have shape (B,) with B=6, got ()",
    ),
    (
        {"negative_keys": rows, "exclude_index": meta(labels)},
        ValueError,
        "`exclude_index` must be on the device of `query`, cpu, got meta",
    ),
    (
        {"negative_keys": make_queue(), "exclude_index": labels - 3},
        ValueError,
        "`exclude_index` must be in [-1, 40), got -3",
    ),
    # weight
    ({"weight": [1.0] * B}, TypeError, "`weight` must be a Tensor, got list"),
    ({"weight": np.ones(B)}, TypeError, "`weight` must be a Tensor, got ndarray"),
    (
        {"weight": torch.ones(B, 1)},
        ValueError,
        "`weight` must have shape (B,) with B=6, got (6, 1)",
    ),
    ({"weight": torch.ones(())}, ValueError, "`weight` must have shape (B,) with B=6, got ()"),
    ({"weight": meta(torch.ones(B))}, ValueError, "the device of `query`, cpu, got meta"),
    ({"weight": torch.ones(B).to_sparse()}, TypeError, "`weight` must be a dense Tensor"),
    ({"weight": torch.ones(B).cfloat()}, TypeError, "`weight` must be "),
    # log_partition and num_data
    ({"log_partition": 1.0}, ValueError, "`log_partition` needs objective \"nce\", got 'infonce'"),
    (
        {"objective": "infonce", "num_data": 100},
        ValueError,
        "`num_data` needs objective \"nce\", got 'infonce'",
    ),
    (nce(log_partition="1"), TypeError, "`log_partition` must be a number, got str"),
    (nce(log_partition=True), TypeError, "`log_partition` must be a number, got bool"),
    (nce(log_partition=[1.0]), TypeError, "`log_partition` must be a number, got list"),
    (nce(log_partition=NAN), ValueError, "`log_partition` must be finite, got nan"),
    (nce(log_partition=-INF), ValueError, "`log_partition` must be finite, got -inf"),
    (nce(log_partition=torch.tensor(INF)), ValueError, "must be finite, got inf"),
    (nce(log_partition=torch.ones(1)), ValueError, "`log_partition` must be 0-d, got sha"),
    (nce(log_partition=torch.tensor(1)), TypeError, f"`log_partition` must be {FLOATS}"),
    (nce(log_partition=meta(torch.ones(()))), ValueError, "of `query`, cpu, got meta"),
    (nce(num_data=0), ValueError, "`num_data` must be at least 1, got 0"),
    (nce(num_data=-5), ValueError, "`num_data` must be at least 1, got -5"),
    (nce(num_data=2**63), ValueError, "`num_data` must be below 2^63, got 9223372036854775808"),
    (nce(num_data=1.5), TypeError, "`num_data` must be an int, got float"),
    (nce(num_data="10"), TypeError, "`num_data` must be an int, got str"),
    (nce(num_data=True), TypeError, "`num_data` must be an int, got bool"),
    (nce(num_data=torch.tensor(5)), TypeError, "`num_data` must be an int, got Tensor"),
]


@table(LOSS)
def test_contrastive_loss(changes, error, message):
    given = {"query": q, "positive_key": q, **changes}
    refused(changes, error, message, partial(contrastive_loss, **given))
    # The same arguments elsewhere are refused in the same words.
    for other in (estimate_log_partition, codir_fast.ContrastiveLoss()):
        function = other.forward if isinstance(other, torch.nn.Module) else other
        if given.keys() <= inspect.signature(function).parameters.keys():
            refused(changes, error, message, partial(other, **given))


MODULE = [
    ({"temperature": "0.1"}, TypeError, "`temperature` must be a number, got str"),
    ({"temperature": None}, TypeError, "`temperature` must be a number, got NoneType"),
    ({"temperature": torch.tensor(0.1)}, TypeError, "`temperature` must be a number, got Tensor"),
    (
        {"temperature": 1e3, "learnable_temperature": True},
        ValueError,
        "`temperature` must be in [0.01, 100] to be learnt, got 1000.0",
    ),
    (
        {"objective": None},
        ValueError,
        "`objective` must be one of ('infonce', 'nce'), got NoneType",
    ),
    (
        {"reduction": None},
        ValueError,
        "`reduction` must be one of ('none', 'mean', 'sum'), got None",
    ),
    ({"backend": None}, ValueError, "`backend` must be one of ('auto', 'torch', 'cpu', 'triton', "),
    ({"log_partition": 2.0}, ValueError, "`log_partition` needs objective \"nce\", got 'infonce'"),
    ({"num_data": 7}, ValueError, "`num_data` needs objective \"nce\", got 'infonce'"),
    (nce(log_partition="2"), TypeError, "`log_partition` must be a number, got str"),
    (nce(log_partition=INF), ValueError, "`log_partition` must be finite, got inf"),
    (nce(log_partition=torch.ones(())), TypeError, "`log_partition` must be a number, got Tensor"),
    (nce(num_data=0), ValueError, "`num_data` must be at least 1, got 0"),
]


@table(MODULE)
def test_module(changes, error, message):
    refused(changes, error, message, partial(codir_fast.ContrastiveLoss, **changes))


QUEUE = [
    ({"size": None}, TypeError, "`size` must be an int, got NoneType"),
    ({"size": "4"}, TypeError, "`size` must be an int, got str"),
    ({"size": True}, TypeError, "`size` must be an int, got bool"),
    ({"size": -1}, ValueError, "`size` must be at least 1, got -1"),
    ({"size": 2**70}, ValueError, "`size` must be below 2^63, got 1180591620717411303424"),
    ({"dim": 4.0}, TypeError, "`dim` must be an int, got float"),
    ({"dim": -3}, ValueError, "`dim` must be at least 1, got -3"),
    ({"dtype": "float16"}, TypeError, "`dtype` must be a torch.dtype, got str"),
    ({"dtype": np.float32}, TypeError, "`dtype` must be a torch.dtype, got type"),
    ({"dtype": torch.complex64}, TypeError, f"`dtype` must be {FLOATS}, got complex64"),
    ({"with_labels": "no"}, TypeError, "`with_labels` must be True or False, got str"),
    ({"with_labels": labels}, TypeError, "`with_labels` must be True or False, got Tensor"),
]


@table(QUEUE)
def test_queue(changes, error, message):
    refused(
        changes, error, message, partial(codir_fast.MemoryQueue, **{"size": 4, "dim": D, **changes})
    )


ENQUEUE = [
    ({"keys": None}, TypeError, "`keys` must be a Tensor, got NoneType"),
    ({"keys": q.numpy()}, TypeError, "`keys` must be a Tensor, got ndarray"),
    ({"keys": q[None]}, ValueError, "`keys` must have shape (N, D) with D=9, got (1, 6, 9)"),
    ({"keys": q[0, 0]}, ValueError, "`keys` must have shape (N, D) with D=9, got ()"),
    ({"keys": q.bool()}, TypeError, f"`keys` must be {FLOATS}, got bool"),
    ({"keys": q.cfloat()}, TypeError, f"`keys` must be {FLOATS}, got complex64"),
    ({"keys": q.to_sparse()}, TypeError, "`keys` must be a dense Tensor, got a sparse_coo one"),
    ({"keys": nested}, TypeError, "`keys` must be a dense Tensor, got a nested one"),
    ({"labels": [0] * B}, TypeError, "`labels` must be a Tensor, got list"),
    ({"labels": labels[:, None]}, ValueError, "`labels` must have shape (N,) with N=6, got (6, 1)"),
    ({"labels": labels.bool()}, TypeError, "`labels` must be of an integer dtype, got bool"),
    ({"labels": meta(labels)}, ValueError, "the device of the bank, cpu, got meta"),
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@table(ENQUEUE)
def test_enqueue(changes, error, message, mode):
    queue = make_queue().train(mode == "train")
    kept = {name: value.clone() for name, value in queue.state_dict().items()}
    refused(
        changes, error, message, partial(queue.enqueue, **{"keys": q, "labels": labels, **changes})
    )
    assert all(torch.equal(value, kept[name]) for name, value in queue.state_dict().items())


BANK = [
    ({"num_rows": None}, TypeError, "`num_rows` must be an int, got NoneType"),
    ({"num_rows": 4.5}, TypeError, "`num_rows` must be an int, got float"),
    ({"dim": "9"}, TypeError, "`dim` must be an int, got str"),
    ({"momentum": "0.5"}, TypeError, "`momentum` must be a number, got str"),
    ({"momentum": None}, TypeError, "`momentum` must be a number, got NoneType"),
    ({"momentum": torch.tensor(0.5)}, TypeError, "`momentum` must be a number, got Tensor"),
    ({"momentum": True}, TypeError, "`momentum` must be a number, got bool"),
    ({"momentum": -0.1}, ValueError, "`momentum` must be in [0, 1], got -0.1"),
    ({"momentum": INF}, ValueError, "`momentum` must be in [0, 1], got inf"),
    ({"dtype": "half"}, TypeError, "`dtype` must be a torch.dtype, got str"),
    ({"labels": [0] * K}, TypeError, "`labels` must be a Tensor, got list"),
    (
        {"labels": row_labels.float()},
        TypeError,
        "`labels` must be of an integer dtype, got float32",
    ),
    ({"labels": row_labels[0]}, ValueError, "(num_rows,) with num_rows=40, got ()"),
    (
        {"labels": meta(row_labels)},
        ValueError,
        "`labels` must hold values, got a tensor on the dev",
    ),
]


@table(BANK)
def test_indexed_bank(changes, error, message):
    refused(
        changes,
        error,
        message,
        partial(codir_fast.IndexedBank, **{"num_rows": K, "dim": D, **changes}),
    )


UPDATE = [
    ({"index": None}, TypeError, "`index` must be a Tensor, got NoneType"),
    ({"index": [0] * B}, TypeError, "`index` must be a Tensor, got list"),
    ({"index": index}, ValueError, "`index` must have shape (N,) with N=6, got (6, 3)"),
    ({"index": labels[0]}, ValueError, "`index` must have shape (N,) with N=6, got ()"),
    ({"index": labels.bool()}, TypeError, "`index` must be of an integer dtype, got bool"),
    (
        {"index": meta(labels)},
        ValueError,
        "`index` must be on the device of the bank, cpu, got meta",
    ),
    ({"index": labels + 2**40}, ValueError, "`index` must be in [0, 40), got 1099511627778"),
    ({"index": labels.to(torch.int8) - 128}, ValueError, "`index` must be in [0, 40), got -128"),
    ({"keys": q[None]}, ValueError, "`keys` must have shape (N, D) with D=9, got (1, 6, 9)"),
    ({"keys": q.numpy()}, TypeError, "`keys` must be a Tensor, got ndarray"),
    ({"keys": q.int()}, TypeError, f"`keys` must be {FLOATS}, got int32"),
    ({"keys": meta(q)}, ValueError, "`keys` must be on the device of the bank, cpu, got meta"),
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@table(UPDATE)
def test_update(changes, error, message, mode):
    bank = codir_fast.IndexedBank(K, D).train(mode == "train")
    refused(
        changes, error, message, partial(bank.update, **{"index": labels, "keys": q, **changes})
    )
    assert len(bank) == 0 and bank.rows.eq(0).all()


HEAD = [
    ({"in_features": "9"}, TypeError, "`in_features` must be an int, got str"),
    ({"in_features": None}, TypeError, "`in_features` must be an int, got NoneType"),
    ({"in_features": 0}, ValueError, "`in_features` must be at least 1, got 0"),
    ({"dim": 0}, ValueError, "`dim` must be at least 1, got 0"),
    ({"dim": 1.5}, TypeError, "`dim` must be an int, got float"),
    ({"dim": True}, TypeError, "`dim` must be an int, got bool"),
    ({"pooled": None}, TypeError, "`pooled` must be a Tensor, got NoneType"),
    ({"pooled": q.numpy()}, TypeError, "`pooled` must be a Tensor, got ndarray"),
    ({"pooled": q[:, 1:]}, ValueError, "`pooled` must have shape (..., 9), got (6, 8)"),
    ({"pooled": q[0, 0]}, ValueError, "`pooled` must have shape (..., 9), got ()"),
    ({"pooled": q.long()}, TypeError, f"`pooled` must be {FLOATS}, got int64"),
    ({"pooled": q.to_sparse()}, TypeError, "`pooled` must be a dense Tensor, got a sparse_coo one"),
    ({"pooled": q.double()}, ValueError, "`pooled` must have the dtype of "),
    ({"pooled": meta(q)}, ValueError, "`pooled` must be on the device of "),
]


@table(HEAD)
def test_projection_head(changes, error, message):
    pooled = changes.get("pooled", q)
    options = {name: value for name, value in changes.items() if name != "pooled"}
    refused(
        changes,
        error,
        message,
        lambda: codir_fast.ProjectionHead(**{"in_features": D, **options})(pooled),
    )


layer = torch.ones(2, 5, 4)
POOL = [
    ({"hidden_states": None}, TypeError, "a Tensor or a sequence of them, got NoneType"),
    ({"hidden_states": 1.0}, TypeError, "a Tensor or a sequence of them, got float"),
    ({"hidden_states": layer.numpy()}, TypeError, "a Tensor or a sequence of them, got ndarray"),
    ({"hidden_states": {"a": layer}}, TypeError, "a Tensor or a sequence of them, got dict"),
    ({"hidden_states": "states"}, TypeError, "`hidden_states` must be a Tensor, got str"),
    ({"hidden_states": [layer, None]}, TypeError, "`hidden_states` must be a Tensor, got NoneType"),
    ({"hidden_states": layer[None]}, ValueError, "of shape (B, T, H), got (1, 2, 5, 4)"),
    (
        {"hidden_states": [layer, layer.half()]},
        ValueError,
        "`hidden_states` must share one shape, d",
    ),
    (
        {"hidden_states": [layer, meta(layer)]},
        ValueError,
        "`hidden_states` must share one shape, d",
    ),
    (
        {"hidden_states": layer.cfloat()},
        TypeError,
        f"`hidden_states` must be {FLOATS}, got complex64",
    ),
    ({"hidden_states": layer.to_sparse()}, TypeError, "`hidden_states` must be a dense Tensor"),
    ({"attention_mask": [[1] * 5] * 2}, TypeError, "`attention_mask` must be a Tensor, got list"),
    ({"attention_mask": layer[0]}, ValueError, "must have shape (B, T) = (2, 5), got (5, 4)"),
    ({"attention_mask": layer}, ValueError, "must have shape (B, T) = (2, 5), got (2, 5, 4)"),
    ({"attention_mask": layer[..., 0].to_sparse()}, TypeError, "`attention_mask` must be a dense"),
    (
        {"mode": None},
        ValueError,
        "`mode` must be one of ('mean', 'max', 'first', 'last'), got None",
    ),
    (
        {"mode": ["mean"]},
        ValueError,
        "`mode` must be one of ('mean', 'max', 'first', 'last'), got l",
    ),
    ({"layers": 0}, TypeError, "`layers` must be a sequence of ints, got int"),
    ({"layers": "0"}, TypeError, "`layers` must be a sequence of ints, got str"),
    ({"layers": [0.0]}, TypeError, "`layers` must hold ints, got float 0.0"),
    ({"layers": [None]}, TypeError, "`layers` must hold ints, got NoneType None"),
    (
        {"layers": [-2]},
        ValueError,
        "`layers` must be in [-1, 1), as there are 1 `hidden_states`, got",
    ),
    ({"backend": None}, ValueError, "`backend` must be one of ('auto', 'torch', 'cpu', 'triton', "),
]


@table(POOL)
def test_pool_hidden_states(changes, error, message):
    refused(
        changes,
        error,
        message,
        partial(codir_fast.pool_hidden_states, **{"hidden_states": layer, **changes}),
    )


SAMPLE = [
    ({"bank": None}, TypeError, "`bank` must be a MemoryQueue or an IndexedBank, got NoneType"),
    ({"bank": rows}, TypeError, "`bank` must be a MemoryQueue or an IndexedBank, got Tensor"),
    (
        {"bank": make_queue(with_labels=False)},
        ValueError,
        "`bank` must have labels; this one has n",
    ),
    ({"labels": [0] * B}, TypeError, "`labels` must be a Tensor, got list"),
    ({"labels": labels.float()}, TypeError, "`labels` must be of an integer dtype, got float32"),
    ({"labels": labels[None]}, ValueError, "`labels` must have shape (B,), got (1, 6)"),
    ({"labels": meta(labels)}, ValueError, "the device of the bank, cpu, got meta"),
    ({"M": 0}, ValueError, "`M` must be at least 1, got 0"),
    ({"M": 1.0}, TypeError, "`M` must be an int, got float"),
    ({"M": "3"}, TypeError, "`M` must be an int, got str"),
    ({"M": None}, TypeError, "`M` must be an int, got NoneType"),
    ({"M": 4}, ValueError, "rows of other labels in the bank, 3 for query 0, got 4"),
    ({"bank": make_queue(filled=0), "M": 1}, ValueError, "0 for query 0, got 1"),
    (
        {"bank": make_queue(filled=1), "M": 1, "replacement": True},
        ValueError,
        "rows of other labels in the bank, 0 for query 0, got 1",
    ),
    ({"replacement": np.ones(2)}, TypeError, "`replacement` must be True or False, got ndarray"),
    ({"generator": 0}, TypeError, "`generator` must be a torch.Generator, got int"),
]


@table(SAMPLE)
def test_sample_negatives(changes, error, message):
    given = {"bank": make_queue(), "labels": labels, "M": 3, **changes}
    refused(changes, error, message, partial(codir_fast.sample_negatives, **given))


# What is called directly has one class of error for all, and words of its own.
contrast = {"query": q, "positive": q, "bank": rows, "inv_temperature": torch.tensor(5.0)}
backward = {name: contrast[name] for name in ("query", "bank", "inv_temperature")}
backward |= {"grad_loss": torch.ones(B), "lse": torch.ones(B).double()}
pooled_grad = torch.ones(2, 8)
WORKING = {
    "bank_contrast": contrast,
    "bank_contrast_backward": backward,
    "indexed_contrast": {**contrast, "index": index},
    "indexed_contrast_backward": {**backward, "index": index},
    "bank_update": {"bank": rows, "index": labels, "keys": q, "momentum": 0.5},
    "masked_pool": {"hidden_states": [layer] * 2, "attention_mask": None, "mode": "max"},
    "masked_pool_backward": {
        "grad": pooled_grad,
        "attention_mask": None,
        "argmax": torch.ones(2, 8, dtype=torch.int64),
        "num_layers": 2,
        "num_tokens": 5,
        "mode": "max",
    },
}
BOTH = ("bank_contrast", "indexed_contrast")
BACKWARD = ("bank_contrast_backward", "indexed_contrast_backward")
ALL = (*BOTH, *BACKWARD)
INDEXED = ("indexed_contrast", "indexed_contrast_backward")
MEAN = {"mode": "mean"}
DIRECT = [
    (ALL, {"query": q[0]}, "`query` must be a (B, D) tensor"),
    (ALL, {"query": q[None]}, "`query` must be a (B, D) tensor"),
    (ALL, {"query": q[:, :0]}, "`query` must have at least one column"),
    (ALL, {"query": q[:, :5]}, "`bank` must have shape (40, 5, ), got (40, 9, )"),
    (ALL, {"query": q.long()}, "`query` must be float32"),
    (BACKWARD, {"query": q.double()}, "`grad_loss` must be float64, as `query`"),
    (ALL, {"query": q.double(), "bank_scale": torch.ones(K)}, "`bank_scale` must be float64, as"),
    (ALL, {"query": meta(q)}, "one device, got cpu and meta"),
    (ALL, {"bank": rows[0]}, "`bank` must be a (K, D) tensor"),
    (ALL, {"bank": own}, "`bank` must be a (K, D) tensor"),
    (ALL, {"bank": rows[:, 1:]}, "`bank` must have shape (40, 9, ), got (40, 8, )"),
    (ALL, {"bank": rows.long()}, f"`bank` must be {FLOATS}"),
    (ALL, {"bank": rows.cfloat()}, f"`bank` must be {FLOATS}"),
    (ALL, {"bank": meta(rows)}, "one device, got cpu and meta"),
    (ALL, {"inv_temperature": torch.ones(2)}, "`inv_temperature` must be a scalar tensor"),
    (ALL, {"inv_temperature": torch.ones(0)}, "`inv_temperature` must be a scalar tensor"),
    (ALL, {"inv_temperature": torch.tensor(5)}, "`inv_temperature` must be float32 or float64"),
    (ALL, {"inv_temperature": torch.ones((), dtype=torch.half)}, "must be float32 or float64"),
    (ALL, {"inv_temperature": meta(torch.ones(()))}, "one device, got cpu and meta"),
    (ALL, {"bank_scale": torch.ones(K - 1)}, "`bank_scale` must have shape (40, ), got (39, )"),
    (ALL, {"bank_scale": torch.ones(K).double()}, "`bank_scale` must be float32"),
    (ALL, {"bank_scale": meta(torch.ones(K))}, "one device, got cpu and meta"),
    (ALL, {"labels": labels}, "`labels` and `bank_labels` go together"),
    (ALL, {"bank_labels": row_labels}, "`labels` and `bank_labels` go together"),
    (ALL, {"labels": labels[1:], "bank_labels": row_labels}, "`labels` must have shape (6, )"),
    (ALL, {"labels": labels, "bank_labels": labels}, "`bank_labels` must have shape (40, )"),
    (ALL, {"labels": labels.int(), "bank_labels": row_labels}, "`labels` must be int64"),
    (ALL, {"labels": labels, "bank_labels": row_labels.int()}, "`bank_labels` must be int64"),
    (ALL, {"exclude_index": labels[1:]}, "`exclude_index` must have shape (6, ), got (5, )"),
    (ALL, {"exclude_index": labels.int()}, "`exclude_index` must be int64"),
    (ALL, {"exclude_index": index}, "`exclude_index` must have shape (6, ), got (6, 3, )"),
    (ALL, {"valid": torch.ones(K)}, "`valid` must be bool"),
    (ALL, {"valid": torch.ones(B).bool()}, "`valid` must have shape (40, ), got (6, )"),
    (ALL, {"valid": torch.ones(()).bool()}, "`valid` must have shape (40, ), got ()"),
    (ALL, {"log_partition": torch.ones(2)}, "`log_partition` must be a scalar tensor"),
    (ALL, {"log_partition": torch.tensor(1)}, "`log_partition` must be float32 or float64"),
    (ALL, {"log_partition": torch.ones(()), "num_noise": 0}, "`num_noise` and `num_data` must be"),
    (ALL, {"log_partition": torch.ones(()), "num_data": -1}, "must be positive, got 1 and -1"),
    (
        ALL,
        {"log_partition": torch.ones(()), "num_noise": 0},
        "`num_noise` and `num_data` must be p",
    ),
    (ALL, {"log_partition": torch.ones(()), "num_data": 0}, "must be positive, got 1 and 0"),
    (ALL, {"log_partition": torch.ones(()), "num_data": -7}, "must be positive, got 1 and -7"),
    (BOTH, {"positive": q[:3]}, "`positive` must have shape (6, 9, ), got (3, 9, )"),
    (BOTH, {"positive": q[0]}, "`positive` must have shape (6, 9, ), got (9, )"),
    (BOTH, {"positive": q.long()}, f"`positive` must be {FLOATS}"),
    (BOTH, {"positive": meta(q)}, "one device, got cpu and meta"),
    (BACKWARD, {"grad_loss": torch.ones(B + 1)}, "`grad_loss` must have shape (6, ), got (7, )"),
    (BACKWARD, {"grad_loss": torch.ones(())}, "`grad_loss` must have shape (6, ), got ()"),
    (BACKWARD, {"grad_loss": torch.ones(B).double()}, "`grad_loss` must be float32"),
    (BACKWARD, {"lse": torch.ones(B - 1).double()}, "`lse` must have shape (6, ), got (5, )"),
    (BACKWARD, {"lse": torch.ones(B)}, "`lse` must be float64"),
    (INDEXED, {"index": index[1:]}, "`index` must have shape (6, 3, ), got (5, 3, )"),
    (INDEXED, {"index": labels}, "`index` must have shape (B, M)"),
    (INDEXED, {"index": index.int()}, "`index` must be int64"),
    (INDEXED, {"index": index.float()}, "`index` must be int64"),
    (INDEXED, {"index": index + K}, "`index` must be in [0, 40), got 40"),
    (INDEXED, {"index": index - 2**62}, "`index` must be in [0, 40), got -4611686018427387904"),
    (INDEXED, {"index": meta(index)}, "one device, got cpu and meta"),
    (INDEXED, {"bank": rows[:0]}, "`index` must be in [0, 0), got 0"),
    (["bank_update"], {"bank": rows[0]}, "`bank` must be a contiguous (K, D) tensor"),
    (["bank_update"], {"bank": rows.T}, "`bank` must be a contiguous (K, D) tensor"),
    (["bank_update"], {"bank": rows[:1].expand(K, D)}, "`bank` must be a contiguous (K, D) tensor"),
    (["bank_update"], {"bank": rows.long()}, f"`bank` must be {FLOATS}"),
    (["bank_update"], {"bank": rows.double()}, "`keys` must be float64 for a float64 bank"),
    (["bank_update"], {"bank": meta(rows)}, "one device, got cpu and meta"),
    (["bank_update"], {"index": index}, "`index` must have shape (18, ), got (6, 3, )"),
    (["bank_update"], {"index": labels.int()}, "`index` must be int64"),
    (["bank_update"], {"index": labels + K}, "`index` must be in [0, 40), got 40"),
    (["bank_update"], {"index": labels - 2**62}, "`index` must be in [0, 40), got -46116860184"),
    (["bank_update"], {"keys": q[1:]}, "`keys` must have shape (6, 9, ), got (5, 9, )"),
    (["bank_update"], {"keys": q[:, 1:]}, "`keys` must have shape (6, 9, ), got (6, 8, )"),
    (["bank_update"], {"keys": q.half()}, "`keys` must be float32"),
    (["bank_update"], {"keys": meta(q)}, "one device, got cpu and meta"),
    (
        ["bank_update"],
        {"filled": torch.ones(B).bool()},
        "`filled` must have shape (40, ), got (6, )",
    ),
    (["bank_update"], {"filled": torch.ones(K)}, "`filled` must be bool"),
    (["bank_update"], {"filled": torch.ones(2 * K).bool()[::2]}, "`filled` must be contiguous"),
    (["masked_pool"], {"hidden_states": []}, "There were no tensor arguments"),
    (["masked_pool"], {"hidden_states": [layer[0]]}, "`hidden_states` must hold tensors of shape"),
    (["masked_pool"], {"hidden_states": [layer, layer[1:]]}, "`hidden_states` must have shape (2,"),
    (
        ["masked_pool"],
        {"hidden_states": [layer, layer.half()]},
        "`hidden_states` must share one dty",
    ),
    (["masked_pool"], {"hidden_states": [layer.long()]}, f"`hidden_states` must be {FLOATS}"),
    (["masked_pool"], {"hidden_states": [layer, meta(layer)]}, "one device, got cpu and meta"),
    (["masked_pool"], {"attention_mask": layer[0]}, "`attention_mask` must have shape (2, 5, )"),
    (["masked_pool"], {"attention_mask": layer[..., 0]}, "`attention_mask` must be int64 or bool"),
    (["masked_pool"], {"mode": "cls"}, "`mode` must be mean, first, last or max, got cls"),
    (
        ["masked_pool_backward"],
        {"grad": pooled_grad[0]},
        "`grad` must have shape (B, num_layers * H)",
    ),
    (
        ["masked_pool_backward"],
        {"grad": pooled_grad[:, 1:]},
        "`grad` must have shape (B, num_layer",
    ),
    (["masked_pool_backward"], {"grad": pooled_grad.long()}, f"`grad` must be {FLOATS}"),
    (["masked_pool_backward"], {"num_layers": 0}, "`num_layers` must be positive"),
    (["masked_pool_backward"], {"num_layers": -2}, "`num_layers` must be positive"),
    (["masked_pool_backward"], {"num_tokens": -1, **MEAN}, "`num_tokens` not negative"),
    (["masked_pool_backward"], {"num_tokens": 1}, "`argmax` must be in [-1, num_tokens)"),
    (
        ["masked_pool_backward"],
        {"argmax": index},
        "`argmax` must have shape (2, 8, ), got (6, 3, )",
    ),
    (["masked_pool_backward"], {"argmax": pooled_grad}, "`argmax` must be int64"),
    (["masked_pool_backward"], {"argmax": pooled_grad.long() - 3}, "`argmax` must be in [-1, num"),
    (["masked_pool_backward"], {"mode": "cls"}, "`mode` must be mean, first, last or max, got cls"),
    (
        ["masked_pool_backward"],
        {"attention_mask": index, **MEAN},
        "`attention_mask` must have shape",
    ),
]
DIRECT = [(op, changes, RuntimeError, message) for ops, changes, message in DIRECT for op in ops]


@table(DIRECT)
def test_operators_called_directly(name, changes, error, message):
    op = getattr(torch.ops.codir_fast, name)
    with pytest.raises(error, match=re.escape(message)):
        op(**{**WORKING[name], **changes})


@pytest.mark.parametrize(
    "wrong", [None, "x", [1.0], np.ones(3), 1j], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("name", WORKING)
def test_operators_take_tensors_alone(name, wrong):
    """Refused by torch in its own words, or by the checks: None comes as an undefined tensor."""
    op = getattr(torch.ops.codir_fast, name)
    for argument, value in WORKING[name].items():
        if isinstance(value, torch.Tensor) and not (argument == "argmax" and wrong is None):
            with pytest.raises((RuntimeError, TypeError)):
                op(**{**WORKING[name], argument: wrong})


@pytest.mark.parametrize("name", WORKING)
def test_the_calls_that_the_rows_change_work(name):
    given = dict(WORKING[name])
    if name == "bank_update":
        given["bank"] = given["bank"].clone()
    getattr(torch.ops.codir_fast, name)(**given)
