// ATen through the dispatcher: the large products stay in oneDNN and MKL.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"

namespace moelora {

// Work below this many multiply-adds, some 5 us, is not worth waking a second thread.
constexpr int64_t WORK_PER_THREAD = 1 << 19;

// The smallest number of rows that a thread should get when one row costs `work` multiply-adds.
inline int64_t grain(int64_t work) {
  return std::max<int64_t>(1, WORK_PER_THREAD / std::max<int64_t>(work, 1));
}

template <class... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor mm(const Tensor& left, const Tensor& right) {
  return call("aten::mm", "", left, right);
}

// Into `out`, any strides.
inline void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  call("aten::mm", "out", left, right, out);
}

inline Tensor columns(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 1, begin, count);
}

inline Tensor rows(Tensor matrix, int64_t begin, int64_t count) {
  return torch::stable::narrow(matrix, 0, begin, count);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline Tensor row_major(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The dtype that products of a storage dtype are computed in. ATen has no blocked float16 product
// for most processors: 335 ms against 12 ms in float32 for [2048, 2048] x [2048, 128] on a Zen 5.
inline ScalarType product_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// A gradient or parameter of any strides and dtype as a matrix for `mm`: rounded to the storage
// dtype, then in the product dtype; copied only where neither rows nor columns are dense.
inline Tensor product_operand(const Tensor& tensor, ScalarType dtype) {
  const Tensor operand = cast(cast(tensor, dtype), product_dtype(dtype));
  const int64_t row = operand.stride(0);
  const int64_t column = operand.stride(1);
  const bool dense =
      (column == 1 && row >= operand.size(1)) || (row == 1 && column >= operand.size(0));
  return dense ? operand : row_major(operand);
}

}  // namespace moelora
