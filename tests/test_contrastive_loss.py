"""functional.contrastive_loss and the module ContrastiveLoss: sources of negatives, options, and
what they refuse.
"""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import codir_fast
from codir_fast import directions, reference
from codir_fast.functional import contrastive_loss

BACKENDS = ("cpu", "torch")
HALF = torch.bfloat16
B, K, D, T = 6, 40, 9, 0.2


def unit(x):
    return F.normalize(x, dim=1)


def pair(dtype=torch.float64):
    return tuple(torch.randn(B, D, dtype=dtype).requires_grad_() for _ in range(2))


def specified(query, positive, bank, **masks):
    return reference.bank_contrast(unit(query), unit(positive), bank, 1 / T, **masks)


def assert_same(loss, expected, inputs):
    """Equal values, and equal gradients under a random upstream gradient."""
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(loss, inputs, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs, upstream))


def filled_queue(rows, **options):
    queue = codir_fast.MemoryQueue(K, D, dtype=torch.float64, **options)
    queue.enqueue(rows, *([torch.arange(len(rows)) % 3] if options.get("with_labels") else []))
    return queue


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_batch(backend):
    q, p = pair()
    loss = contrastive_loss(q, p, temperature=T, reduction="none", backend=backend)
    logits = unit(q) @ unit(p).T / T
    expected = F.cross_entropy(logits, torch.arange(B), reduction="none")
    assert_same(loss, expected, [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_batch_with_labels(backend):
    q, p = pair()
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    options = dict(temperature=T, reduction="none", labels=labels, backend=backend)
    expected = specified(q, p, unit(p), labels=labels, bank_labels=labels)
    assert_same(contrastive_loss(q, p, **options), expected, [q, p])


def test_in_batch_of_one_has_no_negative():
    q = torch.randn(1, D, requires_grad=True)
    loss = contrastive_loss(q, torch.randn(1, D))
    loss.backward()
    assert loss == 0 and q.grad.eq(0).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_negatives(backend, needs_gradient, normalize):
    q, p = pair()
    negatives = (3 * torch.randn(K, D, dtype=torch.float64)).requires_grad_(needs_gradient)
    labels, negative_labels = torch.randint(0, 3, (B,)), torch.randint(0, 3, (K,)).int()
    exclude_index = torch.randint(-1, K, (B,))
    loss = contrastive_loss(
        q,
        p,
        negatives,
        temperature=T,
        normalize=normalize,
        reduction="none",
        labels=labels,
        negative_labels=negative_labels,
        exclude_index=exclude_index,
        backend=backend,
    )
    change = unit if normalize else (lambda x: x)
    expected = reference.bank_contrast(
        change(q),
        change(p),
        change(negatives),
        1 / T,
        labels=labels,
        bank_labels=negative_labels,
        exclude_index=exclude_index,
    )
    assert_same(loss, expected, [q, p, negatives] if needs_gradient else [q, p])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs(backend, needs_gradient, dtype, assert_accurate):
    q, p = (x.detach().to(dtype).requires_grad_() for x in pair())
    negatives = torch.randn(K, D).to(dtype).requires_grad_(needs_gradient)
    inputs = [q, p, negatives] if needs_gradient else [q, p]
    upstream = torch.randn(B)

    def results(function, wide):
        given = [x.detach().to(wide).requires_grad_(x.requires_grad) for x in (q, p, negatives)]
        loss = function(*given)
        loss.backward(upstream.to(loss.dtype))
        return [loss.detach(), *(x.grad for x in given[: len(inputs)])]

    def ours(*given):
        return contrastive_loss(*given, temperature=T, reduction="none", backend=backend)

    def plain(a, b, c):
        wide = torch.promote_types(a.dtype, torch.float32)
        return specified(a.to(wide), b.to(wide), unit(c.to(wide)))

    got = results(ours, dtype)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert_accurate(got, results(plain, dtype), results(plain, torch.float64), condition=1 / T)


@pytest.mark.parametrize("rows", [0, 17, K])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queue(backend, rows):
    q, p = pair()
    keys = unit(torch.randn(rows, D, dtype=torch.float64))
    queue = filled_queue(keys, with_labels=True)
    labels = torch.randint(0, 3, (B,))
    options = dict(temperature=T, reduction="none", backend=backend)
    assert_same(contrastive_loss(q, p, queue, **options), specified(q, p, keys), [q, p])
    expected = specified(q, p, keys, labels=labels, bank_labels=torch.arange(rows) % 3)
    assert_same(contrastive_loss(q, p, queue, labels=labels, **options), expected, [q, p])


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_indexed_bank(backend, bank_dtype):
    q, p = pair()
    bank = codir_fast.IndexedBank(K, D, dtype=bank_dtype, labels=torch.arange(K) % 3)
    index = torch.randperm(K)[:25]
    bank.update(index, torch.randn(25, D))
    own = index[:B].clone()
    own[2] = -1
    labels = bank.labels[index[:B]]
    options = dict(temperature=T, reduction="none", backend=backend)
    loss = contrastive_loss(q, p, bank, labels=labels, exclude_index=own, **options)
    masks = dict(labels=labels, bank_labels=bank.labels, exclude_index=own, valid=bank.valid)
    assert_same(loss, specified(q, p, bank.keys.double(), **masks), [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bank_may_change_between_forward_and_backward(backend):
    q, p = pair()
    for bank in (filled_queue(torch.randn(K, D)), filled_queue(torch.randn(7, D))):
        for use in (bank, bank.rows.clone()):
            expected = contrastive_loss(q, p, use, backend=backend)
            gradients = torch.autograd.grad(expected, [q, p])
            loss = contrastive_loss(q, p, use, backend=backend)
            if isinstance(use, codir_fast.MemoryQueue):
                use.enqueue(p)
            else:
                use.zero_()
            torch.testing.assert_close(torch.autograd.grad(loss, [q, p]), gradients)
    assert not bank.rows.requires_grad


def test_reductions_and_weight():
    q, p = pair(torch.float32)
    weight = torch.rand(B, dtype=torch.float64, requires_grad=True)
    each = contrastive_loss(q, p, reduction="none")
    assert each.shape == (B,) and each.dtype == torch.float32
    torch.testing.assert_close(contrastive_loss(q, p), each.mean())
    torch.testing.assert_close(contrastive_loss(q, p, reduction="sum"), each.sum())
    weighted = contrastive_loss(q, p, weight=weight)
    torch.testing.assert_close(weighted, (each * weight.float()).mean())
    weighted.backward()
    torch.testing.assert_close(weight.grad, each.detach().double() / B)


def test_no_query():
    empty, negatives = torch.randn(0, D, requires_grad=True), torch.randn(K, D)
    assert contrastive_loss(empty, empty, negatives, reduction="none").shape == (0,)
    assert contrastive_loss(empty, empty, reduction="sum") == 0
    contrastive_loss(empty, empty, negatives, reduction="sum").backward()
    assert empty.grad.shape == (0, D)


def test_strides_do_not_matter():
    wide = torch.randn(2 * K, 2 * D)
    q, p, negatives = wide[:B, ::2], wide.T[:D, :B].T, wide[::2, :D]
    expected = contrastive_loss(q.contiguous(), p.contiguous(), negatives.contiguous())
    torch.testing.assert_close(contrastive_loss(q, p, negatives), expected)


def test_meta_tensors():
    q = torch.randn(B, D, device="meta", requires_grad=True)
    contrastive_loss(q, q, torch.randn(K, D, device="meta")).backward()
    assert q.grad.shape == (B, D)


def test_temperature_tensor_gets_its_gradient():
    q, p = pair()
    t = torch.tensor(T, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(q, p, temperature=t, reduction="none")
    logits = unit(q) @ unit(p).T / t
    assert_same(loss, F.cross_entropy(logits, torch.arange(B), reduction="none"), [q, p, t])


def test_second_derivative_raises():
    q, p = pair()
    (first,) = torch.autograd.grad(contrastive_loss(q, p), q, create_graph=True)
    with pytest.raises(RuntimeError, match="in_batch_contrast has no second derivative"):
        first.square().sum().backward()


def of_forms(backend):
    """The loss with each form of negatives, as a function of the query."""
    p, rows, own = torch.randn(B, D), torch.randn(K, D), torch.randn(B, 3, D)
    index, options = torch.randint(0, K, (B, 3)), {"backend": backend}
    return {
        "in-batch": lambda q: contrastive_loss(q, p, **options),
        "positive": lambda q: contrastive_loss(p, q, rows, **options),
        "shared": lambda q: contrastive_loss(q, p, rows, **options),
        "gradient": lambda q: contrastive_loss(p, p, q, **options),
        "own": lambda q: contrastive_loss(q, p, own, **options),
        "index": lambda q: contrastive_loss(q, p, rows, negative_index=index, **options),
        "temperature": lambda q: contrastive_loss(p, p, rows, temperature=q.exp().sum(), **options),
    }


FORMS = pytest.mark.parametrize("form", of_forms("auto"))
BOTH = pytest.mark.parametrize("backend", ["cpu", "torch"])


@BOTH
@FORMS
def test_second_derivative_raises_where_only_inputs_are_asked_for(form, backend):
    """torch.autograd.grad goes no further than to what it is asked for."""
    loss_of, x = of_forms(backend)[form], torch.randn(B, D, requires_grad=True)
    (first,) = torch.autograd.grad(loss_of(torch.tanh(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="contrast has no second derivative"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="contrast has no second derivative"):
        torch.autograd.functional.hessian(loss_of, x.detach())


@BOTH
@FORMS
def test_checkpoint(form, backend):
    loss_of, x = of_forms(backend)[form], torch.randn(B, D, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(x), x)
    torch.utils.checkpoint.checkpoint(loss_of, x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, p = torch.randn(B, D), torch.randn(B, D)
    weight = torch.randn(D, D, requires_grad=True)
    negatives = torch.randn(K, D)
    with torch.autocast("cpu", dtype=dtype):
        q = x @ weight
        loss = contrastive_loss(q, p, negatives)
        assert q.dtype == dtype and loss.dtype == torch.float32
        with pytest.raises(ValueError, match="`positive_key` must have the dtype of `query`"):
            contrastive_loss(q, p.double())
    torch.testing.assert_close(loss, contrastive_loss(q.float(), p, negatives))
    loss.backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("source", ["in-batch", "shared", "gradient", "queue", "indexed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend, source, compile_whole):
    q, p = pair(torch.float32)
    labels = torch.randint(0, 3, (B,))
    negatives, options = None, {"labels": labels}
    if source in ("shared", "gradient"):
        negatives = torch.randn(K, D, requires_grad=source == "gradient")
        options |= {"negative_labels": torch.randint(0, 3, (K,))}
        options |= {"exclude_index": torch.arange(B)}
    elif source == "queue":
        negatives = codir_fast.MemoryQueue(K, D, with_labels=True)
        negatives.enqueue(torch.randn(10, D), torch.arange(10) % 3)
    elif source == "indexed":
        negatives = codir_fast.IndexedBank(K, D, labels=torch.arange(K) % 3)
        negatives.update(torch.arange(K), torch.randn(K, D))
    inputs = [q, p] + ([negatives] if source == "gradient" else [])
    loss_fn = codir_fast.ContrastiveLoss(T, backend=backend)
    weight = torch.rand(B)

    def step(q, p):
        return loss_fn(q, p, negatives, weight=weight, **options)

    compiled = compile_whole(step)
    assert_same(compiled(q, p), step(q, p), inputs)


def test_compiles_with_inductor_and_other_sizes(compile_whole):
    # In-batch, so that B is a dynamic size of everything; and a temperature that changes.
    def step(q, p, t):
        return contrastive_loss(q, p, temperature=t)

    compiled = compile_whole(step, backend="inductor")
    for rows, t in ((4, 0.1), (7, 0.1), (9, 0.2), (12, 0.3)):
        q, p = (torch.randn(rows, D, requires_grad=True) for _ in range(2))
        assert_same(compiled(q, p, t), step(q, p, t), [q, p])


def test_learnt_temperature():
    loss_fn = codir_fast.ContrastiveLoss(T, learnable_temperature=True)
    assert list(loss_fn.state_dict()) == ["log_inv_temperature"]
    assert math.isclose(loss_fn.log_inv_temperature.item(), math.log(1 / T), rel_tol=1e-6)
    q, p = pair(torch.float32)
    loss = loss_fn(q, p)
    log_inv = loss_fn.log_inv_temperature.detach().clone().requires_grad_()
    expected = F.cross_entropy(unit(q) @ unit(p).T * log_inv.exp(), torch.arange(B))
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, loss_fn.log_inv_temperature)
    torch.testing.assert_close(got, torch.autograd.grad(expected, log_inv)[0])


@pytest.mark.parametrize(("value", "bound"), [(50.0, 100.0), (-50.0, 0.01)])
def test_learnt_temperature_stays_in_range(value, bound):
    loss_fn = codir_fast.ContrastiveLoss(learnable_temperature=True)
    q, p = pair(torch.float32)
    expected = contrastive_loss(q, p, temperature=1 / bound)
    with torch.no_grad():
        loss_fn.log_inv_temperature.fill_(value)
    loss_fn.eval()
    torch.testing.assert_close(loss_fn(q, p), expected)
    assert loss_fn.log_inv_temperature.item() == value  # a validation pass changes nothing
    loss_fn.train()
    loss = loss_fn(q, p)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert math.isclose(loss_fn.log_inv_temperature.item(), math.log(bound), rel_tol=1e-6)
    assert loss_fn.log_inv_temperature.grad != 0  # it can come back


def test_learnt_temperature_in_two_losses_before_one_backward():
    loss_fn = codir_fast.ContrastiveLoss(T, learnable_temperature=True)
    (q, p), parameter = pair(torch.float32), loss_fn.log_inv_temperature
    apart = [torch.autograd.grad(loss_fn(*each), parameter)[0] for each in ((q, p), (p, q))]
    loss = loss_fn(q, p) + loss_fn(p, q)
    with torch.no_grad():
        loss_fn(q, p)
    torch.testing.assert_close(torch.autograd.grad(loss, parameter)[0], apart[0] + apart[1])


def test_learnt_temperature_compiles(compile_whole):
    loss_fn = codir_fast.ContrastiveLoss(T, learnable_temperature=True)
    plain = copy.deepcopy(loss_fn)
    q, p = pair(torch.float32)
    loss = compile_whole(loss_fn)(q, p)
    loss.backward()
    plain(q, p).backward()
    torch.testing.assert_close(loss_fn.log_inv_temperature.grad, plain.log_inv_temperature.grad)


def test_module_without_parameters_has_an_empty_state():
    loss_fn = codir_fast.ContrastiveLoss(T)
    assert not loss_fn.state_dict() and loss_fn.temperature == T
    assert "temperature=0.2, objective='infonce'" in repr(loss_fn)


@pytest.mark.filterwarnings("error")
def test_repr_of_a_learnt_temperature():
    loss_fn = codir_fast.ContrastiveLoss(T, learnable_temperature=True)
    assert "temperature=0.2, " in repr(loss_fn)
    assert "temperature=on meta, " in repr(loss_fn.to("meta"))


@pytest.mark.parametrize("name", ["margin", "pos_margin", "neg_margin"])
def test_margin_names_the_other_class(name):
    with pytest.raises(TypeError, match=f"`{name}` .* pytorch_metric_learning"):
        codir_fast.ContrastiveLoss(**{name: 1.0})


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected argument `tau`"):
        codir_fast.ContrastiveLoss(tau=0.1)


q32, n32 = torch.ones(B, D), torch.ones(K, D)
labels = torch.zeros(B, dtype=torch.int64)
queue = codir_fast.MemoryQueue(K, D)
meta = torch.device("meta")
BAD = {
    "query rank": ((q32[0], q32[0]), {}, ValueError, "with D at least 1, got (9,)"),
    "query type": (([1.0], q32), {}, TypeError, "`query` must be a Tensor, got list"),
    "query dtype": ((q32.int(), q32.int()), {}, TypeError, "`query` must be float32, float64"),
    "positive rank": ((q32, q32[0]), {}, ValueError, "B=6, D=9 as `query`, got (9,)"),
    "positive D": ((q32, q32[:, :5]), {}, ValueError, "`positive_key` must have shape (B, D)"),
    "positive B": ((q32, q32[:5]), {}, ValueError, "got (5, 9)"),
    "positive dtype": (
        (q32, q32.double()),
        {},
        ValueError,
        "`positive_key` must have the dtype of `query`, float32, got float64",
    ),
    "positive device": (
        (q32, q32.to(meta)),
        {},
        ValueError,
        "`positive_key` must be on the device of `query`, cpu, got meta",
    ),
    "negative type": ((q32, q32, [1]), {}, TypeError, "a MemoryQueue or an IndexedBank, got list"),
    "negative rank": ((q32, q32, n32[0]), {}, ValueError, "`negative_keys` must have shape (K, D)"),
    "negative D": ((q32, q32, n32[:, :4]), {}, ValueError, "D=9 as `query`, got (40, 4)"),
    "negative dtype": ((q32, q32, n32.half()), {}, ValueError, "float32, got float16"),
    "negative int": ((q32, q32, n32.int()), {}, TypeError, "`negative_keys` must be float32"),
    "negative device": ((q32, q32, n32.to(meta)), {}, ValueError, "cpu, got meta"),
    "bank D": (
        (q32, q32, codir_fast.MemoryQueue(4, 5)),
        {},
        ValueError,
        "`negative_keys` must be a bank of dim D=9 as `query`, got 5",
    ),
    "bank device": (
        (q32, q32, codir_fast.MemoryQueue(4, D).to(meta)),
        {},
        ValueError,
        "`negative_keys` must be on the device of `query`",
    ),
    "bank dtype": (
        (q32, q32, codir_fast.MemoryQueue(4, D, dtype=torch.float64)),
        {},
        ValueError,
        "`negative_keys` is a float64 bank",
    ),
    "labels length": ((q32, q32), {"labels": labels[:4]}, ValueError, "(B,) with B=6, got (4,)"),
    "labels dtype": ((q32, q32), {"labels": labels.float()}, TypeError, "`labels` must be of an"),
    "labels type": ((q32, q32), {"labels": [0] * B}, TypeError, "`labels` must be a Tensor"),
    "labels device": ((q32, q32), {"labels": labels.to(meta)}, ValueError, "`labels` must be on"),
    "labels alone": ((q32, q32, n32), {"labels": labels}, ValueError, "needs `negative_labels`"),
    "bank labels": ((q32, q32, queue), {"labels": labels}, ValueError, "a bank that has labels"),
    "negative labels alone": (
        (q32, q32, n32),
        {"negative_labels": torch.zeros(K).int()},
        ValueError,
        "`negative_labels` needs `labels`",
    ),
    "negative labels in-batch": (
        (q32, q32),
        {"labels": labels, "negative_labels": labels},
        ValueError,
        "`negative_labels` needs `negative_keys` given as a tensor",
    ),
    "negative labels of a bank": (
        (q32, q32, queue),
        {"labels": labels, "negative_labels": labels},
        ValueError,
        "`negative_labels` needs `negative_keys` given as a tensor",
    ),
    "negative labels length": (
        (q32, q32, n32),
        {"labels": labels, "negative_labels": labels},
        ValueError,
        "`negative_labels` must have shape (K,) with K=40, got (6,)",
    ),
    "exclude shape": (
        (q32, q32, n32),
        {"exclude_index": torch.zeros(B, 1).long()},
        ValueError,
        "`exclude_index` must have shape (B,) with B=6, got (6, 1)",
    ),
    "exclude range": (
        (q32, q32, n32),
        {"exclude_index": torch.full((B,), K)},
        ValueError,
        "`exclude_index` must be in [-1, 40), got 40",
    ),
    "exclude below": (
        (q32, q32, n32),
        {"exclude_index": torch.full((B,), -2)},
        ValueError,
        "`exclude_index` must be in [-1, 40), got -2",
    ),
    "exclude in-batch": ((q32, q32), {"exclude_index": labels}, ValueError, "needs `negative_key"),
    "weight shape": ((q32, q32), {"weight": torch.ones(2)}, ValueError, "B=6, got (2,)"),
    "weight type": ((q32, q32), {"weight": 2.0}, TypeError, "`weight` must be a Tensor"),
    "reduction": ((q32, q32), {"reduction": "avg"}, ValueError, "`reduction` must be one of"),
    "objective": ((q32, q32), {"objective": "x"}, ValueError, "`objective` must be one of"),
    "symmetric": ((q32, q32), {"symmetric": 1}, TypeError, "`symmetric` must be True or False"),
    "index in-batch": (
        (q32, q32),
        {"negative_index": torch.zeros(B, 2).long()},
        ValueError,
        "`negative_index` needs `negative_keys`",
    ),
    "index shape": (
        (q32, q32, n32),
        {"negative_index": torch.zeros(B - 1, 2).long()},
        ValueError,
        "`negative_index` must have shape (B, M) with B=6, got (5, 2)",
    ),
    "index range": (
        (q32, q32, n32),
        {"negative_index": torch.full((B, 2), K)},
        ValueError,
        "`negative_index` must be in [0, 40), got 40",
    ),
    "index dtype": (
        (q32, q32, n32),
        {"negative_index": torch.zeros(B, 2)},
        TypeError,
        "`negative_index` must be of an integer dtype, got torch.float32",
    ),
    "index of own": (
        (q32, q32, n32[:6].expand(B, 6, D)),
        {"negative_index": torch.zeros(B, 2).long()},
        ValueError,
        "`negative_index` needs `negative_keys` shared",
    ),
    "exclude of own": (
        (q32, q32, n32[:6].expand(B, 6, D)),
        {"exclude_index": torch.zeros(B).long()},
        ValueError,
        "`exclude_index` needs `negative_keys` shared",
    ),
    "labels of own": (
        (q32, q32, n32[:6].expand(B, 6, D)),
        {"labels": labels, "negative_labels": labels},
        ValueError,
        "`negative_labels` must have shape (B, M) with B=6, M=6",
    ),
    "per query": ((q32, q32, n32[None]), {}, ValueError, "(K, D) or (B, M, D) with B=6"),
    "backend": ((q32, q32), {"backend": "gpu"}, ValueError, "`backend` must be one of"),
    "temperature type": ((q32, q32), {"temperature": "1"}, TypeError, "must be a number, got str"),
    "temperature rank": (
        (q32, q32),
        {"temperature": torch.ones(2)},
        ValueError,
        "`temperature` must be 0-d, got shape (2,)",
    ),
    "temperature tensor": (
        (q32, q32),
        {"temperature": torch.tensor(-1.0)},
        ValueError,
        "`temperature` must be positive and finite, got -1.0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    args, options, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        contrastive_loss(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e-320])
def test_bad_temperature(value):
    message = "`temperature` must be positive and finite"
    with pytest.raises(ValueError, match=message):
        contrastive_loss(q32, q32, temperature=value)
    with pytest.raises(ValueError, match=message):
        codir_fast.ContrastiveLoss(value)


def test_bad_module_options():
    make = codir_fast.ContrastiveLoss
    with pytest.raises(ValueError, match=re.escape("`temperature` must be in [0.01, 100]")):
        make(0.001, learnable_temperature=True)
    with pytest.raises(ValueError, match='`num_data` needs objective "nce"'):
        make(num_data=100)
    with pytest.raises(TypeError, match="`learnable_temperature` must be True or False"):
        make(learnable_temperature="yes")
    with pytest.raises(ValueError, match="`reduction` must be one of"):
        make(reduction="avg")
    with pytest.raises(ValueError, match="`backend` must be one of"):
        make(backend="gpu")


def test_numbers_of_numpy():
    q, p, negatives = torch.randn(4, 8), torch.randn(4, 8), torch.randn(20, 8)
    t, log_z, n = np.float32(0.25), np.float64(3.0), np.int64(50)
    nce = {"objective": "nce", "log_partition": 3.0, "num_data": 50}
    nce_of_numpy = {"objective": "nce", "log_partition": log_z, "num_data": n}
    for given, plain in (({}, {}), (nce_of_numpy, nce)):
        expected = contrastive_loss(q, p, negatives, temperature=0.25, **plain)
        for loss in (
            contrastive_loss(q, p, negatives, temperature=t, **given),
            codir_fast.ContrastiveLoss(t, **given)(q, p, negatives),
        ):
            assert torch.equal(loss, expected)
    learnt = codir_fast.ContrastiveLoss(t, learnable_temperature=True)
    torch.testing.assert_close(learnt.temperature.item(), 0.25)
    assert codir_fast.ProjectionHead(np.int64(8), np.int64(3))(q).shape == (4, 3)


def test_a_positive_of_another_half_type_is_widened(monkeypatch):
    """As under autocast; the kernels of GPUs take the query's dtype, or float32."""
    monkeypatch.setattr(directions, "product_dtype", lambda query, backend: query.dtype)
    vectors = [torch.randn(n, D) for n in (B, B, K)]
    vectors = [x.to(y) for x, y in zip(vectors, (HALF, torch.float16, HALF), strict=True)]
    (way,), _ = directions.arrange(vectors, 0.07, False, False, "auto", (None,) * 4, None, False)
    query, positive, _ = way
    assert (query.dtype, positive.dtype) == (HALF, torch.float32)
    assert torch.equal(positive, vectors[1].float())
