"""What the kernels are measured against, each in its best documented form.

A peer turns the inputs of an operator into a function without arguments that returns what is
compared with the float64 truth: loss and gradient to the query for the losses, the pooled states or
their gradient for the pooling.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.shapes import REAL_TOKENS, Shape
from torch import Tensor

from codir_fast import ContrastiveLoss, MemoryQueue, pool_hidden_states
from codir_fast.functional import contrastive_loss

T = 0.07
Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass
class Inputs:
    """Unit rows; the bank as a tensor and, for peers that want one matrix of classes, in the rows
    after B spare ones. index (B, M) is indexed_contrast's; hidden_states, mask and grad are the
    pooling's.
    """

    shape: Shape
    query: Tensor
    positive: Tensor
    bank: Tensor
    classes: Tensor
    index: Tensor
    hidden_states: list[Tensor]
    mask: Tensor
    grad: Tensor
    truths: dict[tuple[bool, bool], Results] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """`prepare` makes the function that is timed; tensors it makes are on the inputs' device.
    `packages`: what it imports.

    `copies`: of the B x K logits that it holds at once (and `copies_per_query` more for each
    query), for the refusal of what does not fit.
    """

    name: str
    operator: str
    prepare: Callable[[Inputs], Run]
    what: str
    packages: tuple[str, ...] = ()
    copies: float = 0
    copies_per_query: float = 0
    others_count: bool = False  # the other queries' positives are negatives too
    normalizes: bool = False  # its gradient is along the sphere
    is_floor: bool = False  # not the whole loss: nothing to compare
    gpu_only: bool = False

    def refusal(self, shape: Shape, memory: int) -> str | None:
        """Why it can't run on this shape with so many bytes of memory."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}"
        need = self.needs(shape)
        if need > memory / 2:
            return f"needs {need / 2**30:.0f} GiB"
        return None

    def needs(self, shape: Shape) -> int:
        s = shape.sizes
        if self.operator == "bank_contrast":
            copies = self.copies + self.copies_per_query * s["B"]
            return int(copies * 4 * s["B"] * s["K"])
        return int(self.copies * 4 * s["B"] * s.get("M", 0) * s.get("D", 0))


