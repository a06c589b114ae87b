#include "driver.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

namespace moelora {
namespace {

// Returns a function of a shared library. torch has loaded its own libraries already.
template <class Function>
Function symbol(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
  STD_TORCH_CHECK(handle != nullptr, "plan: cannot load ", library);
  void* address = dlsym(handle, name);
  STD_TORCH_CHECK(address != nullptr, "plan: ", library, " has no ", name);
  return reinterpret_cast<Function>(address);
}

template <class Function>
Function cuda_function(const char* name) {
  return symbol<Function>("libcuda.so.1", name);
}

template <class Function>
Function torch_function(const char* name) {
  return symbol<Function>("libtorch_cuda.so", name);
}

Driver& cpu_driver() {
  static Driver functions{nullptr,
                          symbol<MatrixProduct>("libtorch_cpu.so", "aoti_torch_cpu_mm_out"),
                          symbol<MatrixSum>("libtorch_cpu.so", "aoti_torch_cpu_addmm_out")};
  return functions;
}

}  // namespace

const Driver& driver(bool cuda) {
  if (!cuda) return cpu_driver();
  static const Driver functions{cuda_function<LaunchKernel>("cuLaunchKernel"),
                                torch_function<MatrixProduct>("aoti_torch_cuda_mm_out"),
                                torch_function<MatrixSum>("aoti_torch_cuda_addmm_out")};
  return functions;
}

void set_cpu_launch(LaunchKernel launch) { cpu_driver().launch = launch; }

void* current_stream(int32_t device) {
  static const auto get_context = cuda_function<int (*)(void**)>("cuCtxGetCurrent");
  static const auto set_context = cuda_function<int (*)(void*)>("cuCtxSetCurrent");
  static const auto get_device = cuda_function<int (*)(int*, int)>("cuDeviceGet");
  static const auto retain = cuda_function<int (*)(void**, int)>("cuDevicePrimaryCtxRetain");
  static const auto get_stream =
      torch_function<AOTITorchError (*)(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* context = nullptr;
  if (get_context(&context) != 0 || context == nullptr) {
    int ordinal = 0;
    const bool is_current = get_device(&ordinal, device) == 0 && retain(&context, ordinal) == 0 &&
                            set_context(context) == 0;
    STD_TORCH_CHECK(is_current, "plan: device ", device, " has no context");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

}  // namespace moelora
