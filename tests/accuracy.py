"""What the tests of the whole loss share: one call of contrastive_loss as data, its answer by dense
formulas of its own (in float64 the truth), and how far ours may be from it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast import IndexedBank, MemoryQueue
from codir_fast.functional import contrastive_loss

NCE_EPS = 1e-7
LEAVES = ("query", "positive", "negatives", "temperature", "weight")


@dataclass
class Call:
    """Arguments of contrastive_loss, and the gradient that comes into its result."""

    query: Tensor
    positive: Tensor
    negatives: Tensor | MemoryQueue | IndexedBank | None
    temperature: float | Tensor
    upstream: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # its other keyword arguments

    @property
    def compute(self) -> torch.dtype:
        """What arithmetic runs in."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def tensors(self) -> dict[str, Any]:
        weight = self.options.get("weight")
        return dict(
            zip(
                LEAVES,
                (self.query, self.positive, self.negatives, self.temperature, weight),
                strict=True,
            )
        )

    def needs(self) -> list[str]:
        """The arguments that get a gradient."""
        given = self.tensors().items()
        return [name for name, x in given if isinstance(x, Tensor) and x.requires_grad]


@dataclass
class Answer:
    """The loss and the gradient of each argument that needs one, and of what size the terms are
    that were added up to each, and how many; `logit` is the largest |s| that roundings are relative
    to.
    """

    results: list[Tensor]
    scales: list[float]
    logit: float
    terms: int


def ours(call: Call, backend: str) -> list[Tensor]:
    loss = contrastive_loss(
        call.query,
        call.positive,
        call.negatives,
        temperature=call.temperature,
        backend=backend,
        **call.options,
    )
    return [loss.detach(), *_gradients(call, loss, call.tensors())]


def plain(call: Call) -> list[Tensor]:
    """Plain PyTorch on the same inputs: float32 arithmetic for half-precision ones."""
    return _Dense(call, lambda x: x.detach().clone(), call.compute, exact=False).results()


def truth(call: Call) -> Answer:
    """The answer in float64, from the inputs as they are rounded."""
    dense = _Dense(call, lambda x: x.detach().double(), torch.float64, exact=True)
    results = dense.results()
    terms = max(dense.directions[0].negative.shape)
    return Answer(results, *dense.scales(), terms)


def _gradients(call: Call, loss: Tensor, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    needs = [tensors[name] for name in call.needs()]
    return torch.autograd.grad(loss, needs, call.upstream.to(loss.dtype)) if needs else ()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-12)


@dataclass
class _Direction:
    """One term of a symmetric loss: logits (B,) and (B, N), -inf where a row is no negative."""

    query: Tensor
    key: Tensor
    rows: Tensor
    positive: Tensor
    negative: Tensor