def make_inputs(
    shape: Shape,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    torch.manual_seed(0)
    with torch.device(device):
        return _make_inputs(shape, dtype)


def _make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    s = shape.sizes
    empty = torch.empty(0)
    query = positive = bank = classes = grad = empty
    index, states, mask = torch.empty(0, dtype=torch.int64), [], empty
    if "D" in s:
        query, positive = (
            F.normalize(torch.randn(s["B"], s["D"]), dim=1).to(dtype) for _ in range(2)
        )
        query.requires_grad_()
        classes = torch.empty(s["B"] + s["K"], s["D"], dtype=dtype)
        for part in classes.split(1 << 16):
            part.copy_(F.normalize(torch.randn(part.shape), dim=1))
        bank = classes[s["B"] :]
    if shape.operator == "indexed_contrast":
        index = torch.randint(s["K"], (s["B"], s["M"]))
    if "T" in s:
        needs = shape.operator == "masked_pool_backward"
        states = [torch.randn(s["B"], s["T"], s["H"]).to(dtype) for _ in range(s["L"])]
        states = [state.requires_grad_(needs) for state in states]
        lengths = torch.linspace(1, 2 * REAL_TOKENS * s["T"] - 1, s["B"]).round().clamp(1, s["T"])
        mask = (torch.arange(s["T"]) < lengths[:, None]).long()
        grad = torch.randn(s["B"], s["L"] * s["H"]).to(dtype)
    return Inputs(shape, query, positive, bank, classes, index, states, mask, grad)


def truth(inputs: Inputs, others_count: bool, normalizes: bool) -> Results:
    """What a peer should give, in float64; made once for all peers that should give the same."""
    if (others_count, normalizes) not in inputs.truths:
        inputs.truths[others_count, normalizes] = _truth(inputs, others_count, normalizes)
    return inputs.truths[others_count, normalizes]


def _truth(inputs: Inputs, others_count: bool, normalizes: bool) -> Results:
    """Loss and gradient by their definition, by parts of the bank."""
    if inputs.hidden_states:
        states = [state.detach().double().requires_grad_() for state in inputs.hidden_states]
        pooled = _eager_pool(states, inputs.mask.double())
        if inputs.shape.operator == "masked_pool":
            return (pooled.detach(),)
        return torch.autograd.grad(pooled, states, inputs.grad.double())
    q, p = inputs.query.detach().double(), inputs.positive.double()
    s_pos = (q * p).sum(1) / T
    total, rows = torch.zeros_like(s_pos), torch.zeros_like(q)
    rows_at_once = 1 << 14 if q.is_cpu else max(1 << 10, (1 << 28) // len(q))
    positives_only = inputs.classes[: len(q)].copy_(inputs.positive)
    parts = [positives_only] if others_count else []
    if inputs.index.numel():
        for i, index in enumerate(inputs.index):
            own = inputs.bank[index].double()
            weights = ((own @ q[i]) / T - 1 / T).exp()
            total[i], rows[i] = weights.sum(), weights @ own
    else:
        parts += list(inputs.bank.split(rows_at_once))
    for number, part in enumerate(parts):
        weights = (q @ part.double().T / T - 1 / T).exp()
        if others_count and number == 0:
            weights.fill_diagonal_(0)
        total += weights.sum(1)
        rows += weights @ part.double()
    positive = (s_pos - 1 / T).exp()
    loss = (total + positive).log() + 1 / T - s_pos
    share = positive / (total + positive)
    direction = rows / (total + positive)[:, None] + (share - 1)[:, None] * p
    if normalizes:
        direction -= (direction * q).sum(1, keepdim=True) * q
    return loss.mean(), direction / T / len(q)


def _with_gradient(inputs: Inputs, loss: Callable[[], Tensor]) -> Run:
    def run() -> Results:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, inputs.query)

    return run


def _ours(normalize: bool, backend: str = "auto") -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        loss_fn = ContrastiveLoss(T, normalize=normalize, backend=backend)
        return _with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))

    return prepare


def _ours_queue(inputs: Inputs, dtype: torch.dtype | None = None, backend: str = "auto") -> Run:
    queue = MemoryQueue(*inputs.bank.shape, dtype=dtype or inputs.bank.dtype)
    queue = queue.to(inputs.bank.device)
    for keys in inputs.bank.split(1 << 18):
        queue.enqueue(keys)
    loss_fn = ContrastiveLoss(T, backend=backend)
    return _with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, queue))


def _ours_indexed(inputs: Inputs) -> Run:
    def loss() -> Tensor:
        vectors = (inputs.query, inputs.positive, inputs.bank)
        options: dict[str, Any] = {"temperature": T, "normalize": False}
        return contrastive_loss(*vectors, negative_index=inputs.index, **options)

    return _with_gradient(inputs, loss)


def _ours_graph(inputs: Inputs, backend: str = "auto") -> Run:
    """A step against a queue, captured once, replayed: what is left without PyTorch's overhead."""
    step = _ours_queue(inputs, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def run() -> Results:
        graph.replay()
        return results

    return run


def _eager_loss(query: Tensor, positive: Tensor, bank: Tensor) -> Tensor:
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ bank.T], dim=1) / T
    return F.cross_entropy(logits, logits.new_zeros(len(query), dtype=torch.int64))


def _eager(inputs: Inputs) -> Run:
    return _with_gradient(inputs, lambda: _eager_loss(inputs.query, inputs.positive, inputs.bank))


def _compiled(inputs: Inputs) -> Run:
    torch.compiler.reset()
    loss = torch.compile(_eager_loss, dynamic=False, fullgraph=True)
    return _with_gradient(inputs, lambda: loss(inputs.query, inputs.positive, inputs.bank))


