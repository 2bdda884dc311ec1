// The copy engine: a box of a matrix in global memory to shared memory, rows and columns outside of
// the matrix as zeros.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace codir_fast {
namespace sm90 {

using TensorMap = CUtensorMap;

// Cache policies as createpolicy makes them: what is read once should leave L2 first.
constexpr std::uint64_t kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000;

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box whose first element is (row, column), to `to`; its bytes are counted by `barrier`.
__device__ __forceinline__ void copy_box(std::uint32_t to, const TensorMap& map, int row,
                                         int column, std::uint32_t barrier,
                                         std::uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(cache_policy)
      : "memory");
}

// The same to all blocks of the cluster whose bits in `blocks` are set: there to the same place of
// their shared memory, counted by the barrier that lies there.
__device__ __forceinline__ void copy_box_to_cluster(std::uint32_t to, const TensorMap& map, int row,
                                                    int column, std::uint32_t barrier, int blocks,
                                                    std::uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<std::uint16_t>(blocks)),
      "l"(cache_policy)
      : "memory");
}

// What this thread wrote to shared memory before is seen by matrix instructions and copies of
// threads that it signals after.
__device__ __forceinline__ void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace sm90
}  // namespace codir_fast
