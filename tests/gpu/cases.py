"""Inputs of the contrastive operators on a device, and their results through the public operators
and through the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast import reference
from codir_fast.ops.bank_contrast import bank_contrast
from codir_fast.ops.indexed_contrast import indexed_contrast

DIFFERENTIABLE = ("query", "positive", "bank", "inv_temperature")


@dataclass
class Case:
    """Arguments of bank_contrast; with `index`, of indexed_contrast."""

    query: Tensor
    positive: Tensor
    bank: Tensor
    inv_temperature: Tensor
    index: Tensor | None = None
    bank_scale: Tensor | None = None
    labels: Tensor | None = None
    bank_labels: Tensor | None = None
    exclude_index: Tensor | None = None
    valid: Tensor | None = None
    log_partition: Tensor | None = None
    num_noise: int = 1
    num_data: int = 1
    normalize: bool = False

    def arguments(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "index"}


def make_case(
    device,
    B,
    K,
    D,
    *,
    M=None,
    dtype=torch.bfloat16,
    bank_dtype=None,
    temperature=0.07,
    masks=(),
    nce=False,
    normalize=False,
    clusters=None,
):
    def unit(n):
        return F.normalize(torch.randn(n, D, device=device), dim=1)

    bank = unit(K)
    if clusters is not None:  # rows close to a few centres: sums of many like terms
        bank = unit(clusters)[torch.arange(K, device=device) % clusters] + 0.02 * bank
        bank = F.normalize(bank, dim=1)
    query, positive = (3 * unit(B), 0.2 * unit(B)) if normalize else (unit(B), unit(B))
    case = Case(
        query.to(dtype),
        positive.to(dtype),
        bank.to(bank_dtype or dtype),
        torch.tensor(1 / temperature, dtype=torch.float64),
        normalize=normalize,
    )
    if M is not None:
        case.index = torch.randint(0, max(K, 1), (B, M), device=device)
    if "scale" in masks:
        case.bank_scale = torch.rand(K, device=device) + 0.5
    if "labels" in masks:
        high = torch.tensor([7, 7 + (1 << 32), -7], device=device)
        case.labels = high[torch.randint(0, 3, (B,), device=device)]
        case.bank_labels = high[torch.randint(0, 3, (K,), device=device)]
    if "exclude" in masks:
        case.exclude_index = torch.randint(-1, max(K, 1), (B,), device=device)
    if "valid" in masks:
        case.valid = torch.rand(K, device=device) < 0.7
        case.bank[~case.valid] = torch.nan
    if nce:
        case.log_partition = torch.tensor(2.5, dtype=torch.float64, device=device)
        case.num_noise, case.num_data = 64, 1000
    return case


def results(case: Case, upstream: Tensor, backend: str, needs=DIFFERENTIABLE) -> list[Tensor]:
    """Loss per query, and the gradients of what `needs` names."""
    case = _leaves(case, None, needs)
    if case.index is None:
        loss = bank_contrast(**case.arguments(), backend=backend)
    else:
        loss = indexed_contrast(**case.arguments(), index=case.index, backend=backend)
    return _with_gradients(loss, case, upstream, needs)


def expected(case: Case, upstream: Tensor, dtype=torch.float64, needs=DIFFERENTIABLE):
    """The reference, in float64 or as plain PyTorch has it in `dtype`."""
    case = _leaves(case, dtype, needs)
    arguments = case.arguments()
    if arguments.pop("normalize"):
        arguments |= {name: F.normalize(arguments[name], dim=1) for name in ("query", "positive")}
    if case.index is None:
        loss = reference.bank_contrast(**arguments)
    else:
        loss = reference.indexed_contrast(**arguments, index=case.index)
    return _with_gradients(loss, case, upstream, needs)


def _leaves(case: Case, dtype, needs) -> Case:
    case = replace(case)
    for name in (*DIFFERENTIABLE, "bank_scale"):
        value = getattr(case, name)
        if value is None:
            continue
        value = value.detach().clone() if dtype is None else value.detach().to(dtype).clone()
        setattr(case, name, value.requires_grad_() if name in needs else value)
    return case


def _with_gradients(loss, case, upstream, needs) -> list[Tensor]:
    leaves = [getattr(case, name) for name in needs]
    gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    return [loss.detach(), *gradients]


EPSILON = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_right(case: Case, backend: str, needs=DIFFERENTIABLE) -> list[Tensor]:
    """|ours - float64| <= 2 |plain PyTorch in the query's dtype - float64| + a few roundings of the
    largest element, for the loss and every gradient; upstream gradients differ from query to query.
    """
    upstream = torch.randn(len(case.query), device=case.query.device)
    got = results(case, upstream, backend, needs)
    exact = expected(case, upstream, torch.float64, needs)
    plain = expected(case, upstream, case.query.dtype, needs)
    names = ("loss", *needs)
    # What the gradients of query and 1/t are small differences of.
    largest = max((float(x.abs().max()) for x in exact[1:3] if x.numel()), default=0.0)
    inv_t = float(case.inv_temperature)
    floor = dict.fromkeys(names, 0.0) | {"query": largest, "positive": largest}
    floor["inv_temperature"] = largest * len(case.query) / inv_t
    condition = 4 * max(1.0, inv_t / 14)
    for name, ours, right, eager in zip(names, got, exact, plain, strict=True):
        if not right.numel():
            continue
        error, eager_error = (float((x.double() - right).abs().max()) for x in (ours, eager))
        scale = max(float(right.abs().max()), floor[name])
        dtype = case.bank.dtype if name == "bank" else case.query.dtype
        eps = max(EPSILON[dtype], EPSILON[case.query.dtype])
        allowed = 2 * eager_error + condition * eps * scale
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}, of {scale:.3g}"
    return got


def assert_replays(run: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> None:
    """A CUDA graph of `run`, replayed after its inputs have changed, gives what `run` does then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are there
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
