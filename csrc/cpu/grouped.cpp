// The ops `grouped` and `grouped_backward`: a whole layer of n siblings in the grouped form, and
// all its gradients. They call the other grouped ops, and ATen for the base products. The base
// product comes first, and the experts add to y in place.
#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "gate.h"
#include "ops.h"
#include "route.h"

namespace moelora {
namespace {

// The same as in moelora_kernels/types.py. On a CPU no op reads tiles and chunks; they are
// returned.
constexpr int64_t TILE = 64;
constexpr int64_t CHUNK = 1024;

// Returns a view of a contiguous matrix with other sizes.
Tensor reshaped(const Tensor& matrix, int64_t num_rows, int64_t num_columns) {
  return view(matrix, {num_rows, num_columns}, {std::max<int64_t>(num_columns, 1), 1}, 0);
}

// Returns the entries of dlogits [T n, E] at experts [T n, K]: [T n, K].
Tensor gather_dlogits(const Tensor& dlogits, const Tensor& experts) {
  const auto [rows, K] = shape<2>(experts, "experts");
  const int64_t E = dlogits.size(1);
  const Tensor slot_dlogits = empty(rows, K, dlogits.scalar_type());
  for_dtype(dlogits.scalar_type(), [&, rows = rows, K = K](auto type) {
    using C = typename decltype(type)::type;
    const C* dlogits_data = dlogits.const_data_ptr<C>();
    const int32_t* experts_data = experts.const_data_ptr<int32_t>();
    C* slots_data = slot_dlogits.mutable_data_ptr<C>();
    for (int64_t n = 0; n < rows * K; ++n) {
      slots_data[n] = dlogits_data[n / K * E + experts_data[n]];
    }
  });
  return slot_dlogits;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
grouped(Tensor x, std::vector<Tensor> base_weight, std::vector<Tensor> base_bias,
        std::vector<Tensor> base_output, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
        std::vector<Tensor> router_weight, std::vector<Tensor> router_bias,
        std::optional<Tensor> gate_weights, std::optional<Tensor> experts,
        std::optional<Tensor> /*rows*/, std::optional<Tensor> /*logits*/,
        std::vector<int64_t> ranks, std::vector<double> scaling, bool /*share_a*/, int64_t top_k,
        bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
        std::optional<Tensor> seed) {
  // Check the arguments.
  const auto siblings = int64_t(lora_a.size());
  const auto E = int64_t(ranks.size());
  const auto [T, I] = shape<2>(x, "x");
  const ScalarType dtype = x.scalar_type();
  const ScalarType sum_dtype = compute_dtype(dtype);
  check_siblings(siblings, lora_b, base_weight, base_bias, base_output);

  // The base product x Wt + b of every sibling.
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < base_weight.size(); ++i) {
    const Tensor y = empty(T, base_weight[i].size(0), dtype);
    if (base_bias.empty()) {
      mm_out(y, x, transposed(base_weight[i]));
    } else {
      addmm_out(y, base_bias[i], x, transposed(base_weight[i]));
    }
    outputs.push_back(y);
  }

  // The gate of the routers; empty tensors without routers.
  Tensor logits = absent(sum_dtype), weights = absent(sum_dtype);
  Tensor top_experts = absent(ScalarType::Int);
  if (!router_weight.empty()) {
    logits = router_logits(x, router_weight, router_bias);
    std::tie(weights, top_experts) =
        topk_gate(reshaped(logits, T * siblings, E), top_k, renormalize, temperature);
    gate_weights = weights = reshaped(weights, T, siblings * top_k);
    experts = top_experts = reshaped(top_experts, T, siblings * top_k);
  }
  STD_TORCH_CHECK(gate_weights && experts,
                  "gate_weights, experts: expected tensors if there is no router, got none");

  // Sort the pairs by expert, shrink, and add the experts to y.
  const auto [order, offsets, tiles, chunks] = route(*experts, E, siblings, TILE, CHUNK);
  const auto [h, u] = grouped_shrink(x, lora_a, gate_weights, order, offsets, tiles, chunks, ranks,
                                     scaling, dropout_p, dropout_per_expert, seed);
  for (int64_t i = 0; i < siblings; ++i) {
    if (base_output.empty()) {
      grouped_expand_in_place(outputs[i], {.u = u,
                                           .matrices = {lora_b[i]},
                                           .order = order,
                                           .offsets = offsets,
                                           .ranks = ranks,
                                           .first_sibling = i});
    } else {
      outputs.push_back(grouped_expand(u, {lora_b[i]}, base_output[i], order, offsets, tiles,
                                       chunks, ranks, 0.0, false, std::nullopt, T, i, false));
    }
  }
  return {outputs, h, weights, top_experts, logits, order, offsets, tiles, chunks};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> grouped_backward(
    std::vector<Tensor> dy, Tensor x, std::vector<Tensor> base_weight,
    std::vector<Tensor> /*base_bias*/, std::vector<Tensor> /*base_output*/,
    std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<Tensor> router_weight,
    std::vector<Tensor> /*router_bias*/, Tensor h, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> /*rows*/, std::optional<Tensor> logits,
    std::optional<Tensor> dlogits, Tensor order, Tensor offsets, Tensor tiles, Tensor chunks,
    std::vector<int64_t> ranks, std::vector<double> scaling, bool /*share_a*/, int64_t top_k,
    bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed, bool needs_x, bool needs_adapters, std::vector<int64_t> frozen) {
  // Check the arguments.
  STD_TORCH_CHECK(gate_weights && experts, "gate_weights, experts: expected tensors, got none");
  const ScalarType dtype = x.scalar_type();
  const ScalarType router_dtype = router_weight.empty() ? dtype : router_weight[0].scalar_type();
  const auto siblings = int64_t(dy.size());
  const auto E = int64_t(ranks.size());
  const int64_t T = x.size(0);
  check_count(base_weight, siblings, "base_weight, siblings");
  // Three products read dy, so it is converted once.
  for (Tensor& dy_i : dy) dy_i = dense_rows(dy_i, dtype);

  // The base part of dx.
  Tensor dx = absent(dtype);
  if (needs_x && !base_weight.empty()) {
    dx = empty(T, x.size(1), dtype);
    mm_out(dx, dy[0], base_weight[0]);
    for (int64_t i = 1; i < siblings; ++i) addmm_out(dx, dx, dy[i], base_weight[i]);
  }

  // The rank space of every pair, and the gradient of the gate's weights.
  auto [dh, u, dgate] = grouped_shrink_backward(dy, lora_b, h, gate_weights, order, offsets, tiles,
                                                chunks, ranks, scaling);

  // The gradient of the logits: router_dlogits [T, n E]. If all entries are zero except those of
  // the routed experts, slot_dlogits [T n, K] holds these, and dWr and dx read them instead.
  std::optional<Tensor> router_dlogits, slot_dlogits;
  if (!router_weight.empty()) {
    // With renormalize, only the shape of the logits is read.
    const Tensor logits_rows = renormalize ? empty(T * siblings, E, dgate.scalar_type())
                                           : reshaped(row_major(*logits), T * siblings, E);
    dgate = topk_gate_backward(
        reshaped(dgate, T * siblings, top_k), reshaped(*gate_weights, T * siblings, top_k),
        reshaped(*experts, T * siblings, top_k), logits_rows, renormalize, temperature);
    if (renormalize && !dlogits) {
      slot_dlogits = gather_dlogits(dgate, reshaped(*experts, T * siblings, top_k));
    }
    dgate = reshaped(dgate, T, siblings * E);
    if (dlogits) {
      // Add the gradient that reaches the logits on another way.
      const Tensor dense_dlogits = row_major(cast(*dlogits, dgate.scalar_type()));
      check_size(dense_dlogits.numel(), dgate.numel(), "dlogits");
      for_dtype(dgate.scalar_type(), [&](auto type) {
        using C = typename decltype(type)::type;
        C* dgate_data = dgate.mutable_data_ptr<C>();
        const C* dlogits_data = dense_dlogits.const_data_ptr<C>();
        for (int64_t n = 0; n < dgate.numel(); ++n) dgate_data[n] += dlogits_data[n];
      });
    }
    router_dlogits = dgate;
    for (Tensor& weight : router_weight) weight = cast(weight, dtype);
  }

  // dx += dropout(dh A) + dlogits Wr.
  std::vector<Tensor> transposed_a;
  for (const Tensor& a : lora_a) transposed_a.push_back(transposed(a));
  if (needs_x && !base_weight.empty()) {
    std::optional<Tensor> router;
    if (router_dlogits) router = stacked(router_weight, false);
    if (router_dlogits && !slot_dlogits) addmm_out(dx, dx, cast(*router_dlogits, dtype), *router);
    grouped_expand_in_place(dx, {.u = dh,
                                 .matrices = transposed_a,
                                 .order = order,
                                 .offsets = offsets,
                                 .ranks = ranks,
                                 .dropout_p = dropout_p,
                                 .dropout_per_expert = dropout_per_expert,
                                 .seed = seed,
                                 .coefficients = slot_dlogits,
                                 .expert_rows = slot_dlogits ? router : std::nullopt});
  } else if (needs_x) {
    dx = grouped_dx(dh, router_dlogits, lora_a, router_weight, order, offsets, tiles, chunks, ranks,
                    dropout_p, dropout_per_expert, seed, T, slot_dlogits.has_value());
  }

  // The gradients of A, B and the routers.
  const ScalarType lora_dtype = lora_a[0].scalar_type();
  Tensor da = absent(lora_dtype), drouter = absent(router_dtype), dbias = absent(router_dtype);
  std::vector<Tensor> db;
  if (needs_adapters) {
    std::tie(da, db) = grouped_weight_grad(x, dh, dy, u, order, offsets, tiles, chunks, ranks,
                                           dropout_p, dropout_per_expert, seed, lora_dtype, frozen);
    if (slot_dlogits) {
      std::tie(drouter, dbias) =
          grouped_router_grad(*slot_dlogits, x, order, offsets, router_dtype);
    } else if (router_dlogits) {
      std::tie(drouter, dbias) = router_grad(*router_dlogits, x, router_dtype);
    }
  }
  return {dx, dgate, da, drouter, dbias, db};
}

}  // namespace
}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped", TORCH_BOX(&moelora::grouped));
  m.impl("grouped_backward", TORCH_BOX(&moelora::grouped_backward));
}