class _Dense:
    """The loss by its definition, every logit made, gradients from autograd."""

    def __init__(
        self, call: Call, copy: Callable[[Tensor], Tensor], compute: torch.dtype, exact: bool
    ) -> None:
        self.call, self.options, self.exact = call, call.options, exact
        self.leaves: dict[str, Any] = call.tensors()
        for name in call.needs():
            self.leaves[name] = copy(self.leaves[name]).requires_grad_()
        wide = {
            name: value.to(compute) if isinstance(value, Tensor) else value
            for name, value in self.leaves.items()
        }
        self.t, self.weight, self.raw = wide["temperature"], wide["weight"], wide
        change = _unit if self.options.get("normalize", True) else (lambda x: x)
        q, p = change(wide["query"]), change(wide["positive"])
        rows = self._rows(wide["negatives"], change, compute)
        pairs = [(q, p), (p, q)] if self.options.get("symmetric") else [(q, p)]
        self.directions = [self._direction(a, b, b if rows is None else rows) for a, b in pairs]
        self.per_query = self._losses()

    def _rows(self, negatives: Any, change: Callable, compute: torch.dtype) -> Tensor | None:
        if not isinstance(negatives, (MemoryQueue, IndexedBank)):
            return None if negatives is None else change(negatives)
        return torch.where(negatives.valid[:, None], negatives.rows.to(compute), 0)

    def _direction(self, query: Tensor, key: Tensor, rows: Tensor) -> _Direction:
        index = self.options.get("negative_index")
        if index is not None:
            rows = rows[index]
        if rows.ndim == 2:
            negative = query @ rows.T / self.t
        else:
            negative = torch.einsum("bd,bnd->bn", query, rows) / self.t
        negative = negative.masked_fill(~self._allowed(negative.shape), -torch.inf)
        return _Direction(query, key, rows, (query * key).sum(1) / self.t, negative)

    def _allowed(self, shape: torch.Size) -> Tensor:
        negatives, options = self.call.negatives, self.options
        labels, of_rows = options.get("labels"), options.get("negative_labels")
        number = torch.arange(shape[1]).expand(shape)  # of the row behind each logit
        excluded, allowed = options.get("exclude_index"), torch.ones(shape, dtype=torch.bool)
        if negatives is None:
            excluded, of_rows = torch.arange(shape[0]), labels
        elif not isinstance(negatives, Tensor):
            of_rows = negatives.row_labels
        if options.get("negative_index") is not None:
            number = options["negative_index"].long()
        if not isinstance(negatives, (Tensor, type(None))):
            allowed &= negatives.valid[number]
        if labels is not None:
            own = of_rows.ndim == 2
            allowed &= labels.long()[:, None] != (of_rows if own else of_rows[number]).long()
        if excluded is not None:
            allowed &= excluded.long()[:, None] != number
        return allowed

    def _losses(self) -> Tensor:
        objective = self._nce if self.options.get("objective") == "nce" else self._infonce
        losses = [objective(direction) for direction in self.directions]
        return sum(losses) / len(losses)

    def _infonce(self, direction: _Direction) -> Tensor:
        if not self.exact:
            logits = torch.cat([direction.positive[:, None], direction.negative], dim=1)
            return torch.logsumexp(logits, dim=1) - direction.positive
        # The same, as log(1 + sum_j e^{s_ij - s_i+}): a small loss keeps its digits.
        some = (direction.negative != -torch.inf).any(1)
        negative = direction.negative.masked_fill(~some[:, None], 0)
        gap = (torch.logsumexp(negative, dim=1) - direction.positive).masked_fill(~some, 0)
        return F.softplus(gap, threshold=40).masked_fill(~some, 0)

    def _nce(self, direction: _Direction) -> Tensor:
        c = self.noise_ratio()
        offset = self.log_partition() + math.log(c + NCE_EPS)
        term = F.softplus(direction.negative - offset, threshold=40) + math.log1p(NCE_EPS / c)
        term = term.masked_fill(direction.negative == -torch.inf, 0)
        return F.softplus(offset - direction.positive, threshold=40) + term.sum(1)

    def noise_ratio(self) -> float:
        """c = M / n, M negatives offered to each query and n rows that there are; 1 for none."""
        offered = self.directions[0].negative.shape[1] - (self.call.negatives is None)
        return offered / self._num_data() if offered > 0 and self._num_data() > 0 else 1.0

    def _num_data(self) -> int:
        rows = self.call.negatives
        if self.options.get("num_data") is not None:
            return self.options["num_data"]
        if rows is None:
            return len(self.call.query)
        return rows.shape[-2] if isinstance(rows, Tensor) else rows.rows.shape[0]

    def log_partition(self) -> float | Tensor:
        """log Z: as given, or of the mean of e^s over the pairs of this batch, times n."""
        given = self.options.get("log_partition")
        if given is not None:
            return float(given)
        every = [way.positive for way in self.directions]
        every += [way.negative[way.negative != -torch.inf] for way in self.directions]
        logits = torch.cat(every).detach()
        if len(logits) == 0:
            return 0.0
        mean = torch.logsumexp(logits, 0) - math.log(len(logits))
        return mean + math.log(max(self._num_data(), 1))

    def results(self) -> list[Tensor]:
        loss = self.per_query if self.weight is None else self.per_query * self.weight
        if (reduction := self.options.get("reduction", "mean")) != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        gradients = _gradients(self.call, loss, self.leaves) if loss.requires_grad else ()
        return [loss.detach(), *gradients]

    @torch.no_grad()
    def scales(self) -> tuple[list[float], float]:
        """Of each result the largest sum of |terms|, and the largest |q| |b| / t."""
        weight = 1 if self.weight is None else self.weight.abs()
        upstream = self.call.upstream.abs().double()
        if self.options.get("reduction", "mean") == "mean":
            upstream = upstream / max(len(self.per_query), 1)
        flow = (upstream * weight).expand(len(self.per_query)) / len(self.directions)
        total = {name: 0.0 for name in ("loss", *LEAVES)}
        by_name: dict[str, Any] = {name: 0.0 for name in LEAVES}
        logit = 0.0
        for swapped, way in enumerate(self.directions):
            terms = _Terms(way, self, flow)
            logit = max(logit, terms.logit)
            total["loss"] += terms.loss
            names = ("positive", "query") if swapped else ("query", "positive")
            for name, size in zip(names, (terms.dquery, terms.dkey), strict=True):
                by_name[name] = by_name[name] + size
            if self.call.negatives is None:  # the keys are the rows
                by_name[names[1]] = by_name[names[1]] + terms.drows
            elif "negatives" in self.call.needs():
                by_name["negatives"] = by_name["negatives"] + terms.drows
            by_name["temperature"] = by_name["temperature"] + terms.dtemperature
        by_name["weight"] = torch.as_tensor(total["loss"] * _largest(upstream))
        if self.options.get("normalize", True):
            for name in ("query", "positive", "negatives"):
                if isinstance(x := self.raw[name], Tensor) and isinstance(by_name[name], Tensor):
                    by_name[name] = by_name[name] / x.norm(dim=-1).clamp_min(1e-12)
        losses = total["loss"] * (1 if self.weight is None else _largest(self.weight))
        if self.options.get("reduction", "mean") == "sum":
            losses *= len(self.per_query)
        return [losses, *(_largest(by_name[name]) for name in self.call.needs())], logit


