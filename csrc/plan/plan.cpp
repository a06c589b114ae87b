#include "plan.h"

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <bit>

#include "driver.h"

namespace moelora {
namespace {

// The tensors of one replay, by number.
struct Tensors {
  std::vector<AtenTensorHandle> borrowed;
  std::vector<Handle> owned;
  std::vector<uint64_t> addresses;

  AtenTensorHandle at(int64_t number) const { return borrowed[number]; }

  void set(int64_t number, AtenTensorHandle tensor) {
    owned[number] = Handle(tensor);
    borrowed[number] = tensor;
    void* address = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
    addresses[number] = reinterpret_cast<uint64_t>(address);
  }

  void release(int64_t number) {
    owned[number] = Handle();
    borrowed[number] = nullptr;
  }

  // Returns a new tensor that is the view.
  Handle view(const View& view) const {
    AtenTensorHandle result = nullptr;
    if (view.whole) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(at(view.tensor), &result));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
          at(view.tensor), static_cast<int64_t>(view.sizes.size()), view.sizes.data(),
          view.strides.data(), view.offset, &result));
    }
    return Handle(result);
  }
};

// Returns the float64 with these bits.
double number(int64_t bits) { return std::bit_cast<double>(bits); }

void launch(const Step& step, const Tensors& tensors, const Driver& functions, void* stream) {
  constexpr size_t LIMIT = 128;
  const size_t count = step.parameters.size();
  // A number of 32 bits is in the first bytes of its 64.
  std::array<uint64_t, LIMIT> values;
  std::array<void*, LIMIT> pointers;
  for (size_t i = 0; i < count; ++i) {
    const auto [tensor, value] = step.parameters[i];
    const auto bits = static_cast<uint64_t>(value);
    values[i] = tensor < 0 ? bits : tensors.addresses[tensor] + bits;
    pointers[i] = &values[i];
  }
  const int error = functions.launch(step.function, step.programs, 1, 1, step.threads, 1, 1,
                                     step.shared, stream, pointers.data(), nullptr);
  STD_TORCH_CHECK(error == 0, "plan: cuLaunchKernel failed with error ", error);
}

// Copies the second half of the views to the first half.
void copy_all(const Step& step, const Tensors& tensors) {
  const size_t count = step.views.size() / 2;
  const auto list = [&](size_t start) {
    StableListHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(count, &result));
    for (size_t i = start; i < start + count; ++i) {
      const auto element = torch::stable::detail::from(tensors.view(step.views[i]).release());
      TORCH_ERROR_CODE_CHECK(torch_list_push_back(result, element));
    }
    return torch::stable::detail::from(result);
  };
  constexpr bool NON_BLOCKING = false;
  std::array<StableIValue, 3> stack{list(0), list(count),
                                    torch::stable::detail::from(NON_BLOCKING)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_foreach_copy_", "", stack.data(), TORCH_ABI_VERSION));
}

// Calls an op of the library, whose results are the first numbers on the stack.
template <size_t N>
void call(const char* op, std::array<StableIValue, N>& stack, const Step& step, Tensors& tensors) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    tensors.set(step.tensors[i], torch::stable::detail::to<AtenTensorHandle>(stack[i]));
  }
}

void route(const Step& step, Tensors& tensors) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(tensors.view(step.views[0]).release())};
  for (size_t i = 0; i < 4; ++i) stack[i + 1] = torch::stable::detail::from(step.options[i]);
  call("moelora::route", stack, step, tensors);
}

void cluster_shrink(const Step& step, Tensors& tensors) {
  namespace stable = torch::stable::detail;
  const auto begin = step.options.begin() + 4;
  const int64_t experts = step.options[2];
  std::vector<double> scaling;
  for (int64_t e = 0; e < experts; ++e) scaling.push_back(number(begin[experts + e]));
  std::array<StableIValue, 9> stack;
  for (size_t i = 0; i < 4; ++i) stack[i] = stable::from(tensors.view(step.views[i]).release());
  stack[4] = stable::from(std::vector<int64_t>(begin, begin + experts));
  stack[5] = stable::from(scaling);
  stack[6] = stable::from(step.options[0]);
  stack[7] = stable::from(step.options[1] != 0);
  stack[8] = stable::from(number(step.options[3]));
  call("moelora::cluster_shrink", stack, step, tensors);
}

}  // namespace

