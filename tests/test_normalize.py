"""`normalize` inside the operators: F.normalize before the reference in float64, gradients through
it included, for every dtype that queries and keys come in.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from codir_fast import reference
from codir_fast.ops.bank_contrast import bank_contrast
from codir_fast.ops.indexed_contrast import indexed_contrast

B, K, M, D = 9, 130, 17, 37
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = [*((dtype, dtype) for dtype in FLOATS), (torch.bfloat16, torch.float32)]
EPSILON = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize(
    ("dtypes", "by_index", "needs_bank"), itertools.product(PAIRS, [False, True], [False, True])
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_against_normalising_before(backend, dtypes, by_index, needs_bank):
    wide = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    query, positive = ((3 * torch.randn(B, D)).to(dtype) for dtype in dtypes)
    query[1] = 0  # its norm counts as 1e-12: its gradient is divided by that
    bank = F.normalize(torch.randn(K, D, dtype=wide), dim=1)
    index = torch.randint(0, K, (B, M))
    inv_t, upstream = torch.tensor(5.0, dtype=torch.float64), torch.randn(B)

    def results(function, dtype=None):
        inputs = [(x if dtype is None else x.to(dtype)).clone() for x in (query, positive, bank)]
        for x, needed in zip(inputs, (True, True, needs_bank), strict=True):
            x.requires_grad_(needed)
        scale = inv_t.clone().requires_grad_()
        loss = function(*inputs, scale)
        loss.backward(upstream.to(loss.dtype))
        return [loss.detach(), *(x.grad for x in inputs), scale.grad]

    def ours(*inputs):
        if by_index:
            return indexed_contrast(*inputs, index, normalize=True, backend=backend)
        return bank_contrast(*inputs, normalize=True, backend=backend)

    def plain(q, p, rows, scale):
        pair = F.normalize(q, dim=1), F.normalize(p, dim=1)
        if by_index:
            return reference.indexed_contrast(*pair, rows, scale, index)
        return reference.bank_contrast(*pair, rows, scale)

    got, exact = results(ours), results(plain, torch.float64)
    for value, expected, dtype in zip(got, exact, [wide, *dtypes, wide, wide], strict=True):
        assert (value is None) == (expected is None)
        if value is None:
            continue
        assert value.dtype == (dtype if value.ndim else inv_t.dtype)
        for part in (slice(1, 2), slice(2, None)) if value.shape == (B, D) else (...,):
            # Half precision holds no gradient of 1e12, which the zero row has.
            if part == slice(1, 2) and dtype == torch.float16:
                continue
            largest = expected[part].abs().max()
            assert (value.double()[part] - expected[part]).abs().max() <= EPSILON[dtype] * largest
