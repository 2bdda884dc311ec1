"""The shapes that are timed, by each form of ours, in bfloat16 against float64; and what `make
bench-gpu` needs compiled, by several processes.
"""

import pytest
import torch
from codir_fast.benchmarks.comparison import TOLERANCE
from codir_fast.benchmarks.peers import PEERS, error_of, make_inputs, truth
from codir_fast.benchmarks.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("needs_gpu")
# Those replayed as graphs run the kernels of the queue's forms.
OURS = [
    p
    for p in PEERS
    if p.name.startswith("codir_fast") and not p.name.endswith("graph") and not p.is_floor
]
CASES = [(shape, peer) for shape in SHAPES for peer in OURS if peer.operator == shape.operator]


@pytest.mark.parametrize(
    ("shape", "peer"), CASES, ids=[f"{shape.name}-{peer.name}" for shape, peer in CASES]
)
def test_named_shape(device, needs_cuda_backend, shape, peer):
    if peer.name == "codir_fast-cuda":
        needs_cuda_backend(shape.operator.removesuffix("_backward"))
        if shape.sizes.get("D", 0) > 512:
            pytest.skip("the hand-written kernel takes D up to 512")
    inputs = make_inputs(shape, device, torch.bfloat16)
    with torch.device(device):
        run = peer.prepare(inputs)
    error = error_of(run(), truth(inputs, peer.others_count, peer.normalizes))
    torch.cuda.empty_cache()  # other processes share its memory
    assert error <= TOLERANCE[torch.bfloat16]
