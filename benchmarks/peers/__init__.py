"""What the kernels are measured against, each in its best documented form; a file an operator.

A peer is a function under `@peer(name, what it is, ...)`: it turns the inputs of an operator into a
function without arguments that returns what is compared with the float64 truth: loss and gradient
to the query for the losses (in-batch to the positive keys too), the pooled states or their gradient
for the pooling.
"""

from codir_fast.benchmarks.peers import (
    bank_contrast,
    bank_contrast_packages,
    in_batch_contrast,
    indexed_contrast,
    masked_pool,
)
from codir_fast.benchmarks.peers.inputs import Inputs, make_inputs
from codir_fast.benchmarks.peers.peer import Peer
from codir_fast.benchmarks.peers.truth import error_of, truth

# Of each operator ours comes first: all is measured against it.
PEERS = (
    *bank_contrast.PEERS,
    *bank_contrast_packages.PEERS,
    *in_batch_contrast.PEERS,
    *indexed_contrast.PEERS,
    *masked_pool.PEERS,
)

__all__ = ["PEERS", "Inputs", "Peer", "error_of", "make_inputs", "truth"]
