"""What compiled steps and torch.func may not miss: that a bank was emptied or exchanged, that log Z
is not known yet, that a temperature is held in range.
"""

import math

import pytest
import torch
from torch.func import functional_call

from codir_fast import ContrastiveLoss, IndexedBank, MemoryQueue
from codir_fast.functional import contrastive_loss
from codir_fast.loss_arguments import inverse_temperature

B, K, D = 6, 20, 16


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def pair():
    return torch.randn(B, D), torch.randn(B, D)


def full(kind):
    bank = kind(K, D)
    if kind is MemoryQueue:
        bank.enqueue(torch.randn(K, D))
    else:
        bank.update(torch.arange(K), torch.randn(K, D))
    assert bank.is_full
    return bank


@pytest.mark.parametrize("kind", [MemoryQueue, IndexedBank])
def test_a_compiled_loss_sees_which_rows_are_valid(kind):
    (q, p), bank = pair(), full(kind)
    step = compiled(lambda q, p: contrastive_loss(q, p, bank))
    torch.testing.assert_close(step(q, p), contrastive_loss(q, p, bank))
    bank.valid[3:] = False
    bank.rows[3:] = math.nan
    torch.testing.assert_close(step(q, p), contrastive_loss(q, p, bank.rows[:3]))
    bank.clear()
    assert len(bank) == 0 and not bank.is_full
    assert step(q, p) == contrastive_loss(q, p, bank) == 0


def test_a_cleared_queue_begins_anew():
    queue, keys = MemoryQueue(K, D, with_labels=True), torch.randn(3, D)
    queue.enqueue(torch.randn(K - 1, D), torch.arange(K - 1))
    queue.clear()
    queue.enqueue(keys, torch.tensor([7, 8, 9]))
    torch.testing.assert_close(queue.keys, torch.nn.functional.normalize(keys))
    assert queue.labels.tolist() == [7, 8, 9]


def test_a_compiled_loss_sees_another_buffer():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = full(MemoryQueue)

        def forward(self, q, p):
            return contrastive_loss(q, p, self.bank)

    (q, p), step = pair(), Step()
    state = dict(step.named_buffers()) | {"bank.valid": torch.arange(K) < 3}
    expected = functional_call(step, state, (q, p))
    got = compiled(lambda state, q, p: functional_call(step, state, (q, p)))(state, q, p)
    torch.testing.assert_close(got, expected)
    exported = torch.export.export(step, (q, p)).module()
    exported.load_state_dict(state, strict=False)
    torch.testing.assert_close(exported(q, p), expected)


def first_batches(first):
    """Batches of training, the first of which gives no log Z that is to be kept."""
    (q, p), bank = pair(), MemoryQueue(200, D)
    if first == "an empty bank":
        yield q, p, bank
        bank.enqueue(torch.randn(200, D))
    elif first == "a NaN":
        bank.enqueue(torch.randn(200, D))
        yield torch.full_like(q, math.nan), p, bank
    else:
        yield q[:1], p[:1], None
        bank = None
    for _ in range(2):
        yield *pair(), bank


@pytest.mark.parametrize("first", ["an empty bank", "a NaN", "one example"])
def test_log_partition_of_a_compiled_loss(first):
    """Is that of the first batch with negatives, as without torch.compile, and stays."""
    results = []
    for wrap in (lambda f: f, compiled):
        torch.manual_seed(0)
        loss_fn = ContrastiveLoss(objective="nce")
        step, losses, kept = wrap(loss_fn), [], []
        for batch in first_batches(first):
            losses.append(step(*batch))
            kept.append(loss_fn.log_partition.clone())
        assert kept[0].isnan() and kept[1].isfinite() and kept[1] == kept[2]
        loss_fn.eval()
        results.append((losses[1:], kept[1], loss_fn._log_partition_known))
    torch.testing.assert_close(results[1], results[0])
    assert results[0][2] is True


def test_enqueue_under_grad_is_refused_before_anything_is_written():
    queue, (q, p) = MemoryQueue(K, D, with_labels=True), pair()
    queue.enqueue(torch.randn(5, D), torch.arange(5))
    before = {name: value.clone() for name, value in queue.state_dict().items()}

    def step(x):
        queue.enqueue(x, torch.arange(B))
        return contrastive_loss(x, p, queue)

    with pytest.raises(RuntimeError, match=r"enqueue must be called outside of torch\.func"):
        torch.func.grad(step)(q)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_forward_mode_is_refused_for_negatives():
    (q, p), negatives = pair(), torch.randn(K, D)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(negatives, torch.randn(K, D))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            contrastive_loss(q, p, dual)
        assert contrastive_loss(q, p, negatives).isfinite()


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_a_temperature_that_others_use_too(wrap):
    """It is held in range in place, and a penalty on it is still differentiable."""
    q, p = pair()
    loss_fn = ContrastiveLoss(learnable_temperature=True)

    def step(q, p):
        penalty = loss_fn.log_inv_temperature.square()
        return loss_fn(q, p) + penalty

    wrap(step)(q, p).backward()
    log_inv = loss_fn.log_inv_temperature.detach().clone().requires_grad_()
    (contrastive_loss(q, p, temperature=(-log_inv).exp()) + log_inv.square()).backward()
    torch.testing.assert_close(loss_fn.log_inv_temperature.grad, log_inv.grad)


def test_a_temperature_from_elsewhere():
    (q, p), loss_fn = pair(), ContrastiveLoss(learnable_temperature=True)
    both = torch.tensor([1.0, 1.4], requires_grad=True)
    for log_inv in both.exp().unbind():
        functional_call(loss_fn, {"log_inv_temperature": log_inv}, (q, p)).backward(
            retain_graph=True
        )
    expected = torch.tensor([1.0, 1.4], requires_grad=True)
    sum(contrastive_loss(q, p, temperature=(-x).exp()) for x in expected.exp()).backward()
    torch.testing.assert_close(both.grad, expected.grad)


def test_a_transposed_query_is_compiled():
    """By the backend in Python, whose outputs must lie as inductor was told."""
    q, p, bank = torch.randn(D, B), torch.randn(B, D), torch.randn(K, D)
    index = torch.randint(0, K, (B, 4))
    for options in ({}, {"negative_index": index}):

        def loss(q, options=options):
            return contrastive_loss(q.T, p, bank, backend="torch", **options)

        torch.testing.assert_close(torch.compile(loss)(q), loss(q))


def test_a_compiled_graph_has_no_kernel_of_another_device():
    """1/t of a number lies where the query is: made on the CPU beside a GPU, it would need a C++
    compiler.
    """
    query = torch.empty(B, D, device="meta")
    devices = []

    def record(graph, inputs):
        nodes = (node for node in graph.graph.nodes if node.target is torch.full)
        devices.extend(node.meta["example_value"].device.type for node in nodes)
        return graph

    torch.compile(lambda q: inverse_temperature(0.07, q) * q, fullgraph=True, backend=record)(query)
    assert devices == ["meta"]
    assert inverse_temperature(0.07, query).device.type == "cpu"  # kernels get it as a number
