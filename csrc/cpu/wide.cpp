// The ops `wide` and `wide_backward`: a whole layer of n siblings, y_i = x Wt_i + b_i + u_i Bt_i,
// and all its gradients. They call the ops of the wide form, and ATen for the products. With few
// tokens a call from Python to an op costs as much as a skinny product, so a layer is one call.
#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "gate.h"
#include "ops.h"

namespace moelora {
namespace {

// Returns u of sibling i, [T, R], from u [T, n R].
Tensor sibling_columns(const Tensor& u, int64_t i, int64_t siblings) {
  if (siblings == 1) return u;
  const int64_t R = u.size(1) / siblings;
  return columns(u, i * R, R);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor> wide(
    Tensor x, std::vector<Tensor> base_weight, std::vector<Tensor> base_bias,
    std::vector<Tensor> base_output, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
    std::vector<Tensor> router_weight, std::vector<Tensor> router_bias,
    std::optional<Tensor> gate_weights, std::optional<Tensor> experts, std::optional<Tensor> rows,
    std::optional<Tensor> logits, std::vector<int64_t> ranks, std::vector<double> scaling,
    bool share_a, int64_t top_k, bool renormalize, double temperature, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed) {
  const auto siblings = int64_t(lora_a.size());
  check_siblings(siblings, lora_b, base_weight, base_bias, base_output);
  const auto [h, u, router_weights, router_experts, router_logits] = shrink_gate(
      x, lora_a, router_weight, router_bias, gate_weights, experts, rows, logits, ranks, scaling,
      share_a, top_k, renormalize, temperature, dropout_p, dropout_per_expert, seed);

  const int64_t T = x.size(0);
  std::vector<Tensor> outputs;
  for (int64_t i = 0; i < siblings; ++i) {
    const ScalarType dtype = base_output.empty() ? x.scalar_type() : base_output[i].scalar_type();
    const Tensor u_i = cast(sibling_columns(u, i, siblings), dtype);
    const Tensor bt = transposed(cast(lora_b[i], dtype));
    const Tensor y = empty(T, lora_b[i].size(0), dtype);
    if (!base_output.empty()) {
      addmm_out(y, base_output[i], u_i, bt);
    } else {
      // First u Bt + b, then the base product in place. Each writes y once, and both products are
      // rounded together.
      if (base_bias.empty()) {
        mm_out(y, u_i, bt);
      } else {
        addmm_out(y, base_bias[i], u_i, bt);
      }
      addmm_out(y, y, x, transposed(base_weight[i]));
    }
    outputs.push_back(y);
  }
  return {outputs, h, router_weights, router_experts, router_logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> wide_backward(
    std::vector<Tensor> dy, Tensor x, std::vector<Tensor> base_weight,
    std::vector<Tensor> /*base_bias*/, std::vector<Tensor> /*base_output*/,
    std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<Tensor> router_weight,
    std::vector<Tensor> /*router_bias*/, Tensor h, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> rows, std::optional<Tensor> logits,
    std::optional<Tensor> dlogits, std::vector<int64_t> ranks, std::vector<double> scaling,
    bool share_a, int64_t top_k, bool renormalize, double temperature, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, bool needs_x, bool needs_adapters) {
  const ScalarType dtype = x.scalar_type();
  check_count(base_weight, int64_t(dy.size()), "base_weight, siblings");
  // Three products read dy, so it is converted once.
  for (Tensor& dy_i : dy) dy_i = dense_rows(dy_i, dtype);
  const auto [dh, u, dgate] =
      shrink_gate_backward(dy, lora_b, h, gate_weights, experts, rows, logits, dlogits, ranks,
                           scaling, share_a, top_k, renormalize, temperature);
  const std::optional<Tensor> router_dlogits =
      router_weight.empty() ? std::nullopt : std::optional<Tensor>(dgate);

  // dx, with the base products added in place.
  Tensor dx = absent(dtype);
  if (needs_x) {
    dx = shrink_dx(dh, router_dlogits, lora_a, router_weight, ranks, dropout_p, dropout_per_expert,
                   seed);
    for (size_t i = 0; i < base_weight.size(); ++i) addmm_out(dx, dx, dy[i], base_weight[i]);
  }

  // The gradients of A, B and the routers.
  const ScalarType lora_dtype = lora_a[0].scalar_type();
  const ScalarType router_dtype = router_weight.empty() ? dtype : router_weight[0].scalar_type();
  Tensor da = absent(lora_dtype), drouter = absent(router_dtype), dbias = absent(router_dtype);
  std::vector<Tensor> db;
  if (needs_adapters) {
    std::tie(da, drouter, dbias, db) =
        weight_grad(x, dh, router_dlogits, dy, u, ranks, dropout_p, dropout_per_expert, seed,
                    lora_dtype, router_dtype);
  }
  return {dx, dgate, da, drouter, dbias, db};
}

}  // namespace
}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("wide", TORCH_BOX(&moelora::wide));
  m.impl("wide_backward", TORCH_BOX(&moelora::wide_backward));
}