def _lightly(inputs: Inputs) -> Run:
    """NTXentLoss with memory_bank_size: the bank is (D, K), einsum makes the logits."""
    bank, ones = inputs.bank.T.contiguous(), torch.zeros(len(inputs.query), dtype=torch.int64)

    def loss() -> Tensor:
        positive = torch.einsum("nc,nc->n", inputs.query, inputs.positive)[:, None]
        negative = torch.einsum("nc,ck->nk", inputs.query, bank)
        return F.cross_entropy(torch.cat([positive, negative], dim=1) / T, ones)

    return _with_gradient(inputs, loss)


def _linear_cross_entropy(inputs: Inputs) -> Run:
    options = torch.nn.LinearCrossEntropyOptions()
    targets = torch.arange(len(inputs.query))

    def loss() -> Tensor:
        inputs.classes[: len(targets)] = inputs.positive
        return F.linear_cross_entropy(inputs.query / T, inputs.classes, targets, options=options)

    return _with_gradient(inputs, loss)


def _cut_cross_entropy(inputs: Inputs) -> Run:
    """Its kernels on a GPU, without their filter of small gradients; torch.compile on a CPU."""
    import cut_cross_entropy

    torch.compiler.reset()
    targets = torch.arange(len(inputs.query))
    on_gpu = {"impl": "cce", "filter_eps": None}
    options = on_gpu if inputs.query.is_cuda else {"impl": "torch_compile"}

    def loss() -> Tensor:
        inputs.classes[: len(targets)] = inputs.positive
        vectors = (inputs.query / T, inputs.classes)
        return cut_cross_entropy.linear_cross_entropy(*vectors, targets, **options)

    return _with_gradient(inputs, loss)


def _liger(inputs: Inputs) -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_fn, targets = LigerFusedLinearCrossEntropyLoss(), torch.arange(len(inputs.query))

    def loss() -> Tensor:
        inputs.classes[: len(targets)] = inputs.positive
        return loss_fn(inputs.classes, inputs.query / T, targets)

    return _with_gradient(inputs, loss)


def _info_nce(inputs: Inputs) -> Run:
    from info_nce import InfoNCE

    loss_fn = InfoNCE(temperature=T, negative_mode="unpaired")
    return _with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))


def _metric_learning(inputs: Inputs) -> Run:
    from pytorch_metric_learning.losses import NTXentLoss

    loss_fn, B = NTXentLoss(temperature=T), len(inputs.query)
    labels = torch.arange(B)
    of_classes = torch.cat([labels, torch.full((len(inputs.bank),), B)])

    def loss() -> Tensor:
        inputs.classes[:B] = inputs.positive
        return loss_fn(inputs.query, labels, ref_emb=inputs.classes, ref_labels=of_classes)

    return _with_gradient(inputs, loss)


