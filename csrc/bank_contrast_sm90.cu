// Host side of bank_contrast_sm90, with its two small kernels: before the pass and after it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "bank_contrast_sm90.h"
#include "sm90/bank_contrast_launch_pass.h"
#include "sm90/bank_contrast_launches.h"

namespace codir_fast {
namespace sm90 {
namespace {

template <int kDim, typename Element>
__global__ void __launch_bounds__(combine_warps(kDim) * kWarp)
    prepare_kernel(Element* unit, const void* query, int B, int D, bool normalize) {
  prepare_queries<kDim>(unit, query, B, D, normalize);
}

template <int kDim, typename Element>
__global__ void __launch_bounds__(combine_warps(kDim) * kWarp)
    combine_kernel(const __grid_constant__ CombineArguments arguments) {
  __shared__ double exchange[combine_doubles(kDim)];
  combine_splits<kDim, Element>(arguments, exchange);
}

// Calls run(element, columns) with what the kernels for these are compiled for.
template <typename Run>
cudaError_t with_kernels(DType dtype, int D, const Run& run) {
  const auto with_columns = [&](auto element) {
    const int dim = combined_dim(D);
    if (dim == 64) return run(element, std::integral_constant<int, 64>());
    if (dim == 128) return run(element, std::integral_constant<int, 128>());
    if (dim == 256) return run(element, std::integral_constant<int, 256>());
    return run(element, std::integral_constant<int, kMaxDim>());
  };
  return dtype == DType::kBFloat16 ? with_columns(BFloat16Element())
                                   : with_columns(Float16Element());
}

// The driver's function, through the runtime: this binary is not linked with the driver.
using Encode = decltype(&cuTensorMapEncodeTiled);
cudaError_t find_encode(Encode* encode) {
  cudaDriverEntryPointQueryResult found;
  return cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", reinterpret_cast<void**>(encode), 12000, cudaEnableDefault, &found);
}

const char* encode(const MatrixMap& map, DType dtype, TensorMap* out) {
  static Encode encode_tiled = nullptr;
  if (encode_tiled == nullptr) {
    Encode found = nullptr;
    const cudaError_t error = find_encode(&found);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (found == nullptr) return "the driver has no cuTensorMapEncodeTiled: it is too old";
    encode_tiled = found;
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(map.columns),
                              static_cast<cuuint64_t>(map.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(map.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(map.box_columns),
                            static_cast<cuuint32_t>(map.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  // Rows of two boxes: asked for 256 bytes at a time, as wider ones are, L2 is 4% slower.
  const auto promotion =
      map.columns <= 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const CUresult result = encode_tiled(out,
                                       dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                       2, const_cast<void*>(map.data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here: it must not surface at somebody's next launch
  return cudaGetErrorString(error);
}

struct CudaLauncher {
  cudaStream_t stream;

  const char* prepare(DType dtype, void* unit, const void* query, int B, int D, bool normalize) {
    const int warps = combine_warps(combined_dim(D));
    Launch launch(ceil_div(B, warps), warps * kWarp, 0, 1, false, stream);
    return text_of(with_kernels(dtype, D, [&](auto element, auto dim) {
      using Element = decltype(element);
      return cudaLaunchKernelEx(&launch.config, prepare_kernel<dim.value, Element>,
                                static_cast<Element*>(unit), query, B, D, normalize);
    }));
  }

  const char* pass(DType dtype, Weighing weighing, const MatrixMap& queries, const MatrixMap& bank,
                   const PassArguments& arguments, int blocks, bool after_previous) {
    TensorMap query_map, bank_map;
    if (const char* error = encode(queries, dtype, &query_map)) return error;
    if (const char* error = encode(bank, dtype, &bank_map)) return error;
    const int D = padded_dim(arguments.plan.D);
    const auto launch = D == 64    ? launch_pass<64>
                        : D == 128 ? launch_pass<128>
                        : D == 256 ? launch_pass<256>
                        : D == 384 ? launch_pass<384>
                                   : launch_pass<512>;
    return text_of(
        launch(dtype, weighing, query_map, bank_map, arguments, blocks, after_previous, stream));
  }

  const char* combine(DType dtype, const CombineArguments& arguments, int blocks,
                      bool after_previous) {
    const int warps = combine_warps(combined_dim(arguments.D));
    Launch launch(blocks, warps * kWarp, 0, 1, after_previous, stream);
    return text_of(with_kernels(dtype, arguments.D, [&](auto element, auto dim) {
      return cudaLaunchKernelEx(&launch.config, combine_kernel<dim.value, decltype(element)>,
                                arguments);
    }));
  }
};

const char* count_multiprocessors(int device, int* count) {
  return text_of(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

}  // namespace

}  // namespace sm90

const char* why_not_bank_contrast_sm90(const BankContrastSm90& in) {
  if (in.dtype != DType::kBFloat16 && in.dtype != DType::kFloat16)
    return "`query` must be bfloat16 or float16";
  if (in.D < 1 || in.D > sm90::kMaxDim) return "D must be in [1, 512]";
  if (in.B > sm90::kMaxRows) return "`query` must have at most 2^31 - 256 rows";
  return sm90::why_not_mapped(sm90::matrix_map(in.bank, in.K, in.D, 1));
}

const char* bank_contrast_sm90_workspace(const BankContrastSm90& inputs, int device,
                                         std::size_t* bytes) {
  int multiprocessors = 0;
  const char* error = sm90::count_multiprocessors(device, &multiprocessors);
  if (error == nullptr)
    *bytes = sm90::workspace(inputs, sm90::make_plan(inputs, multiprocessors)).bytes;
  return error;
}

const char* bank_contrast_sm90(const BankContrastOutputs& outputs, const BankContrastSm90& inputs,
                               void* workspace, int device, void* stream) {
  int multiprocessors = 0;
  if (const char* error = sm90::count_multiprocessors(device, &multiprocessors)) return error;
  sm90::CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  return sm90::launch_bank_contrast(launcher, outputs, inputs, workspace, multiprocessors);
}

}  // namespace codir_fast
