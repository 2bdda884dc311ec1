import pytest
import torch

import codir_fast


def test_unit_rows_and_shape():
    head = codir_fast.ProjectionHead(48)
    z = head(torch.randn(5, 48))
    assert z.shape == (5, 128)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype):
    head = codir_fast.ProjectionHead(6, 4).to(dtype)
    assert head(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_gradients_and_state():
    head = codir_fast.ProjectionHead(3, dim=2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, x)
    assert list(head.state_dict()) == ["linear.weight", "linear.bias"]