class _Chunked(torch.autograd.Function):
    """One pass over chunks of a frozen bank of unit rows; e^{s - 1/t} can't overflow."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, bank: Tensor, size: int) -> Tensor:
        s_pos = (query * positive).sum(1) / T
        total = (s_pos - 1 / T).exp()
        rows = total[:, None] * positive
        scaled = query / T
        total, rows = total.float(), rows.float()
        space = query.new_empty(len(query), size)
        for chunk in bank.split(size):
            weights = torch.mm(scaled, chunk.T, out=space[:, : len(chunk)].view(len(query), -1))
            weights.sub_(1 / T).exp_()
            total += weights.sum(1, dtype=torch.float32)
            if weights.dtype == torch.float32:
                rows.addmm_(weights, chunk)
            else:  # sums of many rows need float32
                rows += weights @ chunk
        ctx.dtype = query.dtype
        ctx.save_for_backward((rows / total[:, None] - positive) / T)
        return total.log() + 1 / T - s_pos

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grad[:, None] * direction).to(ctx.dtype), None, None, None


CHUNK_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 65536)
_SEARCH_ROWS = 1 << 17  # of the bank; more would change the time of the search, not its result


def _chunked(inputs: Inputs) -> Run:
    """With the chunk size that is fastest here."""
    from codir_fast.benchmarks.measure import fastest

    def prepare(size: int, bank: Tensor) -> Run:
        vectors = (inputs.query, inputs.positive, bank)
        return _with_gradient(inputs, lambda: _Chunked.apply(*vectors, size).mean())

    sizes = [size for size in CHUNK_SIZES if size <= max(len(inputs.bank), CHUNK_SIZES[0])]
    part = inputs.bank[:_SEARCH_ROWS]
    best = fastest([prepare(size, part) for size in sizes], part.device)
    return prepare(sizes[best], inputs.bank)


def _two_products(inputs: Inputs) -> Run:
    query = inputs.query.detach()
    return lambda: ((query @ inputs.bank.T) @ inputs.bank,)


def _gathered(inputs: Inputs) -> Run:
    """RepDistiller's ContrastMemory: index_select, then bmm."""
    B, M = inputs.index.shape
    targets = torch.zeros(B, dtype=torch.int64)

    def loss() -> Tensor:
        rows = inputs.bank.index_select(0, inputs.index.flatten()).view(B, M, -1)
        negative = torch.bmm(rows, inputs.query[:, :, None])[:, :, 0]
        positive = (inputs.query * inputs.positive).sum(1, keepdim=True)
        return F.cross_entropy(torch.cat([positive, negative], dim=1) / T, targets)

    return _with_gradient(inputs, loss)


def _dense(inputs: Inputs) -> Run:
    loss_fn = ContrastiveLoss(T, normalize=False)
    return _with_gradient(inputs, lambda: loss_fn(inputs.query, inputs.positive, inputs.bank))


def _eager_pool(states: list[Tensor], mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True)
    return torch.cat([(state * mask[..., None]).sum(1) / count for state in states], dim=1)


def _expanded_pool(states: list[Tensor], mask: Tensor) -> Tensor:
    """As sentence-transformers' mean pooling, layer by layer."""
    pooled = []
    for state in states:
        weights = mask.unsqueeze(-1).expand(state.size()).to(state.dtype)
        pooled.append(torch.sum(state * weights, 1) / torch.clamp(weights.sum(1), min=1e-9))
    return torch.cat(pooled, dim=1)


def _bmm_pool(states: list[Tensor], mask: Tensor) -> Tensor:
    weights = (mask / mask.sum(1, keepdim=True))[:, None]
    return torch.cat([torch.bmm(weights, state)[:, 0] for state in states], dim=1)


def _cuda_pool(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask, backend="cuda")


