#include <cuda_runtime.h>

#include "cuda_devices.h"

namespace codir_fast {

CudaReport cuda_report() {
  CudaReport report{true, CUDART_VERSION, {}, ""};
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int device = 0; status == cudaSuccess && device < count; ++device) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, device);
    if (status == cudaSuccess)
      report.devices.push_back({properties.name, properties.major, properties.minor});
  }
  if (status != cudaSuccess) {
    report.error = cudaGetErrorString(status);
    cudaGetLastError();  // the error is reported here; it must not surface in somebody's next
                         // launch
  } else if (count == 0) {
    report.error = "no CUDA device";
  }
  return report;
}

}  // namespace codir_fast
