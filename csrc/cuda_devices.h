// The GPUs that the CUDA runtime inside this binary sees. Answers on machines without a GPU or
// driver too.
#pragma once

#include <string>
#include <vector>

namespace codir_fast {

struct CudaDevice {
  std::string name;
  int major, minor;
};

struct CudaReport {
  bool built;                       // the CUDA part is in this binary
  int toolkit_version;              // 13000 for 13.0; 0 when not built
  std::vector<CudaDevice> devices;  // empty with a reason in `error`
  std::string error;
};

CudaReport cuda_report();

}  // namespace codir_fast
