// wgmma: 128 threads multiply 64 rows at a time, asynchronously. Thread t holds of the 64 x N
// result rows 16 (t / 32) + t % 32 / 4 (+ 8) and columns 8 i + 2 (t % 4) (+ 1), as d[4 i] .. d[4 i
// + 3]: first row, two columns, then the row 8 below. Registers must not be touched between a
// product's start and the wait for its end.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace codir_fast {
namespace sm90 {

// Before a product reads registers that this thread wrote.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends the group of products started since the last call.
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// along_rows(d, a, b, accumulate): d (64, N) = (or +=) A B', 16 columns of A (64 rows) and B (N
// rows) in shared memory. along_columns(d, a, b): d (64, N) += A B, A (64, 16) in registers or in
// shared memory, as along_rows has it, B 16 rows of N columns.
template <typename Element, int N>
struct Product;

#define CODIR_FAST_REGISTERS_32                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CODIR_FAST_OPERANDS_32(d)                                                                 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define CODIR_FAST_REGISTERS_40 CODIR_FAST_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CODIR_FAST_OPERANDS_40(d)                                                             \
  CODIR_FAST_OPERANDS_32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define CODIR_FAST_REGISTERS_56 \
  CODIR_FAST_REGISTERS_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
#define CODIR_FAST_OPERANDS_56(d)                                                                \
  CODIR_FAST_OPERANDS_40(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]),    \
      "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), \
      "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define CODIR_FAST_REGISTERS_64 CODIR_FAST_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CODIR_FAST_OPERANDS_64(d)                                                             \
  CODIR_FAST_OPERANDS_56(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), \
      "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define CODIR_FAST_REGISTERS_88                                    \
  CODIR_FAST_REGISTERS_64                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
  "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define CODIR_FAST_OPERANDS_88(d)                                                                \
  CODIR_FAST_OPERANDS_64(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]),    \
      "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), \
      "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), \
      "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define CODIR_FAST_REGISTERS_96 CODIR_FAST_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CODIR_FAST_OPERANDS_96(d)                                                             \
  CODIR_FAST_OPERANDS_88(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), \
      "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define CODIR_FAST_REGISTERS_128                                                               \
  CODIR_FAST_REGISTERS_96                                                                      \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define CODIR_FAST_OPERANDS_128(d)                                                             \
  CODIR_FAST_OPERANDS_96(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), \
      "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]),      \
      "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]),      \
      "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]),      \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]),      \
      "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// R accumulators; P0..P4 number the operands that follow them.
#define CODIR_FAST_PRODUCT(Element, type, N, R, P0, P1, P2, P3, P4)                             \
  template <>                                                                                   \
  struct Product<Element, N> {                                                                  \
    static __device__ __forceinline__ void along_rows(float (&d)[R], std::uint64_t a,           \
                                                      std::uint64_t b, bool accumulate) {       \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #P2                   \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type        \
                   " {" CODIR_FAST_REGISTERS_##R "}, %" #P0 ", %" #P1                           \
                                                 ", accumulate, 1, 1, 0, 0;\n}\n"               \
                   : CODIR_FAST_OPERANDS_##R(d)                                                 \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                        \
    }                                                                                           \
    static __device__ __forceinline__ void along_columns(float (&d)[R], const std::uint32_t* a, \
                                                         std::uint64_t b) {                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type              \
                   " {" CODIR_FAST_REGISTERS_##R "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3      \
                                                 "}, %" #P4 ", 1, 1, 1, 1;\n"                   \
                   : CODIR_FAST_OPERANDS_##R(d)                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                       \
    }                                                                                           \
    static __device__ __forceinline__ void along_columns(float (&d)[R], std::uint64_t a,        \
                                                         std::uint64_t b) {                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type              \
                   " {" CODIR_FAST_REGISTERS_##R "}, %" #P0 ", %" #P1 ", 1, 1, 1, 0, 1;\n"      \
                   : CODIR_FAST_OPERANDS_##R(d)                                                 \
                   : "l"(a), "l"(b));                                                           \
    }                                                                                           \
  };

#define CODIR_FAST_PRODUCTS(N, R, ...)                         \
  CODIR_FAST_PRODUCT(__nv_bfloat16, "bf16", N, R, __VA_ARGS__) \
  CODIR_FAST_PRODUCT(__half, "f16", N, R, __VA_ARGS__)

CODIR_FAST_PRODUCTS(64, 32, 32, 33, 34, 35, 36)
CODIR_FAST_PRODUCTS(80, 40, 40, 41, 42, 43, 44)
CODIR_FAST_PRODUCTS(112, 56, 56, 57, 58, 59, 60)
CODIR_FAST_PRODUCTS(128, 64, 64, 65, 66, 67, 68)
CODIR_FAST_PRODUCTS(176, 88, 88, 89, 90, 91, 92)
CODIR_FAST_PRODUCTS(192, 96, 96, 97, 98, 99, 100)
CODIR_FAST_PRODUCTS(256, 128, 128, 129, 130, 131, 132)

}  // namespace sm90
}  // namespace codir_fast
