// The Python module `_C`: build information, for bug reports. The ops register themselves with the
// dispatcher when the library is loaded (STABLE_TORCH_LIBRARY_IMPL in the file of each op).
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/simd.h"
#include "cuda/architectures.h"
#include "plan/cache.h"

#if !defined(TORCH_TARGET_VERSION)
#error "build with -DTORCH_TARGET_VERSION: then one library works with several torch releases"
#endif

namespace {

constexpr uint64_t ABI_TARGET = TORCH_TARGET_VERSION;

}  // namespace

// The pybind11 that torch 2.11 bundles refuses this macro. This file uses no function of torch
// through pybind11, so the macro does not matter.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

namespace {

std::string abi_target() {
  return std::to_string(ABI_TARGET >> 56) + "." + std::to_string((ABI_TARGET >> 48) & 0xFF);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["abi_target"] = abi_target();
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
#if MOELORA_X86
  info["simd"] = pybind11::make_tuple("portable", "avx2", "avx512", "avx512bf16");
#else
  info["simd"] = pybind11::make_tuple("portable");
#endif
  info["simd_chosen"] = moelora::simd_level_name(moelora::simd_level());
  info["ops"] = pybind11::make_tuple(
      "dropout", "ffn_inner", "ffn_inner_backward", "weight_grad", "grouped", "grouped_backward",
      "grouped_dx", "grouped_expand", "grouped_weight_grad", "grouped_shrink",
      "grouped_shrink_backward", "route", "router_grad", "router_logits", "shrink_dx",
      "shrink_gate", "shrink_gate_backward", "topk_gate", "topk_gate_backward", "wide",
      "wide_backward");
  // The ops on CUDA tensors, and the GPUs that they are compiled for. Both are empty without
  // csrc/cuda.
  info["cuda_ops"] = pybind11::make_tuple();
  pybind11::list gpus;
#if defined(MOELORA_CUDA)
#if defined(MOELORA_SM_90A)
  info["cuda_ops"] = pybind11::make_tuple("cluster_shrink", "route");
#else
  info["cuda_ops"] = pybind11::make_tuple("route");
#endif
  for (int architecture : moelora::architectures()) {
    gpus.append("sm_" + std::to_string(architecture / 10));
  }
#endif
  info["cuda"] = pybind11::tuple(gpus);
  // The layer ops whose plans the library replays.
  info["planned_ops"] =
      pybind11::make_tuple("grouped", "grouped_backward", "wide", "wide_backward");
  return info;
}

void set_cpu_launch(uintptr_t address) {
  moelora::set_cpu_launch(reinterpret_cast<moelora::LaunchKernel>(address));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of moelora_kernels; loading the module registers them.";
  m.def("build_info", &build_info, "Return the versions, ops and vector level of this library.");
  m.def("clear_plans", &moelora::clear_plans, "Forget all plans.");
  m.def("count_replays", &moelora::count_replays, "Return how many calls were replayed.");
  m.def("replay_failures", &moelora::replay_failures,
        "Return how many replays failed, and why the last of them failed.");
  m.def("set_cpu_launch", &set_cpu_launch,
        "Set the address of the function that launches kernels for CPU tensors; for tests.");
}
