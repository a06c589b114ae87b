// h = dropout(x) At, the router's logits and gate, and u = scale * gate (.) h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "router.h"

namespace moelora {
namespace {

// Rounds the products of sibling i to h and gates them: raw [T, width] -> h [T, n width], u [T, n
// R].
template <class S, class P, class C>
struct GateRows {
  const Gate<C>& gate;
  const Blocks& blocks;
  const C* scaling;
  bool share_a;
  int64_t siblings;
  int64_t width;
  std::vector<const P*> raw;
  S* h;
  S* u;

  MOELORA_INLINE void operator()(int64_t begin, int64_t end, C* scaled) const {
    const int64_t E = blocks.experts();
    const int64_t R = blocks.total;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < siblings; ++i) {
        gate.load_scaled(t, i, scaling, scaled);
        S* of_h = h + (t * siblings + i) * width;
        if (raw[i] != nullptr) {
          const P* product = raw[i] + t * width;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) of_h[j] = narrow<S>(C(widen(product[j])));
        }
        S* of_u = u + (t * siblings + i) * R;
        for (int64_t e = 0; e < E; ++e) {
          const int64_t rank = blocks.ranks[e];
          const S* from = of_h + (share_a ? 0 : blocks.begin[e]);
          S* to = of_u + blocks.begin[e];
          const C factor = scaled[e];
#pragma omp simd
          for (int64_t j = 0; j < rank; ++j) {
            to[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(from[j])));
          }
        }
      }
    }
  }
};

