// The op `shrink_gate`: h = dropout(x) At and u = scale * gate (.) h for n siblings, and the gate
// of their linear routers. ATen computes the products. Threads split the tokens for logits, top-k
// and gate.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "router.h"

namespace moelora {
namespace {

// Rounds the products to h and gates them: n x [T, width] -> h [T, n width], u [T, n R]. `width` is
// R, or r if the experts share A.
template <class S, class P, class C>
struct GateRows {
  const Gate<C>& gate;
  const Blocks& blocks;
  const C* scaling;
  bool share_a;
  int64_t siblings;
  int64_t width;
  // dropout(x) At of every sibling; null if h holds it already.
  std::vector<const P*> products;
  S* h;
  S* u;

  // Computes the tokens [begin, end). scaled_gate [E] is scratch space.
  MOELORA_INLINE void operator()(int64_t begin, int64_t end, C* scaled_gate) const {
    const int64_t E = blocks.num_experts();
    const int64_t R = blocks.total;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < siblings; ++i) {
        gate.load_scaled(t, i, scaling, scaled_gate);
        S* h_row = h + (t * siblings + i) * width;
        if (products[i] != nullptr) {
          const P* product = products[i] + t * width;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) h_row[j] = narrow<S>(C(widen(product[j])));
        }
        S* u_row = u + (t * siblings + i) * R;
        for (int64_t e = 0; e < E; ++e) {
          const int64_t rank = blocks.ranks[e];
          const S* expert_h = h_row + (share_a ? 0 : blocks.begin[e]);
          S* expert_u = u_row + blocks.begin[e];
          const C factor = scaled_gate[e];
          // A factor of zero selects zero, so that it also hides a NaN of h.
#pragma omp simd
          for (int64_t j = 0; j < rank; ++j) {
            expert_u[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(expert_h[j])));
          }
        }
      }
    }
  }
};

// Returns dropout(x) At of every sibling, n x [T, width] in the product dtype.
std::vector<Tensor> shrink_products(const Tensor& x, const std::vector<Tensor>& lora_a,
                                    const Blocks& blocks, double p, bool per_expert,
                                    const std::optional<Tensor>& seed) {
  const ScalarType dtype = product_dtype(x.scalar_type());
  std::vector<Tensor> transposed_a;
  for (const Tensor& a : lora_a) {
    transposed_a.push_back(transposed(cast(cast(a, x.scalar_type()), dtype)));
  }
  std::vector<Tensor> products;
  if (p > 0.0 && per_expert) {
    const int64_t T = x.size(0);
    for (size_t i = 0; i < lora_a.size(); ++i) products.push_back(empty(T, blocks.total, dtype));
    for (int64_t e = 0; e < blocks.num_experts(); ++e) {
      const Tensor dropped = cast(dropout(x, p, *seed, e), dtype);
      for (size_t i = 0; i < lora_a.size(); ++i) {
        mm_out(columns(products[i], blocks.begin[e], blocks.ranks[e]), dropped,
               columns(transposed_a[i], blocks.begin[e], blocks.ranks[e]));
      }
    }
    return products;
  }
  const Tensor dropped = cast(p > 0.0 ? dropout(x, p, *seed, 0) : x, dtype);
  for (const Tensor& at : transposed_a) products.push_back(mm(dropped, at));
  return products;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shrink_gate(
    Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> router_weight,
    std::vector<Tensor> router_bias, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> rows, std::optional<Tensor> /*logits*/,
    std::vector<int64_t> ranks, std::vector<double> scaling, bool share_a, int64_t top_k,
    bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed) {
  // Check the arguments.
  const Blocks blocks(ranks);
  const int64_t width = check_shrink(x, lora_a, blocks, scaling, share_a);
  STD_TORCH_CHECK(
      !(share_a && dropout_per_expert && dropout_p > 0.0),
      "dropout_per_expert: expected False with share_a, got True: experts that share A read "
      "the same x");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(),
                  "seed: expected a seed if dropout is above 0, got none");
  x = row_major(x);
  const int64_t T = x.size(0);
  const int64_t I = x.size(1);
  const int64_t E = blocks.num_experts();
  const auto siblings = int64_t(lora_a.size());
  const ScalarType dtype = x.scalar_type();
  const RouterGate result(router_weight, router_bias, dtype, T, siblings, E, top_k);
  std::optional<Router> router;
  if (router_weight.empty()) {
    STD_TORCH_CHECK(gate_weights.has_value(),
                    "gate_weights: expected a tensor if there is no router, got none");
  } else {
    router.emplace(x, router_weight, router_bias);
  }

  // Shrink.
  const std::vector<Tensor> products =
      shrink_products(x, lora_a, blocks, dropout_p, dropout_per_expert, seed);
  // The product of one sibling is h already if it has x's dtype.
  const bool in_place = siblings == 1 && products[0].scalar_type() == dtype;
  Tensor h = in_place ? products[0] : empty(T, siblings * width, dtype);
  Tensor u = empty(T, siblings * blocks.total, dtype);

  // Make the gate of the routers, and gate h.
  for_dtype(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    using P = std::conditional_t<std::is_same_v<S, Half>, float, S>;
    if (router) {
      gate_weights = result.weights;
      experts = top_k < E ? std::optional<Tensor>(result.experts) : std::nullopt;
      rows = std::nullopt;
    }
    const Gate<C> gate(*gate_weights, experts, rows, T, siblings, E);
    const std::vector<C> scales = to_compute<C>(scaling);
    GateRows<S, P, C> gate_rows{.gate = gate,
                                .blocks = blocks,
                                .scaling = scales.data(),
                                .share_a = share_a,
                                .siblings = siblings,
                                .width = width,
                                .products = {},
                                .h = h.mutable_data_ptr<S>(),
                                .u = u.mutable_data_ptr<S>()};
    for (const Tensor& product : products) {
      gate_rows.products.push_back(in_place ? nullptr : product.const_data_ptr<P>());
    }
    const TopkOptions options{.K = top_k, .renormalize = renormalize, .temperature = temperature};
    const C* logits_data = result.logits.const_data_ptr<C>();
    C* weights_data = result.weights.mutable_data_ptr<C>();
    int32_t* experts_data = result.experts_data();
    const int64_t work = siblings * (blocks.total + 8 * E + (router ? E * (I + 32) : 0));
    torch::stable::parallel_for(0, T, grain(work), [&](int64_t begin, int64_t end) {
      if (router) router->logits(x, begin, end, result.logits);
      std::vector<C> scaled_gate(E);
      vectorised([&](auto) {
        if (router) {
          topk_rows(logits_data, begin * siblings, end * siblings, E, options, weights_data,
                    experts_data);
        }
        gate_rows(begin, end, scaled_gate.data());
      });
    });
  });
  return {h, u, result.weights, result.experts, result.logits};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("shrink_gate", TORCH_BOX(&moelora::shrink_gate));
}
