// A plan: the recorded steps of one call of a layer op. moelora_kernels/plans explains plans, and
// native.py there writes the numbers that `Plan` reads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace moelora {

// Owns a tensor.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle tensor) : tensor_(tensor) {}
  Handle(Handle&& other) noexcept : tensor_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(tensor_, other.tensor_);
    return *this;
  }
  ~Handle() {
    if (tensor_ != nullptr) aoti_torch_delete_tensor_object(tensor_);
  }

  AtenTensorHandle get() const { return tensor_; }
  AtenTensorHandle release() { return std::exchange(tensor_, nullptr); }

 private:
  AtenTensorHandle tensor_ = nullptr;
};

// The numbers of a plan, read from the front.
class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& numbers) : numbers_(numbers) {}
  int64_t next() { return numbers_.at(position_++); }
  std::vector<int64_t> list() {
    std::vector<int64_t> result(next());
    for (int64_t& number : result) number = next();
    return result;
  }

 private:
  const std::vector<int64_t>& numbers_;
  size_t position_ = 0;
};

// Part of a numbered tensor, or all of it.
struct View {
  int64_t tensor;
  bool whole;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  // In elements, from the first element of the tensor.
  int64_t offset;

  explicit View(Numbers& numbers);
};

struct Parameter {
  // The number of a tensor, or -1 for a constant.
  int64_t tensor;
  // The bits of a constant, or an offset in bytes from the first element of the tensor.
  int64_t value;
};

enum class Kind : int64_t {
  ALLOCATE,
  LAUNCH,
  MM,
  ADDMM,
  COPY,
  COPY_ALL,
  ROUTE,
  RELEASE,
  CLUSTER_SHRINK
};

struct Step {
  Kind kind;
  // ALLOCATE: the tensor. ROUTE: the four results. CLUSTER_SHRINK: the five results. RELEASE: the
  // tensors.
  std::vector<int64_t> tensors;
  // ALLOCATE.
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int32_t dtype = 0;
  // LAUNCH: a function of the driver, and its grid, block and dynamic shared memory in bytes.
  void* function = nullptr;
  unsigned programs = 0;
  unsigned threads = 0;
  unsigned shared = 0;
  std::vector<Parameter> parameters;
  // MM, ADDMM and COPY: the output, then the inputs. COPY_ALL: the outputs, then the inputs. ROUTE:
  // the experts. CLUSTER_SHRINK: x, A, the router's weight and its bias.
  std::vector<View> views;
  // ROUTE: num_experts, siblings, tile, chunk. CLUSTER_SHRINK: top_k, renormalize, E, temperature,
  // E ranks, E scales; numbers with a fraction as the bits of a float64.
  std::vector<int64_t> options;

  explicit Step(Numbers& numbers);
};

// torch did not allocate a tensor of a plan. A later replay may succeed.
struct AllocationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Plan {
 public:
  explicit Plan(const std::vector<int64_t>& numbers);

  // Replays the steps for the inputs, and returns the outputs. Raises AllocationError if an
  // allocation fails, and another std::exception if another step fails.
  std::vector<Handle> replay(const std::vector<AtenTensorHandle>& inputs,
                             const std::vector<uint64_t>& addresses, bool cuda,
                             int32_t device) const;

 private:
  size_t count_;
  // Number and address of each table.
  std::vector<std::pair<int64_t, uint64_t>> tables_;
  std::vector<Step> steps_;
  std::vector<View> outputs_;
};

}  // namespace moelora
