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
template <>
cudaError_t launch_pass<384>(DType, Weighing, const TensorMap&, const TensorMap&,
                             const PassArguments&, int, bool, cudaStream_t);
template <>
cudaError_t launch_pass<512>(DType, Weighing, const TensorMap&, const TensorMap&,
                             const PassArguments&, int, bool, cudaStream_t);

// A launch in clusters of so many blocks, whose kernel may begin while the one before it ends
// (programmatic dependent launch).
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int blocks, int threads, std::size_t shared_bytes, int cluster, bool after_previous,
         cudaStream_t stream) {
    unsigned count = 0;
    if (after_previous) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

}  // namespace sm90
}  // namespace codir_fast
