// Named barriers: threads in two roles wait for each other, by number. Barrier 0 is __syncthreads.
#pragma once

namespace codir_fast {
namespace sm90 {

// Until `threads` have come to the barrier, by either call.
__device__ __forceinline__ void named_barrier_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Comes to the barrier without waiting, if `really`: no branch, which between the start of a
// product and its end would make the compiler wait for it.
__device__ __forceinline__ void named_barrier_arrive(int name, int threads, bool really) {
  asm volatile(
      "{\n"
      ".reg .pred really;\n"
      "setp.ne.b32 really, %2, 0;\n"
      "@really bar.arrive %0, %1;\n"
      "}\n" ::"r"(name),
      "r"(threads), "r"(static_cast<int>(really))
      : "memory");
}

}  // namespace sm90
}  // namespace codir_fast
