"""What bank_contrast and indexed_contrast share: the objectives as sums over negatives, in PyTorch,
and the fake and autograd parts of every backend.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from codir_fast.ops import registration
from codir_fast.ops.unit_rows import unit_and_norm, unit_rows_backward
from codir_fast.reference import NCE_EPS

_BLOCK_ROWS = 256

# loss, lse, dquery, dpositive, dinv_temperature; all in compute_dtype of the query but lse, see
# `wide`
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic runs in for inputs of this dtype: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class PreparedPair:
    """Query and positive (B, D) as a backend computes with them: in compute_dtype, unit rows if
    `normalize`.
    """

    def __init__(self, query: Tensor, positive: Tensor, normalize: bool) -> None:
        dtype = compute_dtype(query.dtype)
        self.query, self.positive = query.to(dtype), positive.to(dtype)
        self._norms: tuple[Tensor, Tensor] | None = None
        if normalize:
            self.query, query_norm = unit_and_norm(self.query)
            self.positive, positive_norm = unit_and_norm(self.positive)
            self._norms = query_norm, positive_norm

    def bring_back(self, outputs: Outputs) -> Outputs:
        """Outputs with the gradients with respect to what was given."""
        if self._norms is None:
            return outputs
        loss, lse, dquery, dpositive, dinv_temperature = outputs
        query_norm, positive_norm = self._norms
        dquery = unit_rows_backward(dquery, self.query, query_norm)
        dpositive = unit_rows_backward(dpositive, self.positive, positive_norm)
        return loss, lse, dquery, dpositive, dinv_temperature


class Sums(Protocol):
    """The sums over a query's negatives that an objective needs, and what it makes of them."""

    def add(self, logits: Tensor, rows: Tensor) -> None:
        """Adds rows (C, D), or per query (B, C, D), by their logits (B, C), which it overwrites;
        -inf where one is no negative.
        """

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        """Loss and gradients once all rows are added."""


class InfoNceSums:
    """Maximum m (B,) of the logits s, sum of e^{s - m}, and rows (B, D), the sum of e^{s - m} b."""

    def __init__(self, query: Tensor) -> None:
        self.maximum = query.new_full(query.shape[:1], -torch.inf)
        self.total = _CompensatedSum(self.maximum)
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        maximum = torch.maximum(self.maximum, logits.amax(1))
        shift = maximum.masked_fill(maximum == -torch.inf, 0)  # no allowed row yet
        rescale = (self.maximum - shift).exp()
        weights = logits.sub_(shift[:, None]).exp_()
        self.rows = self.rows * rescale[:, None] + _weighted_rows(weights, rows)
        self.maximum = maximum
        self.total.scale(rescale)
        self.total.add(weights.sum(1))

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        total = self.total.value
        positive_logit = (query * positive).sum(1) * inv_t
        # log of (sum over negatives / e^{s+}): loss = log(1 + e^gap), and nothing of the size of s+
        # is subtracted twice.
        gap = (self.maximum - positive_logit) + total.log()
        lse = torch.logaddexp(wide(self.maximum) + wide(total).log(), wide(positive_logit))
        loss = torch.logaddexp(gap, torch.zeros_like(gap))
        negative_weight = gap.sigmoid()
        mean_negative = self.rows / total.masked_fill(total == 0, 1)[:, None]
        direction = negative_weight[:, None] * (mean_negative - positive)  # d loss / d (query / t)
        dpositive = -negative_weight[:, None] * query * inv_t
        dinv_temperature = (query * direction).sum(1)
        return loss, lse, direction * inv_t, dpositive, dinv_temperature


class NceSums:
    """With a = s - offset and offset = log Z + log(c + eps): sum of softplus(a) + log(1 + eps / c),
    and rows (B, D), the sum of sigmoid(a) b.
    """

    def __init__(self, query: Tensor, log_partition: Tensor, noise_ratio: float) -> None:
        log_noise = math.log(noise_ratio + NCE_EPS)
        self.lse = (wide(log_partition) + log_noise).to(query.device).expand(query.shape[0])
        self.offset = self.lse.to(query.dtype)
        self.extra = math.log1p(NCE_EPS / noise_ratio)
        self.total = _CompensatedSum(query.new_zeros(query.shape[:1]))
        self.rows = torch.zeros_like(query)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        count = (logits != -torch.inf).sum(1, dtype=logits.dtype)
        gap = logits.sub_(self.offset[:, None])
        self.total.add(softplus(gap).sum(1) + self.extra * count)
        self.rows += _weighted_rows(gap.sigmoid_(), rows)

    def finish(self, query: Tensor, positive: Tensor, inv_t: Tensor) -> Outputs:
        gap = self.offset - (query * positive).sum(1) * inv_t
        positive_weight = gap.sigmoid()[:, None]
        direction = self.rows - positive_weight * positive  # d loss / d (query / t)
        return (
            softplus(gap) + self.total.value,
            wide(self.lse).contiguous(),
            direction * inv_t,
            -positive_weight * query * inv_t,
            (query * direction).sum(1),
        )


