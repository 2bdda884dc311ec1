"""Launches of Triton kernels: what is remembered of them is all that Triton compiles for."""

import itertools
import random

import needs_triton
import pytest
import torch

pytestmark = needs_triton.MARKS


@pytest.fixture
def copy_kernel():
    from launched_kernel import copy_kernel

    return copy_kernel


@pytest.fixture
def launched(copy_kernel):
    import triton_driver

    with triton_driver.sm_90([copy_kernel]) as launched:
        yield launched


def calls():
    """Arguments and constants, each with everything that Triton compiles for in several ways."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    at = torch.zeros(4096)
    columns = TensorDescriptor(at, [64, 64], [64, 1], [16, 16])
    tensors = (at, at[1:], at[4:], at.half(), at.half()[1:], None)
    sources = (at, at[1:], columns, TensorDescriptor(at, [64, 64], [64, 1], [16, 32]))
    others = ((at, at[1:]), (at[1:], at))
    numbers = (1, 2, 16, 3 << 30, 1 << 31, 1 << 40)
    for tensor, source, pair in itertools.product(tensors, sources, others):
        yield (at, tensor, source, pair, 3, 5, 0.5), {"N": 16, "num_warps": 4}
    for size, stride in itertools.product(numbers, numbers):
        yield (at, at, at, others[0], size, stride, -1.0), {"N": 16, "num_warps": 4}
    for N, num_warps in itertools.product((16, 32), (1, 4)):
        yield (at, at, at, others[0], 3, 5, 2.0), {"N": N, "num_warps": num_warps}
    yield (torch.nn.Parameter(at), at, at, others[0], 3, 5, 0.5), {"N": 16, "num_warps": 4}


def test_launch_takes_the_kernel_that_triton_takes(copy_kernel, launched):
    from codir_fast.kernels.launch import launch

    every = list(calls())
    expected = []
    for arguments, constants in every:
        copy_kernel[(3, 2)](*arguments, **constants)
        expected.append(launched.calls.pop())
    assert len({id(compiled) for compiled, _ in expected}) > 40
    again = list(zip(every, expected, strict=True)) * 2  # first as they come, then as remembered
    random.Random(0).shuffle(again)
    for (arguments, constants), (compiled, passed) in again:
        launch(copy_kernel, (3, 2), *arguments, **constants)
        got, with_arguments = launched.calls.pop()
        assert got is compiled, (arguments, constants)
        of_kernel = zip(with_arguments, passed, strict=True)
        different = [n for n, (a, b) in enumerate(of_kernel) if not (a is b or a == b)]
        assert different == [6], arguments  # what profilers are told of this launch


def test_launches_are_remembered_up_to_a_number(copy_kernel, launched, monkeypatch):
    from codir_fast.kernels import launch

    monkeypatch.setattr(launch, "_MOST", 2)
    at = torch.zeros(16)
    for N in (16, 32, 64, 16):
        launch.launch(copy_kernel, (1,), at, at, at, (at, at), 3, 5, 1.0, N=N, num_warps=1)
        assert len(launch._COMPILED) <= 2
    assert launched == ["copy_kernel"] * 4


def test_host_arithmetic():
    from codir_fast.kernels.launch import cdiv, next_power_of_2

    assert [cdiv(a, 3) for a in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [next_power_of_2(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert next_power_of_2((1 << 40) + 1) == 1 << 41
