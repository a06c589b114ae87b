// ATen through the dispatcher: the large products stay in oneDNN and MKL.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
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

// to = start + left right, in one product; `start` may be `to`, or a vector for all rows.
inline void addmm_out(const Tensor& to, const Tensor& start, const Tensor& left,
                      const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(to.get(), start.get(), left.get(), right.get(), 1.0, 1.0));
}

// A view of a matrix; straight from the C shim, several times cheaper than through the dispatcher.
inline Tensor view(const Tensor& matrix, std::array<int64_t, 2> sizes,
                   std::array<int64_t, 2> strides, int64_t offset) {
  AtenTensorHandle handle = nullptr;
  // The offset counts from the first element of `matrix`, not of its storage.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

inline Tensor columns(const Tensor& matrix, int64_t begin, int64_t count) {
  const int64_t row = matrix.stride(0);
  const int64_t column = matrix.stride(1);
  return view(matrix, {matrix.size(0), count}, {row, column}, begin * column);
}

inline Tensor rows(const Tensor& matrix, int64_t begin, int64_t count) {
  const int64_t row = matrix.stride(0);
  return view(matrix, {count, matrix.size(1)}, {row, matrix.stride(1)}, begin * row);
}

inline Tensor transposed(const Tensor& matrix) {
  return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)}, 0);
}

inline Tensor row_major(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// An uninitialised matrix on the CPU.
inline Tensor empty(int64_t num_rows, int64_t num_columns, ScalarType dtype) {
  const std::array<int64_t, 2> sizes{num_rows, num_columns};
  const std::array<int64_t, 2> strides{std::max<int64_t>(num_columns, 1), 1};
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes.data(), strides.data(), shim_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// An uninitialised vector on the CPU.
inline Tensor empty_vector(int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, shim_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A matrix in `dtype` whose rows are dense, at any distance.
inline Tensor dense_rows(const Tensor& tensor, ScalarType dtype) {
  const Tensor matrix = cast(tensor, dtype);
  const bool dense =
      matrix.stride(1) == 1 && matrix.stride(0) >= std::max<int64_t>(matrix.size(1), 1);
  return dense ? matrix : row_major(matrix);
}

// The matrices of `parts`, all of one dtype, side by side, or below one another.
inline Tensor stacked(const std::vector<Tensor>& parts, bool by_column) {
  if (parts.size() == 1) return parts[0];
  int64_t total = 0;
  for (const Tensor& part : parts) total += part.size(by_column ? 1 : 0);
  const Tensor all = by_column ? empty(parts[0].size(0), total, parts[0].scalar_type())
                               : empty(total, parts[0].size(1), parts[0].scalar_type());
  int64_t begin = 0;
  for (const Tensor& part : parts) {
    const int64_t count = part.size(by_column ? 1 : 0);
    Tensor to = by_column ? columns(all, begin, count) : rows(all, begin, count);
    torch::stable::copy_(to, part);
    begin += count;
  }
  return all;
}

// The value of an output that this call does not have: a tensor of size [0].
inline Tensor absent(ScalarType dtype) { return empty_vector(0, dtype); }

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