class _Terms:
    """Sizes of what is added up, with w_ij = |dl_i / ds_ij| and f_i what flows into query i.

    A rounding of a logit, which is relative to |q| |b| / t, is one of its weight: each gradient is
    a sum of weights times rows, and as wrong as that sum is without its signs.
    """

    def __init__(self, way: _Direction, dense: _Dense, flow: Tensor) -> None:
        leaves = (way.positive.detach().requires_grad_(), way.negative.detach().requires_grad_())
        with torch.enable_grad():
            objective = dense._nce if dense.options.get("objective") == "nce" else dense._infonce
            losses = objective(_Direction(way.query, way.key, way.rows, *leaves))
            wp, wn = (x.abs() for x in torch.autograd.grad(losses.sum(), leaves))
        t = abs(float(dense.t))
        q, k, rows = (x.norm(dim=-1) for x in (way.query, way.key, way.rows))
        reach = q * torch.maximum(k, rows.amax(-1) if rows.shape[-1] else k) / t  # |s_ij| <= reach
        pull = wp * k + (wn * rows).sum(1)
        self.logit = _largest(reach)
        if dense.options.get("objective") == "nce":
            self.logit += abs(float(dense.log_partition()))
        self.loss = _largest((wp + wn.sum(1)).clamp_min(losses.detach()))
        self.dquery = flow * pull / t
        self.dkey = flow * wp * q / t
        self.dtemperature = (flow * q * pull).sum() / t**2
        each = flow[:, None] * wn * q[:, None] / t
        index, given = dense.options.get("negative_index"), dense.call.negatives
        if index is None:
            self.drows = each.sum(0) if way.rows.ndim == 2 else each
        elif isinstance(given, Tensor):
            sums = each.new_zeros(given.shape[0])
            self.drows = sums.index_add_(0, index.long().flatten(), each.flatten())


def _largest(x: Tensor | float) -> float:
    x = torch.as_tensor(x)
    return float(x.abs().max()) if x.numel() else 0.0


def check(call: Call, backends: Iterator[str], name: str) -> None:
    """Ours against the truth on each backend, by the rule of `assert_accurate`."""
    exact, eager = truth(call), plain(call)
    for backend in backends:
        assert_accurate(call, ours(call, backend), eager, exact, f"{name} {backend}")


def assert_accurate(
    call: Call, got: list[Tensor], eager: list[Tensor], exact: Answer, name: str
) -> None:
    """|ours - float64| <= 2 * |plain PyTorch - float64| + tiny, largest errors of each tensor.

    tiny allows what plain PyTorch may be spared by luck: the two roundings (of the logit, relative
    to its size, and of the weight) that no sum of weighted rows in this dtype can do without, a few
    times over, and one of a result that is kept in a narrower dtype. Where the truth is of no wider
    dtype than ours, it may itself lose one rounding per term. Weights under 1e-30 have no digits.
    """
    eps = torch.finfo(call.compute).eps
    names = ["loss", *call.needs()]
    for what, ours_n, eager_n, exact_n, scale in zip(
        names, got, eager, exact.results, exact.scales, strict=True
    ):
        where = f"{name}: {what}"
        assert ours_n.shape == exact_n.shape and ours_n.dtype == eager_n.dtype, where
        relative = 4 * eps * (1 + exact.logit)
        if call.compute == torch.float64:
            relative += eps * exact.terms
        if what != "loss":  # a weight lies in [0, 1] whatever its logit
            relative = min(relative, 2.0)
        kept = torch.finfo(ours_n.dtype)
        tiny = relative * scale + max(1e-30, kept.smallest_normal * kept.eps)
        if kept.eps > eps:
            tiny += kept.eps * min(_largest(exact_n), kept.max)
        finite = _comparable(ours_n, exact_n, tiny, where)
        error = _largest((ours_n.double() - exact_n)[finite])
        plain_error = _largest((eager_n.double() - exact_n)[finite].nan_to_num(0, 0, 0))
        assert error <= 2 * plain_error + tiny, f"{where}: {error} > 2 * {plain_error} + {tiny}"


def _comparable(got: Tensor, exact: Tensor, tiny: float, where: str) -> Tensor:
    """Where numbers can be compared: not NaN, and not where the dtype's largest is reached."""
    assert torch.equal(got.isnan(), exact.isnan()), f"{where}: NaN in {got} or {exact}"
    over = exact.abs() + tiny > 0.99 * torch.finfo(got.dtype).max
    assert not (got.isinf() & ~over).any(), f"{where}: infinite where {exact} is not"
    return ~(over | exact.isnan())
