// What every op asks of its tensors before it takes a pointer: a shape is checked by unpacking it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <vector>

namespace moelora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The sizes of a tensor with exactly N dimensions: `const auto [T, I] = shape<2>(x, "x");`
template <size_t N>
std::array<int64_t, N> shape(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == int64_t{N}, name, ": expected ", N, " dimensions, got ",
                  tensor.dim());
  std::array<int64_t, N> sizes;
  for (size_t d = 0; d < N; ++d) sizes[d] = tensor.size(d);
  return sizes;
}

inline void check_size(int64_t given, int64_t expected, const char* name) {
  STD_TORCH_CHECK(given == expected, name, ": expected size ", expected, ", got ", given);
}

// One tensor for each sibling, or none at all.
inline void check_count(const std::vector<Tensor>& tensors, int64_t siblings, const char* name) {
  if (!tensors.empty()) check_size(int64_t(tensors.size()), siblings, name);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_floating(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), name,
                  ": expected float16, bfloat16, float32 or float64");
}

// The dtype that sums are kept in: float32, or float64 for float64 tensors.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace moelora
