"""What the tests share: two threads, seeds, and the accuracy rule."""

from collections.abc import Callable, Iterable

import hypothesis
import pytest
import torch
from torch import Tensor

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=250, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    return _assert_accurate


def _assert_accurate(
    ours: Iterable[Tensor | None],
    plain: Iterable[Tensor | None],
    exact: Iterable[Tensor | None],
    *,
    condition: float = 1.0,
    scales: Iterable[float] | None = None,
    name: str = "",
) -> None:
    """|ours - float64| <= 2 * |plain PyTorch in the same dtype - float64| + tiny, largest errors.

    tiny is a few roundings of the largest value (or of what was added up to it, in `scales`), times
    how much the problem magnifies a rounding of its inputs (`condition`): plain PyTorch may be
    right by luck. The first result has the dtype of the computation.
    """
    ours, exact = list(ours), list(exact)
    least_eps = 0.0 if ours[0] is None else torch.finfo(ours[0].dtype).eps
    least = [0.0] * len(exact) if scales is None else list(scales)
    for n, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        if c is None:
            assert a is None and b is None, f"{name} {n}"
            continue
        assert a is not None and b is not None, f"{name} {n}"
        assert a.shape == b.shape == c.shape and a.dtype == b.dtype, f"{name} {n}"
        if c.numel() == 0:
            continue
        scale = max(c.abs().max().item(), least[n])
        eps = max(torch.finfo(a.dtype).eps, least_eps)
        tiny = 4 * condition * eps * scale + 1e-30
        error = (a.double() - c).abs().max().item()
        plain_error = (b.double() - c).abs().max().item()
        assert error <= 2 * plain_error + tiny, f"{name} {n}: {error} > 2 * {plain_error} + {tiny}"


@pytest.fixture
def compile_whole() -> Callable[..., Callable]:
    """torch.compile in one graph, with no code left over from other tests."""
    torch.compiler.reset()

    def compile_function(function: Callable, backend: str = "aot_eager") -> Callable:
        return torch.compile(function, fullgraph=True, backend=backend)

    return compile_function
