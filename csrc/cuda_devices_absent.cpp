// Stands where cuda_devices.cu would in a build without nvcc.
#include "cuda_devices.h"

namespace codir_fast {

CudaReport cuda_report() { return {false, 0, {}, "built without nvcc or with CODIR_FAST_CUDA=0"}; }

}  // namespace codir_fast