View::View(Numbers& numbers)
    : tensor(numbers.next()),
      whole(numbers.next() != 0),
      sizes(numbers.list()),
      strides(numbers.list()),
      offset(numbers.next()) {}

Step::Step(Numbers& numbers) : kind(static_cast<Kind>(numbers.next())) {
  tensors = numbers.list();
  if (kind == Kind::ALLOCATE) {
    sizes = numbers.list();
    strides = numbers.list();
    dtype = static_cast<int32_t>(numbers.next());
  } else if (kind == Kind::LAUNCH) {
    function = reinterpret_cast<void*>(numbers.next());
    programs = static_cast<unsigned>(numbers.next());
    threads = static_cast<unsigned>(numbers.next());
    shared = static_cast<unsigned>(numbers.next());
    const int64_t count = numbers.next();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tensor = numbers.next();
      parameters.push_back({tensor, numbers.next()});
    }
  } else if (kind != Kind::RELEASE) {
    const int64_t count = numbers.next();
    for (int64_t i = 0; i < count; ++i) views.emplace_back(numbers);
    options = numbers.list();
  }
}

Plan::Plan(const std::vector<int64_t>& list) {
  Numbers numbers(list);
  count_ = static_cast<size_t>(numbers.next());
  for (int64_t i = numbers.next(); i > 0; --i) {
    const int64_t number = numbers.next();
    tables_.emplace_back(number, static_cast<uint64_t>(numbers.next()));
  }
  for (int64_t i = numbers.next(); i > 0; --i) steps_.emplace_back(numbers);
  for (int64_t i = numbers.next(); i > 0; --i) outputs_.emplace_back(numbers);
}

std::vector<Handle> Plan::replay(const std::vector<AtenTensorHandle>& inputs,
                                 const std::vector<uint64_t>& addresses, bool cuda,
                                 int32_t device) const {
  const Driver& functions = driver(cuda);
  STD_TORCH_CHECK(functions.launch != nullptr, "plan: expected tensors of a GPU");
  void* stream = cuda ? current_stream(device) : nullptr;
  const int32_t device_type = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  Tensors tensors{inputs, std::vector<Handle>(count_), addresses};
  tensors.borrowed.resize(count_);
  tensors.addresses.resize(count_);
  for (const auto& [number, address] : tables_) tensors.addresses[number] = address;
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::ALLOCATE: {
        AtenTensorHandle tensor = nullptr;
        const AOTITorchError error = aoti_torch_empty_strided(
            static_cast<int64_t>(step.sizes.size()), step.sizes.data(), step.strides.data(),
            step.dtype, device_type, cuda ? device : 0, &tensor);
        if (error != AOTI_TORCH_SUCCESS) throw AllocationError("plan: an allocation failed");
        tensors.set(step.tensors[0], tensor);
        break;
      }
      case Kind::LAUNCH:
        launch(step, tensors, functions, stream);
        break;
      case Kind::MM: {
        const Handle out = tensors.view(step.views[0]);
        const Handle left = tensors.view(step.views[1]);
        const Handle right = tensors.view(step.views[2]);
        TORCH_ERROR_CODE_CHECK(functions.mm_out(out.get(), left.get(), right.get()));
        break;
      }
      case Kind::ADDMM: {
        const Handle out = tensors.view(step.views[0]);
        const Handle start = tensors.view(step.views[1]);
        const Handle left = tensors.view(step.views[2]);
        const Handle right = tensors.view(step.views[3]);
        TORCH_ERROR_CODE_CHECK(
            functions.addmm_out(out.get(), start.get(), left.get(), right.get(), 1.0, 1.0));
        break;
      }
      case Kind::COPY: {
        const Handle out = tensors.view(step.views[0]);
        const Handle source = tensors.view(step.views[1]);
        TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), source.get(), 0));
        break;
      }
      case Kind::COPY_ALL:
        copy_all(step, tensors);
        break;
      case Kind::ROUTE:
        route(step, tensors);
        break;
      case Kind::CLUSTER_SHRINK:
        cluster_shrink(step, tensors);
        break;
      case Kind::RELEASE:
        for (int64_t number : step.tensors) tensors.release(number);
        break;
    }
  }
  std::vector<Handle> results;
  for (const View& view : outputs_) results.push_back(tensors.view(view));
  return results;
}

}  // namespace moelora
