// Tensors and matrix products through libtorch's stable ABI. Large products go to ATen, which
// computes them with oneDNN or MKL.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"

namespace moelora {

// A thread must get at least this many multiply-adds, about 5 us. Less work does not pay for waking
// a second thread.
constexpr int64_t WORK_PER_THREAD = 1 << 19;

// Returns how many rows a thread must get at least, if one row costs `work` multiply-adds.
inline int64_t grain(int64_t work, int64_t work_per_thread = WORK_PER_THREAD) {
  return std::max<int64_t>(1, work_per_thread / std::max<int64_t>(work, 1));
}

// Calls an op through the dispatcher, and returns its only result.
template <class... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns left right.
inline Tensor mm(const Tensor& left, const Tensor& right) {
  return call("aten::mm", "", left, right);
}

// Writes left right into `out`, which may have any strides.
inline void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  call("aten::mm", "out", left, right, out);
}

// out = start + left right, in one product. `start` may be `out`, or one vector for all rows.
inline void addmm_out(const Tensor& out, const Tensor& start, const Tensor& left,
                      const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), start.get(), left.get(), right.get(), 1.0, 1.0));
}

// Returns a view of a matrix. The C shim makes it, at a fraction of the cost of the dispatcher.
inline Tensor view(const Tensor& matrix, std::array<int64_t, 2> sizes,
                   std::array<int64_t, 2> strides, int64_t offset) {
  AtenTensorHandle handle = nullptr;
  // The offset counts from the first element of `matrix`, and not from its storage.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

// `columns` and `rows` return a view of `count` columns or rows from `begin` on.
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

// Returns an uninitialised matrix on the CPU.
inline Tensor empty(int64_t num_rows, int64_t num_columns, ScalarType dtype) {
  const std::array<int64_t, 2> sizes{num_rows, num_columns};
  const std::array<int64_t, 2> strides{std::max<int64_t>(num_columns, 1), 1};
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes.data(), strides.data(), shim_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Returns an uninitialised vector on the CPU.
inline Tensor empty_vector(int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, shim_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Returns whether the rows of a matrix are dense; their stride may be larger than a row.
inline bool has_dense_rows(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) >= std::max<int64_t>(matrix.size(1), 1);
}

// Returns a matrix in `dtype` whose rows are dense.
inline Tensor dense_rows(const Tensor& tensor, ScalarType dtype) {
  const Tensor matrix = cast(tensor, dtype);
  return has_dense_rows(matrix) ? matrix : row_major(matrix);
}

// Returns matrices of one dtype in one matrix: side by side if `by_column`, else one below the
// other.
inline Tensor stacked(const std::vector<Tensor>& matrices, bool by_column) {
  if (matrices.size() == 1) return matrices[0];
  int64_t total = 0;
  for (const Tensor& matrix : matrices) total += matrix.size(by_column ? 1 : 0);
  const Tensor stack = by_column ? empty(matrices[0].size(0), total, matrices[0].scalar_type())
                                 : empty(total, matrices[0].size(1), matrices[0].scalar_type());
  int64_t begin = 0;
  for (const Tensor& matrix : matrices) {
    const int64_t count = matrix.size(by_column ? 1 : 0);
    Tensor block = by_column ? columns(stack, begin, count) : rows(stack, begin, count);
    torch::stable::copy_(block, matrix);
    begin += count;
  }
  return stack;
}

// Returns the value of an output that a call does not compute: a tensor of size [0].
inline Tensor absent(ScalarType dtype) { return empty_vector(0, dtype); }

// Returns the dtype in which ATen multiplies matrices of a storage dtype. float16 is multiplied in
// float32, because ATen has no blocked float16 product for most processors: [2048, 2048] x
// [2048, 128] took 335 ms in float16 and 12 ms in float32 on a Zen 5.
inline ScalarType product_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

// Returns a gradient or parameter, with any strides and dtype, as a matrix for `mm`: rounded to the
// storage dtype, then cast to the product dtype. It is copied only if neither its rows nor its
// columns are dense.
inline Tensor product_operand(const Tensor& tensor, ScalarType dtype) {
  const Tensor operand = cast(cast(tensor, dtype), product_dtype(dtype));
  const int64_t row = operand.stride(0);
  const int64_t column = operand.stride(1);
  const bool dense =
      (column == 1 && row >= operand.size(1)) || (row == 1 && column >= operand.size(0));
  return dense ? operand : row_major(operand);
}

}  // namespace moelora
