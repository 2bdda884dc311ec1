"""What PyTorch's own tools make of the loss: torch.compile with changing sizes, automatic mixed
precision, functorch, repeated backward passes.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import codir_fast
from codir_fast.functional import contrastive_loss

D, M, T = 8, 5, 0.2
FORMS = ("in-batch", "shared", "gradient", "own", "index", "queue")
OBJECTIVES = ("infonce", "nce")


def make_inputs(form, B, K):
    """query, positive_key, negative_keys and options; all that may need a gradient does."""
    q, p = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    negatives, options = None, {}
    if form in ("shared", "gradient", "index"):
        negatives = torch.randn(K, D, requires_grad=form == "gradient")
    elif form == "own":
        negatives = torch.randn(B, K, D, requires_grad=True)
    elif form == "queue":
        negatives = codir_fast.MemoryQueue(K, D)
        negatives.enqueue(torch.randn(K - 1, D))
    if form == "index":
        options["negative_index"] = torch.randint(0, K, (B, M))
    return q, p, negatives, options


def gradients(loss, *inputs):
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    return torch.autograd.grad(loss, wanted, upstream)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_one_recompilation_for_each_size(form, objective):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, p, negatives, **options):
        return contrastive_loss(
            q, p, negatives, temperature=T, objective=objective, reduction="none", **options
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    changes_both = form != "queue"  # a queue keeps its size
    for B, K in [(4, 20), (4, 20), (6, 20), (7, 20), (9, 20), (9, 33), (9, 40), (12, 50)]:
        q, p, negatives, options = make_inputs(form, B, K if changes_both else 20)
        expected = step(q, p, negatives, **options)
        loss = compiled(q, p, negatives, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            gradients(loss, q, p, negatives), gradients(expected, q, p, negatives)
        )
    assert counter.frame_count <= 3


def test_the_module_recompiles_once_when_the_partition_is_known():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss_fn, plain = (codir_fast.ContrastiveLoss(T, objective="nce") for _ in range(2))
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counter)
    counts = []
    for _ in range(4):
        q, p, negatives, _ = make_inputs("shared", 4, 20)
        loss, expected = compiled(q, p, negatives), plain(q, p, negatives)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, q, p), gradients(expected, q, p))
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1] and loss_fn.log_partition.isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradient_scaling(dtype, form, objective):
    """A step of a linear encoder under autocast with GradScaler, beside the same step in
    float32.
    """
    q, p, negatives, options = make_inputs(form, 6, 20)
    encoder = torch.nn.Linear(D, D)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options |= {"objective": objective, "temperature": T}
    with torch.autocast("cpu", dtype=dtype):
        encoded = encoder(q)
        loss = contrastive_loss(encoded, p, negatives, **options)
    assert encoded.dtype == dtype and loss.dtype == torch.float32
    expected = contrastive_loss(encoded.float(), p, negatives, **options)
    torch.testing.assert_close(loss, expected)
    (wanted,) = torch.autograd.grad(expected, encoder.weight, retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(encoder.weight.grad, wanted, rtol=0.02, atol=0.02)
    before = encoder.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(encoder.weight, before) and scaler.get_scale() == 1024.0


def test_gradient_scaling_skips_a_step_that_overflows():
    q = torch.nn.Parameter(torch.full((2, D), torch.nan))
    optimizer = torch.optim.SGD([q], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(contrastive_loss(q, torch.randn(2, D), torch.randn(9, D))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_backward_twice(form, objective):
    """Through a kept graph: the same gradients again, added up."""
    q, p, negatives, options = make_inputs(form, 6, 20)
    loss = contrastive_loss(q, p, negatives, objective=objective, **options)
    loss.backward(retain_graph=True)
    leaves = [x for x in (q, p, negatives) if isinstance(x, torch.Tensor) and x.requires_grad]
    once = [x.grad.clone() for x in leaves]
    loss.backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_second_derivative(form, objective):
    q, p, negatives, options = make_inputs(form, 6, 20)
    loss = contrastive_loss(q, p, negatives, objective=objective, **options)
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="_contrast has no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_functorch_grad(form, objective):
    q, p, negatives, options = make_inputs(form, 6, 20)

    def loss_of(q, p):
        return contrastive_loss(q, p, negatives, objective=objective, **options)

    got = torch.func.grad(loss_of, argnums=(0, 1))(q.detach(), p.detach())
    torch.testing.assert_close(got, torch.autograd.grad(loss_of(q, p), (q, p)))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_vmap(backend):
    q, p, negatives = torch.randn(3, 6, D), torch.randn(3, 6, D), torch.randn(20, D)

    def loss_of(q, p):
        return contrastive_loss(q, p, negatives, backend=backend)

    expected = torch.stack([loss_of(*pair) for pair in zip(q, p, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss_of)(q, p), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss_of))(q, p)
    expected = torch.stack([torch.func.grad(loss_of)(*pair) for pair in zip(q, p, strict=True)])
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", ["in-batch", "symmetric", "explicit"])
def test_gradients_through_vmap(form, objective, backend):
    """What vmap wraps does not say that it needs a gradient, and gets one all the same."""
    vectors = [torch.randn(3, n, D, requires_grad=True) for n in (6, 6, 20)]
    vectors = vectors if form == "explicit" else vectors[:2]
    options = {"objective": objective, "log_partition": 3.0} if objective == "nce" else {}

    def loss_of(*given):
        return contrastive_loss(*given, symmetric=form == "symmetric", backend=backend, **options)

    def mapped(*given):
        return torch.func.vmap(loss_of)(*given).sum()

    each = sum(loss_of(*given) for given in zip(*vectors, strict=True))
    expected = torch.autograd.grad(each, vectors)
    torch.testing.assert_close(torch.autograd.grad(mapped(*vectors), vectors), expected)
    plain = [x.detach() for x in vectors]
    wanted = tuple(range(len(plain)))
    torch.testing.assert_close(torch.func.grad(mapped, wanted)(*plain), expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("option", ["negative_index", "exclude_index", "temperature"])
def test_vmap_over_an_option(option, backend):
    q, negatives = torch.randn(3, 6, D), torch.randn(20, D)
    values = {
        "negative_index": torch.randint(0, 20, (3, 6, M)),
        "exclude_index": torch.randint(-1, 20, (3, 6)),
        "temperature": torch.tensor([0.1, 0.2, 0.3]),
    }[option]

    def loss_of(q, value):
        return contrastive_loss(q, q, negatives, backend=backend, **{option: value})

    each = list(zip(q, values, strict=True))
    expected = torch.stack([loss_of(*pair) for pair in each])
    torch.testing.assert_close(torch.func.vmap(loss_of)(q, values), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss_of))(q, values)
    expected = torch.stack([torch.func.grad(loss_of)(*pair) for pair in each])
    torch.testing.assert_close(per_sample, expected)


def test_rows_out_of_range_are_refused_by_the_kernel_where_nobody_looked():
    """While compiling, and under vmap, the values of an index are not read before."""
    q, _, negatives, _ = make_inputs("shared", 4, 20)

    def loss_of(index):
        return contrastive_loss(q, q, negatives, negative_index=index)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    assert compiled(torch.randint(0, 20, (4, M))).isfinite()
    with pytest.raises(RuntimeError, match=r"`index` must be in \[0, 20\), got 20"):
        compiled(torch.full((4, M), 20))


def test_functorch_second_derivative():
    q, p, negatives, _ = make_inputs("shared", 6, 20)

    def loss_of(q):
        return contrastive_loss(q, p.detach(), negatives)

    with pytest.raises(RuntimeError, match="bank_contrast has no second derivative"):
        torch.func.jacrev(torch.func.grad(loss_of))(q.detach())


@pytest.mark.parametrize("form", ["in-batch", "shared"])
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=lambda f: f.__name__)
def test_a_partition_is_not_fixed_inside_a_transform(transform, form):
    loss_fn = codir_fast.ContrastiveLoss(T, objective="nce")
    _, _, negatives, _ = make_inputs(form, 4, 20)
    queries = torch.randn(3, 4, D)
    given = queries if transform is torch.func.vmap else queries[0]

    def loss_of(query):
        return loss_fn(query, query, negatives)

    with pytest.raises(RuntimeError, match="`log_partition` must be given, or fixed by a batch"):
        transform(loss_of)(given)
    assert loss_fn.log_partition.isnan()
    loss_of(queries[0])  # outside
    assert transform(loss_of)(given).isfinite().all()


def test_a_tensor_given_for_the_learnt_temperature_is_clamped_in_place():
    """As the docstring says."""
    loss_fn = codir_fast.ContrastiveLoss(learnable_temperature=True)
    given = torch.tensor(9.0)
    queries = torch.randn(4, D)
    torch.func.functional_call(
        loss_fn, {"log_inv_temperature": given}, (queries, torch.randn(4, D))
    )
    torch.testing.assert_close(given.exp(), torch.tensor(100.0))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_is_refused(form, objective):
    q, p, negatives, options = make_inputs(form, 4, 20)

    def loss_of(q):
        return contrastive_loss(q, p, negatives, objective=objective, **options)

    q = q.detach()
    with pytest.raises(RuntimeError, match="_contrast has no forward-mode derivative"):
        torch.func.jvp(loss_of, (q,), (q,))
    with pytest.raises(RuntimeError, match="_contrast has no forward-mode derivative"):
        torch.func.hessian(loss_of)(q)
    forward_ad = torch.autograd.forward_ad
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="_contrast has no forward-mode derivative"),
    ):
        loss_of(forward_ad.make_dual(q, q))


@pytest.mark.parametrize("with_bank_gradient", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_traced_step_fits_other_sizes(reduction, with_bank_gradient):
    """Traced with symbols for sizes, outside torch.compile: none of them is baked in."""

    def step(q, p, k):
        inputs = (q, p, k) if with_bank_gradient else (q, p)
        leaves = [x.detach().requires_grad_() for x in inputs]
        vectors = leaves if with_bank_gradient else [*leaves, k]
        loss = contrastive_loss(*vectors, temperature=T, reduction=reduction)
        return loss, *torch.autograd.grad(loss, leaves)

    def inputs(B, K):
        return torch.randn(B, 8), torch.randn(B, 8), torch.randn(K, 8)

    traced = make_fx(step, tracing_mode="symbolic")(*inputs(5, 11))
    given = inputs(9, 14)
    torch.testing.assert_close(traced(*given), step(*given))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("form", ["in-batch", "shared", "own", "index"])
def test_fake_tensors(form, objective, device):
    """Shapes alone, as whoever plans memory asks for them; on a GPU that need not be there."""
    with FakeTensorMode(), torch.device(device):
        # A build of PyTorch without CUDA has gradients on CPUs only.
        needs_grad = device == "cpu"
        q, p = (torch.empty(4, D, requires_grad=needs_grad) for _ in range(2))
        negatives, options = None, {"objective": objective}
        if form in ("shared", "index"):
            negatives = torch.empty(20, D, requires_grad=needs_grad and form == "shared")
        elif form == "own":
            negatives = torch.empty(4, M, D, requires_grad=needs_grad)
        if form == "index":
            options["negative_index"] = torch.empty(4, M, dtype=torch.int64)
        if objective == "nce":
            options |= {"log_partition": torch.empty(()), "num_data": 100}
        loss = contrastive_loss(q, p, negatives, reduction="none", **options)
        assert loss.shape == (4,) and loss.device.type == device
        if needs_grad:
            assert [g.shape for g in gradients(loss, q, p, negatives)] == [
                x.shape for x in (q, p, negatives) if x is not None and x.requires_grad
            ]
