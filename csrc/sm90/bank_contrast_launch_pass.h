// The launch of one pass, compiled once for each width (bank_contrast_sm90_pass.cu).
#pragma once

#include <cuda_runtime.h>

#include "common.h"
#include "sm90/bank_contrast_pass.h"

namespace codir_fast {
namespace sm90 {

// `after_previous`: may begin while the kernel launched before it ends, and waits for it itself.
template <int kD>
cudaError_t launch_pass(DType dtype, Weighing weighing, const TensorMap& queries,
                        const TensorMap& bank, const PassArguments& arguments, int blocks,
                        bool after_previous, cudaStream_t stream);
template <>
cudaError_t launch_pass<64>(DType, Weighing, const TensorMap&, const TensorMap&,
                            const PassArguments&, int, bool, cudaStream_t);
template <>
cudaError_t launch_pass<128>(DType, Weighing, const TensorMap&, const TensorMap&,
                             const PassArguments&, int, bool, cudaStream_t);
template <>
cudaError_t launch_pass<256>(DType, Weighing, const TensorMap&, const TensorMap&,
                             const PassArguments&, int, bool, cudaStream_t);

// A launch whose kernel may begin while the one before it ends (programmatic dependent launch).
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(int blocks, int threads, std::size_t shared_bytes, bool after_previous,
         cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = after_previous ? 1 : 0;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

}  // namespace sm90
}  // namespace codir_fast
