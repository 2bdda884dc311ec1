// What bank_update_cpu.cpp (threads, dispatch) asks of bank_update_cpu_impl.cpp, which is compiled
// once per instruction set. Plain data and declarations only: code here would be shared between
// instruction sets.
#pragma once

#include <cstdint>

#include "bank_update.h"

namespace codir_fast {

// bank_update's arguments. Row r belongs to owner r modulo `owners`.
struct UpdateTask {
  void* bank;
  bool* filled;
  const std::int64_t* index;
  const void* keys;
  std::int64_t N, D, owners;
  DType bank_dtype;
  double momentum;
};

struct UpdateKernels {
  // All rows of the owners in [begin, end), in the order of the index.
  Status (*update_rows)(const UpdateTask&, std::int64_t begin, std::int64_t end);
};

namespace baseline {
extern const UpdateKernels kUpdateKernels;
}

#if CODIR_FAST_X86_DISPATCH
namespace avx2 {
extern const UpdateKernels kUpdateKernels;
}

namespace avx512 {
extern const UpdateKernels kUpdateKernels;
}
#endif

}  // namespace codir_fast
