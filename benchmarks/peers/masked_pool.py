"""Peers of masked_pool and of its gradient: mean over the real tokens of each layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from codir_fast.benchmarks.peers.inputs import Inputs, Results
from codir_fast.benchmarks.peers.peer import Peer, Run, replayed
from torch import Tensor

from codir_fast import pool_hidden_states

Pool = Callable[[list[Tensor], Tensor], Tensor]
PEERS: list[Peer] = []


def peer(
    name: str, what: str, takes_integers: bool = False, as_graph: bool = False, **more: Any
) -> Callable[[Pool], Pool]:
    """Puts a pooling among the peers of both operators; its mask is of numbers in the states' dtype
    unless it `takes_integers`. `as_graph`: replayed as a CUDA graph; of the pooling alone.
    """

    def add(pool: Pool) -> Pool:
        def prepare(inputs: Inputs) -> Run:
            mask = inputs.mask if takes_integers else inputs.mask.to(inputs.grad.dtype)
            step = partial(_forward, pool, inputs, mask)
            if inputs.shape.operator == "masked_pool_backward":
                (pooled,) = step()
                step = partial(_backward, pooled, inputs)
            return replayed(step) if as_graph else step

        # A backward pass runs on the stream of its forward, which is not the one that is captured.
        operators = ("masked_pool",) if as_graph else ("masked_pool", "masked_pool_backward")
        for operator in operators:
            PEERS.append(Peer(name, operator, prepare, what, **more))
        return pool

    return add


def _forward(pool: Pool, inputs: Inputs, mask: Tensor) -> Results:
    return (pool(inputs.hidden_states, mask),)


def _backward(pooled: Tensor, inputs: Inputs) -> Results:
    return torch.autograd.grad(pooled, inputs.hidden_states, inputs.grad, retain_graph=True)


@peer("codir_fast", "pool_hidden_states", takes_integers=True)
def _ours(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask)


@peer(
    "codir_fast-cuda",
    'pool_hidden_states(backend="cuda")',
    takes_integers=True,
    gpu_only=True,
)
def _cuda(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask, backend="cuda")


@peer(
    "codir_fast-triton",
    'pool_hidden_states(backend="triton")',
    takes_integers=True,
    gpu_only=True,
)
def _triton(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask, backend="triton")


@peer(
    "codir_fast-triton-graph",
    'pool_hidden_states(backend="triton"), replayed as a CUDA graph',
    takes_integers=True,
    as_graph=True,
    gpu_only=True,
)
def _triton_graph(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask, backend="triton")


@peer(
    "codir_fast-cuda-graph",
    'pool_hidden_states(backend="cuda"), replayed as a CUDA graph',
    takes_integers=True,
    as_graph=True,
    gpu_only=True,
)
def _cuda_graph(states: list[Tensor], mask: Tensor) -> Tensor:
    return pool_hidden_states(states, mask, backend="cuda")


@peer("bmm", "bmm of the weights with each layer", compiles=False)
def _bmm(states: list[Tensor], mask: Tensor) -> Tensor:
    weights = (mask / mask.sum(1, keepdim=True))[:, None]
    return torch.cat([torch.bmm(weights, state)[:, 0] for state in states], dim=1)


@peer("eager", "mask, sum, divide, cat", compiles=False)
def _eager(states: list[Tensor], mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True)
    return torch.cat([(state * mask[..., None]).sum(1) / count for state in states], dim=1)


@peer(
    "sentence-transformers",
    "its formula of mean pooling, layer by layer",
    takes_integers=True,
    compiles=False,
)
def _expanded(states: list[Tensor], mask: Tensor) -> Tensor:
    pooled = []
    for state in states:
        weights = mask.unsqueeze(-1).expand(state.size()).to(state.dtype)
        pooled.append(torch.sum(state * weights, 1) / torch.clamp(weights.sum(1), min=1e-9))
    return torch.cat(pooled, dim=1)
