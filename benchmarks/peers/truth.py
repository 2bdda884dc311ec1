"""What a peer should give, in float64, and how far it is from that."""

import math

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.peers.inputs import Inputs, Results, T

from codir_fast.reference import in_batch_contrast, masked_pool


def truth(inputs: Inputs, others_count: bool, normalizes: bool) -> Results:
    """Made once for all peers that should give the same."""
    if (others_count, normalizes) not in inputs.truths:
        inputs.truths[others_count, normalizes] = _truth(inputs, others_count, normalizes)
    return inputs.truths[others_count, normalizes]


def _truth(inputs: Inputs, others_count: bool, normalizes: bool) -> Results:
    if inputs.hidden_states:
        return _pooling_truth(inputs)
    if inputs.shape.operator == "in_batch_contrast":
        return _in_batch_truth(inputs)
    loss, direction = _contrast_truth(inputs, others_count)
    if normalizes:
        q = inputs.query.detach().double()
        direction -= (direction * q).sum(1, keepdim=True) * q
    return loss.mean(), direction / T / len(direction)


def _pooling_truth(inputs: Inputs) -> Results:
    states = [state.detach().double().requires_grad_() for state in inputs.hidden_states]
    pooled = masked_pool(states, inputs.mask, "mean")
    if inputs.shape.operator == "masked_pool":
        return (pooled.detach(),)
    return torch.autograd.grad(pooled, states, inputs.grad.double())


def _in_batch_truth(inputs: Inputs) -> Results:
    leaves = [x.detach().double().requires_grad_() for x in (inputs.query, inputs.positive)]
    loss = in_batch_contrast(*(F.normalize(x, dim=1) for x in leaves), 1 / T, symmetric=True)
    return loss.mean().detach(), *torch.autograd.grad(loss.mean(), leaves)


def _contrast_truth(inputs: Inputs, others_count: bool) -> Results:
    """Losses (B,) and t times their gradients (B, D), by their definition, by parts of the bank."""
    q, p = inputs.query.detach().double(), inputs.positive.double()
    s_pos = (q * p).sum(1) / T
    total, rows = torch.zeros_like(s_pos), torch.zeros_like(q)
    rows_at_once = 1 << 14 if q.is_cpu else max(1 << 10, (1 << 26) // len(q))
    parts = [inputs.positive] if others_count else []
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
    share = positive / (total + positive)
    direction = rows / (total + positive)[:, None] + (share - 1)[:, None] * p
    return (total + positive).log() + 1 / T - s_pos, direction


def error_of(got: Results, exact: Results) -> float:
    """The largest difference from the truth, relative to the truth's largest element."""
    worst = 0.0
    for ours, right in zip(got, exact, strict=True):
        scale = float(right.abs().max()) or 1.0
        error = float((ours.double() - right).abs().max()) / scale
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst
