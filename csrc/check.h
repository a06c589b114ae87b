// Checks of shapes and dtypes, for every op. An op checks its tensors before it takes a pointer. A
// failed check raises RuntimeError: "name: expected X, got Y".
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

// Returns the sizes of a tensor that must have N dimensions:
//     const auto [T, I] = shape<2>(x, "x");
template <size_t N>
std::array<int64_t, N> shape(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == int64_t{N}, name, ": expected ", N, " dimensions, got ",
                  tensor.dim());
  std::array<int64_t, N> sizes;
  for (size_t d = 0; d < N; ++d) sizes[d] = tensor.size(d);
  return sizes;
}

inline void check_size(int64_t size, int64_t expected, const char* name) {
  STD_TORCH_CHECK(size == expected, name, ": expected size ", expected, ", got ", size);
}

// Checks that a list has one tensor for each sibling, or is empty.
inline void check_count(const std::vector<Tensor>& tensors, int64_t siblings, const char* name) {
  if (!tensors.empty()) check_size(int64_t(tensors.size()), siblings, name);
}

// Checks that the lists of a layer have one tensor for each sibling, and that its base comes as
// weights or as outputs.
inline void check_siblings(int64_t siblings, const std::vector<Tensor>& lora_b,
                           const std::vector<Tensor>& base_weight,
                           const std::vector<Tensor>& base_bias,
                           const std::vector<Tensor>& base_output) {
  check_size(int64_t(lora_b.size()), siblings, "lora_b, siblings");
  check_count(base_weight, siblings, "base_weight, siblings");
  check_count(base_bias, siblings, "base_bias, siblings");
  check_count(base_output, siblings, "base_output, siblings");
  STD_TORCH_CHECK(base_weight.empty() != base_output.empty(),
                  "base_weight: expected either base_weight or base_output, got both or neither");
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_floating(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), name,
                  ": expected float16, bfloat16, float32 or float64, got ", tensor.scalar_type());
}

// Returns the dtype of sums: float64 for float64 tensors, else float32.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace moelora