def objective_sums(query: Tensor, log_partition: Tensor | None, noise_ratio: float) -> Sums:
    if log_partition is None:
        return InfoNceSums(query)
    return NceSums(query, log_partition, noise_ratio)


def objective_weights(logits: Tensor, lse: Tensor, log_partition: Tensor | None) -> Tensor:
    """d loss / d logit of each negative, (B, C), in place of its logit; `lse` is the forward's."""
    high = lse.to(logits.dtype)
    low = (lse - high).to(logits.dtype)
    gap = logits.sub_(high[:, None]).sub_(low[:, None])  # exact for a logit near lse
    return gap.exp_() if log_partition is None else gap.sigmoid_()


def wide(values: Tensor) -> Tensor:
    """In float64, as lse is kept: e^{s - lse} of a float32 logit s must not be off by e to the
    rounding of a large lse. Apple's GPUs have no float64.
    """
    return values if values.device.type == "mps" else values.to(torch.float64)


def softplus(gap: Tensor) -> Tensor:
    """log(1 + e^gap) without overflow, precise where it is tiny."""
    return F.softplus(gap, threshold=40)  # beyond, log(1 + e^gap) = gap in double


class _CompensatedSum:
    """Kahan's sum: thousands of chunks would otherwise wear off the last digits."""

    def __init__(self, like: Tensor) -> None:
        self.value, self._lost = torch.zeros_like(like), torch.zeros_like(like)

    def scale(self, factor: Tensor) -> None:
        self.value, self._lost = self.value * factor, self._lost * factor

    def add(self, increment: Tensor) -> None:
        increment = increment - self._lost
        value = self.value + increment
        self._lost = (value - self.value) - increment
        self.value = value


def _weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """sum over c of weights[b, c] * rows[c], or rows[b, c]: (B, D), by blocks of rows.

    One product for all would be added up from left to right where there are few queries.
    """
    whole = weights.shape[1] - weights.shape[1] % _BLOCK_ROWS
    rest = torch.einsum(_product(rows), weights[:, whole:], rows[..., whole:, :])
    if whole == 0:
        return rest
    blocks = weights[:, :whole].unflatten(1, (-1, _BLOCK_ROWS))
    parts = rows[..., :whole, :].unflatten(-2, (-1, _BLOCK_ROWS))
    if rows.ndim == 2:
        return torch.bmm(blocks.transpose(0, 1), parts).sum(0) + rest
    return torch.einsum("bnc,bncd->bnd", blocks, parts).sum(1) + rest


def _product(rows: Tensor) -> str:
    return "bc,cd->bd" if rows.ndim == 2 else "bc,bcd->bd"


