"""A kernel with an argument of each kind, to be launched; Triton reads kernels from files."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def copy_kernel(out_ptr, maybe_ptr, source, pair, size, stride, factor, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(pair[0] + at * stride, mask=at < size, other=0.0) * factor
    if maybe_ptr is not None:
        value += tl.load(maybe_ptr + at)
    tl.store(out_ptr + at, value)