def _pool(pool: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        takes_integers = pool in (pool_hidden_states, _cuda_pool, _expanded_pool)
        mask = inputs.mask if takes_integers else inputs.mask.to(inputs.grad.dtype)
        if inputs.shape.operator == "masked_pool":
            return lambda: (pool(inputs.hidden_states, mask),)
        pooled = pool(inputs.hidden_states, mask)
        return lambda: torch.autograd.grad(
            pooled, inputs.hidden_states, inputs.grad, retain_graph=True
        )

    return prepare


_BANK, _INDEXED = "bank_contrast", "indexed_contrast"
PEERS = (
    Peer("codir_fast", _BANK, _ours(False), "ContrastiveLoss(normalize=False), (K, D) tensor"),
    Peer(
        "codir_fast-normalize",
        _BANK,
        _ours(True),
        "ContrastiveLoss(), (K, D) tensor",
        normalizes=True,
    ),
    Peer("codir_fast-queue", _BANK, _ours_queue, "ContrastiveLoss(), MemoryQueue", normalizes=True),
    Peer(
        "codir_fast-graph",
        _BANK,
        _ours_graph,
        "ContrastiveLoss(), MemoryQueue, replayed as a CUDA graph",
        normalizes=True,
        gpu_only=True,
    ),
    Peer(
        "codir_fast-cuda",
        _BANK,
        _ours(False, "cuda"),
        'ContrastiveLoss(normalize=False, backend="cuda"), (K, D) tensor',
        gpu_only=True,
    ),
    Peer(
        "codir_fast-cuda-graph",
        _BANK,
        lambda inputs: _ours_graph(inputs, "cuda"),
        'ContrastiveLoss(backend="cuda"), MemoryQueue, replayed as a CUDA graph',
        normalizes=True,
        gpu_only=True,
    ),
    Peer(
        "codir_fast-float8",
        _BANK,
        lambda inputs: _ours_queue(inputs, torch.float8_e4m3fn),
        "ContrastiveLoss(), MemoryQueue of float8 rows",
        normalizes=True,
        gpu_only=True,
    ),
    Peer("two-products", _BANK, _two_products, "q @ b.T @ b, no loss", copies=1, is_floor=True),
    Peer("chunked", _BANK, _chunked, "PyTorch loop over the bank, one pass, best chunk size"),
    Peer("eager", _BANK, _eager, "matmul, cat, cross_entropy", copies=4),
    Peer("compile", _BANK, _compiled, "torch.compile of eager", copies=3),
    Peer(
        "linear_cross_entropy",
        _BANK,
        _linear_cross_entropy,
        "torch.nn.functional.linear_cross_entropy, its automatic chunking",
        copies=2,
        others_count=True,
    ),
    Peer(
        "cut_cross_entropy",
        _BANK,
        _cut_cross_entropy,
        "Apple's Cut Cross-Entropy: its kernels unfiltered, on CPUs torch_compile",
        ("cut_cross_entropy",),
        copies=3,
        others_count=True,
    ),
    Peer(
        "liger",
        _BANK,
        _liger,
        "LigerFusedLinearCrossEntropyLoss",
        ("liger_kernel",),
        others_count=True,
        gpu_only=True,
    ),
    Peer(
        "info-nce-pytorch",
        _BANK,
        _info_nce,
        "InfoNCE, unpaired",
        ("info_nce",),
        copies=4,
        normalizes=True,
    ),
    Peer(
        "pytorch-metric-learning",
        _BANK,
        _metric_learning,
        "NTXentLoss, the bank as ref_emb",
        ("pytorch_metric_learning", "sklearn", "scipy"),
        copies_per_query=3,
        normalizes=True,
        others_count=True,
    ),
    Peer("lightly", _BANK, _lightly, "the formula of NTXentLoss, its bank is (D, K)", copies=4),
    Peer("codir_fast", _INDEXED, _ours_indexed, "contrastive_loss(negative_index=...)"),
    Peer("gathered", _INDEXED, _gathered, "index_select, bmm, as RepDistiller", copies=3),
    Peer("dense", _INDEXED, _dense, "codir_fast, all K rows instead of M", is_floor=True),
    *(
        Peer(name, operator, _pool(pool), what, gpu_only=name == "codir_fast-cuda")
        for operator in ("masked_pool", "masked_pool_backward")
        for name, pool, what in (
            ("codir_fast", pool_hidden_states, "pool_hidden_states"),
            ("codir_fast-cuda", _cuda_pool, 'pool_hidden_states(backend="cuda")'),
            ("bmm", _bmm_pool, "bmm of the weights with each layer"),
            ("eager", _eager_pool, "mask, sum, divide, cat"),
            ("sentence-transformers", _expanded_pool, "its formula of mean pooling"),
        )
    ),
)


def error_of(got: Results, exact: Results) -> float:
    """The largest difference from the truth, relative to the truth's largest element."""
    worst = 0.0
    for ours, right in zip(got, exact, strict=True):
        scale = float(right.abs().max()) or 1.0
        error = float((ours.double() - right).abs().max()) / scale
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst
