// The op `cluster_shrink` on a GPU: `shrink_gate` for one linear with a router, on sm_90a. It
// checks the arguments, allocates the outputs and launches the kernel of shrink_gate.cuh.
#include "shrink_gate.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "device.h"
#include "tensor_map.h"

namespace moelora {
namespace {

struct Matrices {
  const Tensor& x;
  const Tensor& lora_a;
  const Tensor& router_weight;
};

template <int R, int E8>
void launch(const Matrices& matrices, const ShrinkArguments& arguments, cudaStream_t stream) {
  constexpr int BYTES = ShrinkMemory<R, E8>::BYTES;
  constexpr auto BFLOAT16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto kernel = shrink_gate_kernel<R, E8>;
  // More than 48 KiB need permission, on every device.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  STD_TORCH_CHECK(error == cudaSuccess, "cluster_shrink: ", cudaGetErrorString(error));
  constexpr int64_t TOKENS = int64_t{SHRINK_TOKENS} * SHRINK_CLUSTER;
  const auto clusters = static_cast<unsigned>((arguments.T + TOKENS - 1) / TOKENS);
  kernel<<<clusters * SHRINK_CLUSTER, SHRINK_THREADS, BYTES, stream>>>(
      tensor_map(matrices.x, BFLOAT16, SHRINK_TOKENS),
      tensor_map(matrices.lora_a, BFLOAT16, R / SHRINK_CLUSTER),
      tensor_map(matrices.router_weight, BFLOAT16, E8), arguments);
  check_launch("cluster_shrink");
}

// Checks that the GPU of x has code of the kernel. Elsewhere the kernel is empty.
void check_architecture(const Tensor& x) {
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "cluster_shrink: ", cudaGetErrorString(error));
  STD_TORCH_CHECK(major == 9, "cluster_shrink: expected a GPU of compute capability 9.0, got ",
                  major, ".x");
}

// Checks that a tensor is on the device of x.
void check_device(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                  ": expected a tensor on the device of x");
}

// Checks a matrix [rows, columns] in bfloat16 that a tensor map can describe.
void check_matrix(const Tensor& matrix, int64_t rows, int64_t columns, const char* name) {
  const auto [actual_rows, actual_columns] = shape<2>(matrix, name);
  check_size(actual_rows, rows, name);
  check_size(actual_columns, columns, name);
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::BFloat16, name, ": expected bfloat16, got ",
                  matrix.scalar_type());
  const auto address = reinterpret_cast<uintptr_t>(matrix.const_data_ptr());
  STD_TORCH_CHECK(matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && address % 16 == 0, name,
                  ": expected rows at multiples of 16 bytes");
}

// Returns h, u, weights, experts and logits: see `shrink_gate` in ops/shrink_gate.py. router_bias
// [E] is float32, or has no element.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cluster_shrink(
    Tensor x, Tensor lora_a, Tensor router_weight, Tensor router_bias, std::vector<int64_t> ranks,
    std::vector<double> scaling, int64_t top_k, bool renormalize, double temperature) {
  const auto [T, I] = shape<2>(x, "x");
  const auto E = static_cast<int64_t>(ranks.size());
  STD_TORCH_CHECK(E > 0 && E <= SHRINK_EXPERTS, "ranks: expected 1 to ", SHRINK_EXPERTS,
                  " experts, got ", E);
  STD_TORCH_CHECK(top_k > 0 && top_k <= E, "top_k: expected 1 to ", E, ", got ", top_k);
  check_size(static_cast<int64_t>(scaling.size()), E, "scaling");
  ShrinkArguments arguments{
      .T = T,
      .steps = static_cast<int>((I + SHRINK_STEP - 1) / SHRINK_STEP),
      .E = static_cast<int>(E),
      .K = static_cast<int>(top_k),
      .renormalize = renormalize,
      .temperature = static_cast<float>(temperature),
  };
  int64_t R = 0;
  for (int64_t e = 0; e < E; ++e) {
    R += ranks[e];
    arguments.scaling[e] = static_cast<float>(scaling[e]);
    arguments.end[e] = static_cast<int>(R);
  }
  STD_TORCH_CHECK(R == 64 || R == 128, "ranks: expected a sum of 64 or 128, got ", R);
  check_matrix(x, T, I, "x");
  check_matrix(lora_a, R, I, "lora_a");
  check_matrix(router_weight, E, I, "router_weight");
  check_device(lora_a, x, "lora_a");
  check_device(router_weight, x, "router_weight");
  if (router_bias.numel() > 0) {
    check_size(router_bias.numel(), E, "router_bias");
    check_device(router_bias, x, "router_bias");
    STD_TORCH_CHECK(router_bias.scalar_type() == ScalarType::Float && router_bias.is_contiguous(),
                    "router_bias: expected contiguous float32, got ", router_bias.scalar_type());
    arguments.bias = router_bias.const_data_ptr<float>();
  }

  const Device device(x);
  check_architecture(x);
  const Tensor h = empty_on(x, {T, R}, ScalarType::BFloat16);
  const Tensor u = empty_on(x, {T, R}, ScalarType::BFloat16);
  const Tensor weights = empty_on(x, {T, top_k}, ScalarType::Float);
  const Tensor experts =
      top_k < E ? empty_on(x, {T, top_k}, ScalarType::Int) : empty_on(x, {0}, ScalarType::Int);
  const Tensor logits = empty_on(x, {T, E}, ScalarType::Float);
  arguments.h = static_cast<__nv_bfloat16*>(h.mutable_data_ptr());
  arguments.u = static_cast<__nv_bfloat16*>(u.mutable_data_ptr());
  arguments.weights = weights.mutable_data_ptr<float>();
  arguments.experts = top_k < E ? experts.mutable_data_ptr<int>() : nullptr;
  arguments.logits = logits.mutable_data_ptr<float>();
  if (T > 0) {
    const Matrices matrices{x, lora_a, router_weight};
    if (R == 128 && E <= 8) launch<128, 8>(matrices, arguments, device.stream());
    if (R == 128 && E > 8) launch<128, 16>(matrices, arguments, device.stream());
    if (R == 64 && E <= 8) launch<64, 8>(matrices, arguments, device.stream());
    if (R == 64 && E > 8) launch<64, 16>(matrices, arguments, device.stream());
  }
  return {h, u, weights, experts, logits};
}

}  // namespace

}  // namespace moelora

// Without code for sm_90a there is no implementation, and the package takes the Triton kernel.
#if defined(MOELORA_SM_90A)
STABLE_TORCH_LIBRARY_IMPL(moelora, CUDA, m) {
  m.impl("cluster_shrink", TORCH_BOX(&moelora::cluster_shrink));
}
#endif
