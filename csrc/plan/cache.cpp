// The layer ops on CUDA: a call with a known key is replayed. Any other call runs the Python op
// `<op>_python`, which may record a plan and give it to `keep_plan`.
#include "cache.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "plan.h"

namespace moelora {
namespace {

using torch::stable::detail::to;

// All ops together keep at most this many plans; the oldest leaves.
constexpr size_t MAX_PLANS = 4096;

std::mutex mutex;
std::unordered_map<std::string, std::shared_ptr<const Plan>> plans;
std::deque<std::string> order;
std::atomic<bool (*)()> plain_check{nullptr};
std::atomic<void (*)()> rethrow{nullptr};
std::atomic<int64_t> replays{0};
// The key of the call of this thread that found no plan.
thread_local std::string pending;

struct Op {
  const char* python;
  // One letter for each argument: T tensor, O optional tensor, L list of tensors, N list of
  // numbers; a number otherwise.
  const char* arguments;
  // How many results the op returns, and which of them is a list of tensors.
  int64_t results;
  int64_t list;
};

// x, tensors, gate, mixture, dropout.
constexpr Op WIDE{"moelora::wide_python", "TLLLLLLLOOOONNbibffbO", 5, 0};
constexpr Op GROUPED{"moelora::grouped_python", "TLLLLLLLOOOONNbibffbO", 9, 0};
// dy, x, tensors, h, gate, dlogits, mixture, dropout, needs.
constexpr Op WIDE_BACKWARD{"moelora::wide_backward_python", "LTLLLLLLLTOOOOONNbibffbObb", 6, 5};
// The same with the routing before the mixture.
constexpr Op GROUPED_BACKWARD{"moelora::grouped_backward_python", "LTLLLLLLLTOOOOOTTTTNNbibffbObb",
                              6, 5};

// The tensors of a call, which its arguments own, and its key.
struct Call {
  std::vector<AtenTensorHandle> inputs;
  std::vector<uint64_t> addresses;
  std::string key;
  int32_t device_type = 0;
  int32_t device = 0;

  Call(const Op& op, const StableIValue* stack) {
    key.reserve(1024);
    key.append(op.python);
    for (size_t i = 0; op.arguments[i] != 0; ++i) argument(op.arguments[i], stack[i]);
  }

 private:
  void add(const void* data, size_t size) { key.append(static_cast<const char*>(data), size); }
  void add(int64_t number) { add(&number, sizeof(number)); }

  void argument(char kind, StableIValue value) {
    if (kind == 'T') {
      tensor(to<AtenTensorHandle>(value));
    } else if (kind == 'O') {
      const auto* inner = to<StableIValue*>(value);
      add(inner != nullptr);
      if (inner != nullptr) tensor(to<AtenTensorHandle>(*inner));
    } else if (kind == 'L' || kind == 'N') {
      auto* list = to<StableListHandle>(value);
      size_t size = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
      add(static_cast<int64_t>(size));
      for (size_t i = 0; i < size; ++i) {
        StableIValue element = 0;
        TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
        if (kind == 'N') {
          add(static_cast<int64_t>(element));
        } else {
          tensor(to<AtenTensorHandle>(element));
        }
      }
    } else {
      add(static_cast<int64_t>(value));
    }
  }

  void tensor(AtenTensorHandle handle) {
    int64_t dim = 0;
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    int32_t dtype = 0;
    void* address = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address));
    const auto bits = reinterpret_cast<uint64_t>(address);
    add(dim);
    add(sizes, dim * sizeof(int64_t));
    add(strides, dim * sizeof(int64_t));
    // Launchers copy a tensor whose address is not a multiple of 16.
    const std::array<int32_t, 4> others{dtype, device_type, device, int32_t(bits % 16)};
    add(others.data(), sizeof(others));
    inputs.push_back(handle);
    addresses.push_back(bits);
  }
};

