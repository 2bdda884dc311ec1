"""What a peer is, and how a file adds one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from codir_fast.benchmarks.peers.inputs import Inputs, Results
from codir_fast.benchmarks.shapes import Shape
from torch import Tensor

Run = Callable[[], Results]
Prepare = Callable[[Inputs], Run]
SEARCH_ROWS = 1 << 17  # of the bank, for a choice among forms; more would take longer, not differ


@dataclass(frozen=True)
class Peer:
    """`prepare` makes the function that is timed; tensors it makes are on the inputs' device.
    `packages`: what it imports. `compiles`: False where all that it runs is built already, as
    PyTorch's own kernels are.

    `copies`: of the B x K logits that it holds at once (and `copies_per_query` more for each
    query), for the refusal of what does not fit.
    """

    name: str
    operator: str
    prepare: Prepare
    what: str
    packages: tuple[str, ...] = ()
    copies: float = 0
    copies_per_query: float = 0
    others_count: bool = False  # the other queries' positives are negatives too
    normalizes: bool = False  # its gradient is along the sphere
    is_floor: bool = False  # not the whole loss: nothing to compare
    gpu_only: bool = False
    compiles: bool = True

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
        if self.operator == "in_batch_contrast":
            return int(self.copies * 4 * s["B"] ** 2)
        return int(self.copies * 4 * s["B"] * s.get("M", 0) * s.get("D", 0))


def adder(
    peers: list[Peer], operator: str, **common: Any
) -> Callable[..., Callable[[Prepare], Prepare]]:
    """A decorator `peer(name, what, **more)`, which puts a function of Inputs into `peers`."""

    def peer(name: str, what: str, **more: Any) -> Callable[[Prepare], Prepare]:
        def add(prepare: Prepare) -> Prepare:
            peers.append(Peer(name, operator, prepare, what, **common, **more))
            return prepare

        return add

    return peer


def with_gradient(inputs: Inputs, loss: Callable[[], Tensor]) -> Run:
    def run() -> Results:
        value = loss()
        wanted = [x for x in (inputs.query, inputs.positive) if x.requires_grad]
        return value.detach(), *torch.autograd.grad(value, wanted)

    return run


def replayed(step: Run) -> Run:
    """Captured once, replayed: what is left without PyTorch's overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are there
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def run(step: Run = step) -> Results:  # held: each replay reads what it closes over
        graph.replay()
        return results

    return run
