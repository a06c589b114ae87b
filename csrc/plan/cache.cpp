// The ops `replay_<op>` and `plan_<op>` of the layer ops. moelora_kernels/plans/native.py defines
// them.
//
// `replay_<op>` takes the arguments of the layer op, and returns its results in one list. The list
// is empty if the call has no plan, or if its replay failed. `plan_<op>` keeps a plan.
#include "cache.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
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

// Held to use the variables up to `failures`.
std::mutex mutex;
// By key; nullptr if a replay of the plan failed.
std::unordered_map<std::string, std::shared_ptr<const Plan>> plans;
std::deque<std::string> order;
std::pair<int64_t, std::string> failures;
std::atomic<int64_t> replays{0};

struct Op {
  const char* name;
  // One letter for each argument: T tensor, O optional tensor, L list of tensors, N list of
  // numbers; a number otherwise.
  const char* arguments;
};

// x, tensors, gate, mixture, dropout.
constexpr Op WIDE{"wide", "TLLLLLLLOOOONNbibffbO"};
constexpr Op GROUPED{"grouped", "TLLLLLLLOOOONNbibffbO"};
// dy, x, tensors, h, gate, dlogits, mixture, dropout, needs.
constexpr Op WIDE_BACKWARD{"wide_backward", "LTLLLLLLLTOOOOONNbibffbObb"};
// The same with the routing before the mixture.
constexpr Op GROUPED_BACKWARD{"grouped_backward", "LTLLLLLLLTOOOOOTTTTNNbibffbObbN"};

// The tensors of a call, which its arguments own, and its key.
struct Call {
  std::vector<AtenTensorHandle> inputs;
  std::vector<uint64_t> addresses;
  std::string key;
  // The device of the first tensor.
  int32_t device_type = 0;
  int32_t device = 0;
  bool one_device = true;

  Call(const Op& op, const StableIValue* stack) {
    key.reserve(1024);
    key.append(op.name);
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
    int32_t type = 0;
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &index));
    if (inputs.empty()) device_type = type, device = index;
    one_device = one_device && type == device_type && index == device;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address));
    const auto bits = reinterpret_cast<uint64_t>(address);
    add(dim);
    add(sizes, dim * sizeof(int64_t));
    add(strides, dim * sizeof(int64_t));
    // Launchers copy a tensor whose address is not a multiple of 16.
    const std::array<int32_t, 4> properties{dtype, type, index, int32_t(bits % 16)};
    add(properties.data(), sizeof(properties));
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
  const auto entry = plans.find(key);
  return entry == plans.end() ? nullptr : entry->second;
}

// Keeps the reason of a failed replay, and drops its plan for good: `keep` refuses the key.
void drop(const Op& op, const std::string& key, const char* reason) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = plans.find(key);
  if (entry != plans.end()) entry->second = nullptr;
  failures = {failures.first + 1, std::string(op.name) + ": " + reason};
}

// Returns the results of a replay. If a step fails, the list is empty: the caller then runs the op
// in Python, which raises torch's exception if it fails too.
std::vector<Handle> replay(const Op& op, const Plan& plan, const Call& call) try {
  std::vector<Handle> results;
  if (call.device_type == aoti_torch_device_type_cpu()) {
    results = plan.replay(call.inputs, call.addresses, false, 0);
  } else {
    const torch::stable::accelerator::DeviceGuard guard(call.device);
    results = plan.replay(call.inputs, call.addresses, true, call.device);
  }
  ++replays;
  return results;
} catch (const AllocationError&) {
  return {};
} catch (const std::exception& error) {
  drop(op, call.key, error.what());
  return {};
}

// Returns a list of tensors for the stack of an op.
StableIValue listed(std::vector<Handle> tensors) {
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(tensors.size(), &list));
  for (Handle& tensor : tensors) {
    const auto element = torch::stable::detail::from(tensor.release());
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, element));
  }
  return torch::stable::detail::from(list);
}

// These functions have the calling convention of StableLibrary::impl.

// Replays a layer op.
template <const Op& op>
void run(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  std::vector<Handle> results;
  {
    const Call call(op, stack);
    if (const auto plan = find(call.key)) results = replay(op, *plan, call);
  }
  free_arguments(op, stack);
  stack[0] = listed(std::move(results));
}

// Replays nothing.
template <const Op& op>
void skip(StableIValue* stack, uint64_t /*inputs*/, uint64_t /*outputs*/) {
  free_arguments(op, stack);
  stack[0] = listed({});
}

// Keeps a plan, unless one with its key failed. The arguments are those of the layer op, then the
// numbers of the plan. A plan allocates on one device, so a call with tensors of several devices
// has none.
template <const Op& op>
void keep(StableIValue* stack, uint64_t inputs, uint64_t /*outputs*/) {
  auto plan = std::make_shared<const Plan>(to<std::vector<int64_t>>(stack[inputs - 1]));
  const Call call(op, stack);
  free_arguments(op, stack);
  if (!call.one_device) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = plans.try_emplace(call.key, plan);
  if (is_new) order.push_back(call.key);
  if (entry->second != nullptr) entry->second = std::move(plan);
  if (order.size() > MAX_PLANS) {
    plans.erase(order.front());
    order.pop_front();
  }
}

template <class Library>
void skip_replays(Library& library) {
  library.impl("replay_wide", &skip<WIDE>);
  library.impl("replay_wide_backward", &skip<WIDE_BACKWARD>);
  library.impl("replay_grouped", &skip<GROUPED>);
  library.impl("replay_grouped_backward", &skip<GROUPED_BACKWARD>);
}

}  // namespace

void clear_plans() {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.clear();
  order.clear();
}

int64_t count_replays() { return replays; }

std::pair<int64_t, std::string> replay_failures() {
  const std::lock_guard<std::mutex> lock(mutex);
  return failures;
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CompositeExplicitAutograd, m) {
  using namespace moelora;
  m.impl("replay_wide", &run<WIDE>);
  m.impl("replay_wide_backward", &run<WIDE_BACKWARD>);
  m.impl("replay_grouped", &run<GROUPED>);
  m.impl("replay_grouped_backward", &run<GROUPED_BACKWARD>);
  m.impl("plan_wide", &keep<WIDE>);
  m.impl("plan_wide_backward", &keep<WIDE_BACKWARD>);
  m.impl("plan_grouped", &keep<GROUPED>);
  m.impl("plan_grouped_backward", &keep<GROUPED_BACKWARD>);
}

// A mode of torch sees the layer op, and a subclass of tensors gets it.
STABLE_TORCH_LIBRARY_IMPL(moelora, Python, m) { moelora::skip_replays(m); }

STABLE_TORCH_LIBRARY_IMPL(moelora, FuncTorchDynamicLayerFrontMode, m) { moelora::skip_replays(m); }

STABLE_TORCH_LIBRARY_IMPL(moelora, Tracer, m) { moelora::skip_replays(m); }