def add_contrast_backend(op: str, backend: str) -> Callable[[tuple[Any, ...], str], Tensor]:
    """Fake and autograd implementations of one backend of `op` and of `op`_backward; gives the loss
    as a function of all arguments of `op`, and of its reduction.

    Both take (query, positive or not, bank, inv_temperature, ...): whatever follows goes from one
    to the other as it is and gets no gradient.
    """
    run = registration.overload(op, backend)
    backward = registration.overload(f"{op}_backward", backend)

    def save(ctx: Any, vectors: tuple[Tensor, ...], rest: tuple[Any, ...], output: Outputs) -> None:
        query, positive, bank, inv_temperature = vectors
        *picks, num_noise, num_data, normalize = rest
        for pick in picks:
            if pick is not None and pick.requires_grad:
                raise RuntimeError(
                    f"codir_fast: {op} has no gradient for `bank_scale` and `log_partition`"
                )
        _, lse, dquery, dpositive, dinv_temperature = output
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad
        ctx.options = (num_noise, num_data, normalize)
        ctx.dtypes = query.dtype, positive.dtype
        # First what a second derivative would depend on, to refuse it. (B, .) tensors only, unless
        # the bank needs a gradient: else it may change before backward.
        given = vectors
        if not registration.under_functorch():
            given = tuple(x for x, needed in zip(vectors, needs, strict=False) if needed)
        ctx.num_given = len(given)
        ctx.save_for_backward(
            *given,
            dquery if needs[0] else None,
            dpositive if needs[1] else None,
            dinv_temperature if needs[3] else None,
            *((query, bank, inv_temperature, lse, *picks) if needs[2] else ()),
        )
        ctx.inv_temperature_like = inv_temperature.dtype, inv_temperature.device

    def differentiate(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        """`grad_loss`: (B,), or of each query's loss alike, 0-d."""
        if grad_loss is None:
            return (None,) * 4
        saved = ctx.saved_tensors  # once: checkpointing refuses more
        dquery, dpositive, dinv_temperature, *for_bank = saved[ctx.num_given :]
        dtype, device = ctx.inv_temperature_like
        dbank = None
        if for_bank:
            of_each = grad_loss.expand(for_bank[0].shape[0]).contiguous()
            dbank = backward(of_each, *for_bank, *ctx.options)
        factor = grad_loss[:, None] if grad_loss.ndim else grad_loss
        dquery, dpositive = _chained(factor, (dquery, dpositive), ctx.dtypes)
        grads = (
            dquery,
            dpositive,
            dbank,
            None
            if dinv_temperature is None
            else (grad_loss * dinv_temperature).sum().to(dtype=dtype, device=device),
        )
        given = (*saved[: ctx.num_given], grad_loss)
        return registration.first_derivative_only(op, grads, given)

    # What torch.library registers costs 60 us a call and is passed by under functorch's transforms
    # (torch.func.grad and its kin); an autograd.Function is not. torch.compile wants the operator.
    class Eager(torch.autograd.Function):
        """The reduced loss, so that autograd has one step where it would have two."""

        @staticmethod
        def forward(
            ctx: Any,
            query: Tensor,
            positive: Tensor,
            bank: Tensor,
            inv_temperature: Tensor,
            rest: tuple[Any, ...],
            reduction: str,
        ) -> Tensor:
            vectors = (query, positive, bank, inv_temperature)
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*vectors, *rest)
            save(ctx, vectors, rest, output)
            ctx.divisor = len(query) if reduction == "mean" else 1
            return reduced(output[0], reduction)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            if grad is not None and ctx.divisor != 1:
                grad = grad / ctx.divisor
            return *differentiate(ctx, grad), None, None

        jvp = registration.refuse_forward_mode(run.name())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.num_rest = len(inputs) - 4
        ctx.mark_non_differentiable(*output[1:])
        save(ctx, inputs[:4], inputs[4:], output)

    def differentiate_op(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
        return *differentiate(ctx, grad_loss), *(None,) * ctx.num_rest

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate_op(ctx, *grads)

        jvp = registration.refuse_forward_mode(run.name())

    registration.register_fake(run, _fake)
    registration.register_fake(backward, _fake_backward)
    registration.register_autograd(run, setup_context, differentiate_op)

    def loss_of(inputs: tuple[Any, ...], reduction: str) -> Tensor:
        if torch.compiler.is_compiling():
            return reduced(run(*inputs)[0], reduction)
        if registration.under_functorch():
            return reduced(Transformed.apply(*inputs)[0], reduction)
        return Eager.apply(*inputs[:4], inputs[4:], reduction)

    return loss_of


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Losses (B,) as they are ("none"), their "mean" or their "sum"."""
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _chained(
    factor: Tensor, gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype, ...]
) -> list[Tensor | None]:
    """Gradients (B, D) of each query's loss, times what comes in, in the dtypes of the inputs."""
    in_one_launch = not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or registration.under_functorch()
    )
    products: list[Tensor | None] = []
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        if gradient is None:
            products.append(None)
        elif in_one_launch and dtype != gradient.dtype:
            out = torch.empty_like(gradient, dtype=dtype)
            products.append(torch.mul(factor, gradient, out=out))
        else:
            products.append((factor * gradient).to(dtype))
    return products


def _fake(query: Tensor, *_: Any, **__: Any) -> Outputs:
    B, D = query.shape
    like = query.new_empty(0, dtype=compute_dtype(query.dtype))
    loss, dinv_temperature = like.new_empty(B), like.new_empty(B)
    lse = wide(like.new_empty(B))
    return loss, lse, like.new_empty(B, D), like.new_empty(B, D), dinv_temperature


def _fake_backward(grad_loss: Tensor, query: Tensor, bank: Tensor, *_: Any, **__: Any) -> Tensor:
    return bank.new_empty(bank.shape)
