// The Python module codir_fast._C: how this binary was built and what it found on this machine.
// Importing it also registers the operators of binding.cpp with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda_devices.h"
#include "executor.h"
#include "simd/isa.h"

namespace py = pybind11;

namespace {

void refuse_bad_isa_request() {
  const char* name = std::getenv("CODIR_FAST_CPU_ISA");
  if (name == nullptr) return;
  codir_fast::Isa isa;
  const std::string widest = codir_fast::isa_name(codir_fast::widest_isa());
  if (!codir_fast::parse_isa(name, &isa)) {
    throw py::import_error("CODIR_FAST_CPU_ISA must be baseline, avx2 or avx512, got '" +
                           std::string(name) + "'");
  }
  if (isa > codir_fast::widest_isa()) {
    throw py::import_error("CODIR_FAST_CPU_ISA=" + std::string(name) +
                           " cannot run here: this CPU goes up to " + widest);
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = CODIR_FAST_VERSION;
  info["compiler"] = CODIR_FAST_COMPILER;
  info["build_type"] = CODIR_FAST_BUILD_TYPE;
  info["torch_version"] = CODIR_FAST_TORCH_VERSION;
  info["torch_target"] = CODIR_FAST_TORCH_TARGET;
  const codir_fast::CudaReport report = codir_fast::cuda_report();
  info["cuda"] = report.built;
  info["cuda_version"] = std::to_string(report.toolkit_version / 1000) + "." +
                         std::to_string(report.toolkit_version % 1000 / 10);
  info["cuda_architectures"] = CODIR_FAST_CUDA_ARCHITECTURES;
  return info;
}

py::dict cpu_features() {
  const codir_fast::CpuFeatures has = codir_fast::cpu_features();
  py::dict features;
  features["avx2"] = has.avx2;
  features["fma"] = has.fma;
  features["f16c"] = has.f16c;
  features["avx512f"] = has.avx512f;
  features["avx512bw"] = has.avx512bw;
  features["avx512dq"] = has.avx512dq;
  features["avx512vl"] = has.avx512vl;
  return features;
}

py::list cuda_devices() {
  py::list devices;
  for (const codir_fast::CudaDevice& device : codir_fast::cuda_report().devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    devices.append(entry);
  }
  return devices;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  refuse_bad_isa_request();
  module.doc() =
      "Build information and CPU features of codir_fast; importing it registers the operators.";
  module.def("build_info", &build_info, "How this binary was built, as a dictionary.");
  module.def("cpu_features", &cpu_features,
             "Which of the instruction sets that matter here this CPU has.");
  module.def(
      "cpu_isa", [] { return codir_fast::isa_name(codir_fast::active_isa()); },
      "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  module.def(
      "num_threads", [] { return codir_fast::torch_executor().num_threads; },
      "Threads that a CPU operator uses now (torch.set_num_threads).");
  module.def("cuda_devices", &cuda_devices,
             "GPUs that the CUDA runtime of this binary sees: name and capability.");
  module.def(
      "cuda_error", [] { return codir_fast::cuda_report().error; },
      "Why cuda_devices() is empty; '' if it is not.");
}