// Frees the arguments of a call.
void free_arguments(const Op& op, const StableIValue* stack) {
  for (size_t i = 0; op.arguments[i] != 0; ++i) {
    if (op.arguments[i] == 'T') {
      to<torch::stable::Tensor>(stack[i]);
    } else if (op.arguments[i] == 'O') {
      to<std::optional<torch::stable::Tensor>>(stack[i]);
    } else if (op.arguments[i] == 'L') {
      to<std::vector<torch::stable::Tensor>>(stack[i]);
    } else if (op.arguments[i] == 'N') {
      TORCH_ERROR_CODE_CHECK(torch_delete_list(to<StableListHandle>(stack[i])));
    }
  }
}

std::shared_ptr<const Plan> find(const std::string& key) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

std::vector<Handle> replay(const Plan& plan, const Call& call) {
  if (call.device_type == aoti_torch_device_type_cpu()) {
    return plan.replay(call.inputs, call.addresses, false, 0);
  }
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  return plan.replay(call.inputs, call.addresses, true, call.device);
}

// Runs the Python op, and returns its results. An exception of Python passes through.
std::vector<Handle> run_python(const Op& op, StableIValue* stack) {
  const AOTITorchError error = torch_call_dispatcher(op.python, "", stack, TORCH_ABI_VERSION);
  pending.clear();
  auto* raise = rethrow.load();
  if (error != 0 && raise != nullptr) raise();
  TORCH_ERROR_CODE_CHECK(error);
  std::vector<Handle> results;
  auto* list = to<StableListHandle>(stack[0]);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    results.emplace_back(to<AtenTensorHandle>(element));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return results;
}

// Puts the results of an op on the stack. All results but one are a tensor.
void return_results(const Op& op, std::vector<Handle> results, StableIValue* stack) {
  const int64_t listed = int64_t(results.size()) - op.results + 1;
  size_t next = 0;
  for (int64_t i = 0; i < op.results; ++i) {
    if (i != op.list) {
      stack[i] = torch::stable::detail::from(results[next++].release());
      continue;
    }
    StableListHandle list = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(listed, &list));
    for (int64_t j = 0; j < listed; ++j) {
      const auto tensor = torch::stable::detail::from(results[next++].release());
      TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, tensor));
    }
    stack[i] = torch::stable::detail::from(list);
  }
}

// Runs a layer op, in the calling convention of StableLibrary::impl.
template <const Op& op>
void run(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  auto* is_plain = plain_check.load();
  if (is_plain != nullptr && is_plain()) {
    const Call call(op, stack);
    if (const auto plan = find(call.key)) {
      std::vector<Handle> results = replay(*plan, call);
      free_arguments(op, stack);
      return_results(op, std::move(results), stack);
      ++replays;
      return;
    }
    pending = call.key;
  }
  return_results(op, run_python(op, stack), stack);
}

template <class Library>
void register_ops(Library& library) {
  library.impl("wide", &run<WIDE>);
  library.impl("wide_backward", &run<WIDE_BACKWARD>);
  library.impl("grouped", &run<GROUPED>);
  library.impl("grouped_backward", &run<GROUPED_BACKWARD>);
}

}  // namespace

void keep_plan(const std::vector<int64_t>& numbers) {
  if (pending.empty()) return;
  auto plan = std::make_shared<const Plan>(numbers);
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.insert_or_assign(pending, std::move(plan)).second) order.push_back(pending);
  if (order.size() > MAX_PLANS) {
    plans.erase(order.front());
    order.pop_front();
  }
}

void clear_plans() {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.clear();
  order.clear();
}

int64_t count_replays() { return replays; }

void set_plain_check(bool (*is_plain)()) { plain_check = is_plain; }

void set_rethrow(void (*function)()) { rethrow = function; }

void register_plans_for_cpu(bool on) {
  using torch::stable::detail::StableLibrary;
  static std::unique_ptr<StableLibrary> library;
  library.reset();
  if (!on) return;
  library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "moelora", "CPU", __FILE__,
                                            __LINE__);
  register_ops(*library);
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CUDA, m) { moelora::register_ops(m); }
