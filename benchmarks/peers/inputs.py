"""The inputs that all peers of a shape share."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from codir_fast.benchmarks.shapes import REAL_TOKENS, Shape
from torch import Tensor

T = 0.07
Results = tuple[Tensor, ...]


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

    def positives_and_bank(self) -> Tensor:
        """`classes` with this step's positives in its spare rows: class i is query i's."""
        self.classes[: len(self.positive)] = self.positive
        return self.classes


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
        positive.requires_grad_(shape.operator == "in_batch_contrast")
        classes = torch.empty(s["B"] + s.get("K", 0), s["D"], dtype=dtype)
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
