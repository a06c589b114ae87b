// Tensor maps: how a copy of csrc/cuda/hopper.cuh finds a box of a matrix.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include "check.h"

namespace moelora {

// Returns the map of a matrix [rows, columns] of 16-bit elements, contiguous along a row, with
// boxes [box_rows, 64]. Boxes are swizzled, and have zeros outside of the matrix.
inline CUtensorMap tensor_map(const Tensor& matrix, CUtensorMapDataType dtype, uint32_t box_rows) {
  // The driver is looked up by name, because the library is loaded on machines without one too.
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    STD_TORCH_CHECK(driver != nullptr, "tensor_map: cannot load libcuda.so.1");
    void* function = dlsym(driver, "cuTensorMapEncodeTiled");
    STD_TORCH_CHECK(function != nullptr, "tensor_map: the driver is older than CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.size(1)),
                              static_cast<cuuint64_t>(matrix.size(0))};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(matrix.stride(0)) * 2};
  const cuuint32_t box[] = {64, box_rows}, steps[] = {1, 1};
  CUtensorMap map;
  const CUresult error =
      encode(&map, dtype, 2, const_cast<void*>(matrix.const_data_ptr()), sizes, pitch, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "tensor_map: cuTensorMapEncodeTiled failed with error ",
                  static_cast<int>(error));
  return map;
}

}  // namespace moelora
