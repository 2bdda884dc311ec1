// What the kernels of this folder ask of the hardware, in one include: places, exchange between
// threads, arithmetic that has an instruction of its own; barriers, copies and products come from
// the headers beside this one. Compiled without nvcc, the same names come from sm90_emulator.h, the
// tests' model of the instructions, so that the very source of a kernel runs on a host.
#pragma once

#include "sm90/tile_layout.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sm90/mbarrier.h"
#include "sm90/named_barrier.h"
#include "sm90/tma.h"
#include "sm90/wgmma.h"

#define CODIR_FAST_DEVICE __device__ __forceinline__

namespace codir_fast {
namespace sm90 {

using BFloat16Element = __nv_bfloat16;
using Float16Element = __half;

CODIR_FAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CODIR_FAST_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
CODIR_FAST_DEVICE int num_blocks() { return static_cast<int>(gridDim.x); }

CODIR_FAST_DEVICE int block_of_cluster() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

CODIR_FAST_DEVICE void sync_block() { __syncthreads(); }
// All threads of the cluster's blocks, wherever each of a warp's comes from.
CODIR_FAST_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Whether the condition holds in any thread of the block.
CODIR_FAST_DEVICE bool sync_block_or(bool condition) { return __syncthreads_or(condition) != 0; }
CODIR_FAST_DEVICE void sync_warp() { __syncwarp(); }
CODIR_FAST_DEVICE bool any_in_warp(bool condition) {
  return __any_sync(0xffffffffu, condition) != 0;
}
// A bit for each lane of the warp.
CODIR_FAST_DEVICE std::uint32_t ballot_in_warp(bool condition) {
  return __ballot_sync(0xffffffffu, condition);
}
CODIR_FAST_DEVICE int count_bits(std::uint32_t bits) { return __popc(bits); }
CODIR_FAST_DEVICE int lowest_bit(std::uint32_t bits) { return __ffs(bits) - 1; }    // -1 of 0
CODIR_FAST_DEVICE int highest_bit(std::uint32_t bits) { return 31 - __clz(bits); }  // -1 of 0

template <typename T>
CODIR_FAST_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Registers a thread of this warpgroup may use from here on; kRegisters in steps of 8.
template <int kRegisters>
CODIR_FAST_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CODIR_FAST_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch: until the grid before has ended and its writes are seen; and: the
// grid after may begin as soon as there is room.
CODIR_FAST_DEVICE void wait_for_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
CODIR_FAST_DEVICE void let_next_grid_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// 2^x to 2 ulp, tiny results as 0; 1/x to 1 ulp.
CODIR_FAST_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CODIR_FAST_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest even, `first` in the low half.
template <typename Element>
CODIR_FAST_DEVICE std::uint32_t pack(float first, float second);
template <>
CODIR_FAST_DEVICE std::uint32_t pack<__nv_bfloat16>(float first, float second) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
template <>
CODIR_FAST_DEVICE std::uint32_t pack<__half>(float first, float second) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

CODIR_FAST_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
CODIR_FAST_DEVICE float to_float(__half value) { return __half2float(value); }
CODIR_FAST_DEVICE void from_float(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}
CODIR_FAST_DEVICE void from_float(float value, __half* out) { *out = __float2half_rn(value); }

// Copies to shared memory that take no registers: of this thread, 4, 8 or 16 bytes each, in groups.
// A thread sees what its own groups have brought once it has waited for them.
template <int kBytes>
CODIR_FAST_DEVICE void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
                 : "memory");
}
CODIR_FAST_DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLatest>  // all groups but the latest ones
CODIR_FAST_DEVICE void wait_for_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
}

struct Word4 {
  std::uint32_t x, y, z, w;
};

CODIR_FAST_DEVICE Word4 load_shared(std::uint32_t address) {
  Word4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
CODIR_FAST_DEVICE int load_shared_word(std::uint32_t address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
CODIR_FAST_DEVICE float load_shared_float(std::uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
CODIR_FAST_DEVICE void store_shared(std::uint32_t address, Word4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
CODIR_FAST_DEVICE void store_shared_word(std::uint32_t address, std::uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
CODIR_FAST_DEVICE void store_shared_float(std::uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

CODIR_FAST_DEVICE void store_pair(float* to, float first, float second) {  // `to` by 8 bytes
  *reinterpret_cast<float2*>(to) = make_float2(first, second);
}

// The value, of which the compiler no longer knows how it came about.
CODIR_FAST_DEVICE std::uint64_t forget(std::uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
CODIR_FAST_DEVICE int forget(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

CODIR_FAST_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
CODIR_FAST_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

}  // namespace sm90
}  // namespace codir_fast

#else

#include "sm90_emulator.h"

#endif