// The product dropout(x) At of each sibling, [T, width], in the product dtype.
std::vector<Tensor> products(const Tensor& x, const std::vector<Tensor>& lora_a,
                             const Blocks& blocks, double p, bool per_expert,
                             const std::optional<Tensor>& seed) {
  const ScalarType dtype = product_dtype(x.scalar_type());
  std::vector<Tensor> right;
  for (const Tensor& a : lora_a) {
    right.push_back(transposed(cast(cast(a, x.scalar_type()), dtype)));
  }
  std::vector<Tensor> out;
  if (p > 0.0 && per_expert) {
    const int64_t T = x.size(0);
    for (size_t i = 0; i < lora_a.size(); ++i) out.push_back(empty(T, blocks.total, dtype));
    for (int64_t e = 0; e < blocks.experts(); ++e) {
      const Tensor dropped = cast(dropout(x, p, *seed, e), dtype);
      for (size_t i = 0; i < lora_a.size(); ++i) {
        mm_out(columns(out[i], blocks.begin[e], blocks.ranks[e]), dropped,
               columns(right[i], blocks.begin[e], blocks.ranks[e]));
      }
    }
    return out;
  }
  const Tensor left = cast(p > 0.0 ? dropout(x, p, *seed, 0) : x, dtype);
  for (const Tensor& of_sibling : right) out.push_back(mm(left, of_sibling));
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shrink_gate(
    Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> router_weight,
    std::vector<Tensor> router_bias, std::optional<Tensor> gate_weights,
    std::optional<Tensor> experts, std::optional<Tensor> rows, std::optional<Tensor> /*logits*/,
    std::vector<int64_t> ranks, std::vector<double> scaling, bool share_a, int64_t top_k,
    bool renormalize, double temperature, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed) {
  check_floating(x, "x");
  const auto [T, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const int64_t E = blocks.experts();
  const auto siblings = int64_t(lora_a.size());
  STD_TORCH_CHECK(siblings > 0, "lora_a: expected one per sibling, got none");
  check_size(int64_t(scaling.size()), E, "scaling");
  if (share_a) blocks.check_shared();
  STD_TORCH_CHECK(!(share_a && dropout_per_expert && dropout_p > 0.0),
                  "dropout_per_expert: experts that share A share its input");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "seed: needed for dropout");
  const int64_t width = share_a ? blocks.ranks[0] : blocks.total;
  for (const Tensor& a : lora_a) {
    const auto [rank, inputs] = shape<2>(a, "lora_a");
    check_size(rank, width, "lora_a, ranks");
    check_size(inputs, I, "lora_a, in_features");
  }
  x = row_major(x);
  const ScalarType dtype = x.scalar_type();

  Tensor weights = absent(compute_dtype(dtype));
  Tensor logits = absent(compute_dtype(dtype));
  Tensor top_experts = absent(ScalarType::Int);
  std::optional<Router> router;
  if (router_weight.empty()) {
    STD_TORCH_CHECK(gate_weights.has_value(), "gate_weights: needed without a router");
  } else {
    check_size(int64_t(router_weight.size()), siblings, "router_weight, siblings");
    if (!router_bias.empty()) check_size(int64_t(router_bias.size()), siblings, "router_bias");
    check_size(router_weight[0].size(0), E, "router_weight, experts");
    STD_TORCH_CHECK(1 <= top_k && top_k <= E, "top_k: expected 1 to ", E, ", got ", top_k);
    router.emplace(x, router_weight, router_bias);
    logits = empty(T, siblings * E, compute_dtype(dtype));
    weights = empty(T, siblings * top_k, compute_dtype(dtype));
    if (top_k < E) top_experts = empty(T, siblings * top_k, ScalarType::Int);
  }

  const std::vector<Tensor> raw = products(x, lora_a, blocks, dropout_p, dropout_per_expert, seed);
  // One sibling's product in x.dtype is h already.
  const bool in_place = siblings == 1 && raw[0].scalar_type() == dtype;
  Tensor h = in_place ? raw[0] : empty(T, siblings * width, dtype);
  Tensor u = empty(T, siblings * blocks.total, dtype);

  for_dtype(dtype, [&, T = T, I = I](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    using P = std::conditional_t<std::is_same_v<S, Half>, float, S>;
    if (router) {
      gate_weights = weights;
      experts = top_k < E ? std::optional<Tensor>(top_experts) : std::nullopt;
      rows = std::nullopt;
    }
    const Gate<C> gate(*gate_weights, experts, rows, T, siblings, E);
    const std::vector<C> factors = to_compute<C>(scaling);
    GateRows<S, P, C> gate_rows{.gate = gate,
                                .blocks = blocks,
                                .scaling = factors.data(),
                                .share_a = share_a,
                                .siblings = siblings,
                                .width = width,
                                .raw = {},
                                .h = h.mutable_data_ptr<S>(),
                                .u = u.mutable_data_ptr<S>()};
    for (const Tensor& product : raw) {
      gate_rows.raw.push_back(in_place ? nullptr : product.const_data_ptr<P>());
    }
    const TopkOptions options{.K = top_k, .renormalize = renormalize, .temperature = temperature};
    const C* of_logits = logits.const_data_ptr<C>();
    C* to_weights = weights.mutable_data_ptr<C>();
    int32_t* to_indices = top_experts.mutable_data_ptr<int32_t>();
    const int64_t work = siblings * (blocks.total + 8 * E + (router ? E * (I + 32) : 0));
    torch::stable::parallel_for(0, T, grain(work), [&](int64_t begin, int64_t end) {
      if (router) router->logits(x, begin, end, logits);
      std::vector<C> scaled(E);
      std::vector<int32_t> own_order(E);
      TopkScratch<C> scratch(E);
      vectorised([&](auto) {
        if (router) {
          for (int64_t n = begin * siblings; n < end * siblings; ++n) {
            topk_softmax(of_logits + n * E, E, options, scratch, to_weights + n * top_k,
                         top_k < E ? to_indices + n * top_k : own_order.data());
          }
        }
        gate_rows(begin, end, scaled.data());
      });
    });
  });
  return {h, u, weights, top_experts, logits};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("shrink_gate", TORCH_BOX(&moelora::shrink_gate));
}
