// mbarrier: a counter of arrivals and of bytes under way, in shared memory. A phase ends when both
// are what it expects; phases alternate in parity.
#pragma once

#include <cstdint>

namespace codir_fast {
namespace sm90 {

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers known to the copy engine; other threads need a block barrier besides.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same at the barrier that lies there in another block of the cluster, if `really`: no branch,
// which between the start of a product and its end would make the compiler wait for it. It says
// that something was read; what was written is not seen by the other block's threads for it.
__device__ __forceinline__ void barrier_arrive_in_block(std::uint32_t barrier, int block,
                                                        bool really) {
  asm volatile(
      "{\n"
      ".reg .pred really;\n"
      ".reg .b32 theirs;\n"
      "setp.ne.b32 really, %2, 0;\n"
      "@really mapa.shared::cluster.u32 theirs, %0, %1;\n"
      "@really mbarrier.arrive.shared::cluster.b64 _, [theirs];\n"
      "}\n" ::"r"(barrier),
      "r"(block), "r"(static_cast<int>(really))
      : "memory");
}

// Arrives, and makes the phase wait for `bytes` from the copy engine.
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended. A fresh barrier is in phase 0: waiting for parity 1
// returns at once.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace sm90
}  // namespace codir_fast
