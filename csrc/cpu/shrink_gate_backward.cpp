// P = dy B, and from it in one pass dh, u and the gradient of the gate or of the router's logits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate.h"
#include "ops.h"

namespace moelora {
namespace {

// One token and sibling: dh [width] and u [R] from P [R], h [width] and the scaled gate [E].
template <class S, class P, class C>
MOELORA_INLINE void backward_row(const P* product, const S* h, const C* scaled,
                                 const Blocks& blocks, bool share_a, C* shared, S* dh, S* u) {
  const int64_t E = blocks.experts();
  if (share_a) std::fill_n(shared, blocks.ranks[0], C{0});
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = blocks.begin[e];
    const int64_t rank = blocks.ranks[e];
    const S* of_h = h + (share_a ? 0 : first);
    const P* of_product = product + first;
    S* to = u + first;
    const C factor = scaled[e];
#pragma omp simd
    for (int64_t j = 0; j < rank; ++j) {
      to[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(of_h[j])));
    }
    if (share_a) {
#pragma omp simd
      for (int64_t j = 0; j < rank; ++j) {
        shared[j] += factor == 0 ? C{0} : factor * C(widen(of_product[j]));
      }
    } else {
      S* to_dh = dh + first;
#pragma omp simd
      for (int64_t j = 0; j < rank; ++j) {
        to_dh[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(of_product[j])));
      }
    }
  }
  if (share_a) {
    for (int64_t j = 0; j < blocks.ranks[0]; ++j) dh[j] = narrow<S>(shared[j]);
  }
}

// <P, h> over the ranks of one expert.
template <class S, class P, class C>
MOELORA_INLINE C inner(const P* product, const S* h, int64_t rank) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < rank; ++j) sum += C(widen(product[j])) * C(widen(h[j]));
  return sum;
}

// dgate summed over the tokens of each gate row, in the order of the tokens: [G, width].
template <class C>
void reduce_rows(const C* dgate, const Gate<C>& gate, int64_t T, int64_t width, C* out) {
  const int64_t G = gate.gate_rows();
  // A thread owns rows of the result and looks at every token, so the order never depends on them.
  const int64_t rows_per_thread = std::max<int64_t>(1, G / 64);
  torch::stable::parallel_for(0, G, rows_per_thread, [&](int64_t begin, int64_t end) {
    std::fill(out + begin * width, out + end * width, C{0});
    for (int64_t t = 0; t < T; ++t) {
      const int64_t row = gate.row_of(t);
      if (row < begin || row >= end) continue;
      for (int64_t e = 0; e < width; ++e) out[row * width + e] += dgate[t * width + e];
    }
  });
}

template <class S, class P, class C>
struct BackwardRows {
  const Gate<C>& gate;
  const Blocks& blocks;
  const C* scaling;
  TopkOptions options;
  bool share_a;
  int64_t siblings;
  int64_t width;
  std::vector<const P*> products;
  const S* h;
  const C* logits;
  const C* dlogits;
  S* dh;
  S* u;
  C* dgate;

  MOELORA_INLINE C gradient(const P* product, const S* of_h, int64_t e) const {
    const int64_t first = blocks.begin[e];
    return scaling[e] *
           inner<S, P, C>(product + first, of_h + (share_a ? 0 : first), blocks.ranks[e]);
  }

  // `scaled` and `dweights` hold E numbers, `shared` as many as the largest rank.
  MOELORA_INLINE void operator()(int64_t begin, int64_t end, C* scaled, C* dweights, C* shared,
                                 TopkScratch<C>& scratch) const {
    const int64_t E = blocks.experts();
    const int64_t R = blocks.total;
    const int64_t slots = gate.sparse() ? gate.slots() : E;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < siblings; ++i) {
        const int64_t n = t * siblings + i;
        const P* product = products[i] + t * R;
        const S* of_h = h + n * width;
        gate.load_scaled(t, i, scaling, scaled);
        backward_row(product, of_h, scaled, blocks, share_a, shared, dh + n * width, u + n * R);
        C* of_slots = options.K > 0 ? dweights : dgate + n * slots;
        if (gate.sparse()) {
          for (int64_t k = 0; k < slots; ++k) {
            const int64_t expert = gate.expert_of(n * slots + k);
            const bool routed = expert >= 0 && expert < E;
            of_slots[k] = routed ? gradient(product, of_h, expert) : C{0};
          }
        } else {
          for (int64_t e = 0; e < E; ++e) of_slots[e] = gradient(product, of_h, e);
        }
        if (options.K == 0) continue;
        C* of_logits = dgate + n * E;
        topk_softmax_backward(
            dweights, gate.values() + n * slots,
            [&](int64_t k) { return gate.sparse() ? gate.expert_of(n * slots + k) : k; },
            logits + n * E, E, options, scratch, of_logits);
        if (dlogits == nullptr) continue;
        for (int64_t e = 0; e < E; ++e) of_logits[e] += dlogits[n * E + e];
      }
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> shrink_gate_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h,
    std::optional<Tensor> gate_weights, std::optional<Tensor> experts, std::optional<Tensor> rows,
    std::optional<Tensor> logits, std::optional<Tensor> dlogits, std::vector<int64_t> ranks,
    std::vector<double> scaling, bool share_a, int64_t top_k, bool renormalize,
    double temperature) {
  STD_TORCH_CHECK(gate_weights.has_value(), "gate_weights: needed in backward");
  check_floating(h, "h");
  const auto [T, h_columns] = shape<2>(h, "h");
  const Blocks blocks(ranks);
  const int64_t E = blocks.experts();
  const auto siblings = int64_t(dy.size());
  STD_TORCH_CHECK(siblings > 0, "dy: expected one per sibling, got none");
  check_size(int64_t(lora_b.size()), siblings, "lora_b, siblings");
  check_size(int64_t(scaling.size()), E, "scaling");
  if (share_a) blocks.check_shared();
  const int64_t width = share_a ? blocks.ranks[0] : blocks.total;
  check_size(h_columns, siblings * width, "h, ranks");
  const ScalarType dtype = h.scalar_type();
  const ScalarType sums = compute_dtype(dtype);
  h = row_major(h);

  std::vector<Tensor> products;
  for (int64_t i = 0; i < siblings; ++i) {
    const auto [O, rank] = shape<2>(lora_b[i], "lora_b");
    const auto [tokens, outputs] = shape<2>(dy[i], "dy");
    check_size(rank, blocks.total, "lora_b, ranks");
    check_size(tokens, T, "dy, tokens");
    check_size(outputs, O, "dy, out_features");
    products.push_back(mm(product_operand(dy[i], dtype), product_operand(lora_b[i], dtype)));
  }
  const auto dense = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return tensor;
    check_size(tensor->numel(), T * siblings * E, name);
    return std::optional<Tensor>(row_major(cast(*tensor, sums)));
  };
  if (top_k > 0) {
    STD_TORCH_CHECK(renormalize || logits.has_value(), "logits: needed without renormalize");
    logits = renormalize ? std::nullopt : dense(logits, "logits");
    dlogits = dense(dlogits, "dlogits");
  }

  Tensor dh = empty(T, siblings * width, dtype);
  Tensor u = empty(T, siblings * blocks.total, dtype);
  Tensor result;
  for_dtype(dtype, [&, T = T](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    using P = std::conditional_t<std::is_same_v<S, Half>, float, S>;
    const Gate<C> gate(*gate_weights, experts, rows, T, siblings, E);
    const int64_t slots = gate.sparse() ? gate.slots() : E;
    if (top_k > 0) {
      check_size(slots, top_k, "gate_weights, experts per token");
      check_size(gate.gate_rows(), T, "gate_weights, tokens");
    }
    const bool reduced = top_k == 0 && !gate.sparse() && (gate.by_row() || gate.gate_rows() == 1);
    Tensor dgate = empty(T, siblings * (top_k > 0 ? E : slots), sums);
    const std::vector<C> factors = to_compute<C>(scaling);
    BackwardRows<S, P, C> backward_rows{
        .gate = gate,
        .blocks = blocks,
        .scaling = factors.data(),
        .options = {.K = top_k, .renormalize = renormalize, .temperature = temperature},
        .share_a = share_a,
        .siblings = siblings,
        .width = width,
        .products = {},
        .h = h.const_data_ptr<S>(),
        .logits = top_k > 0 && logits ? logits->const_data_ptr<C>() : nullptr,
        .dlogits = top_k > 0 && dlogits ? dlogits->const_data_ptr<C>() : nullptr,
        .dh = dh.mutable_data_ptr<S>(),
        .u = u.mutable_data_ptr<S>(),
        .dgate = dgate.mutable_data_ptr<C>()};
    for (const Tensor& product : products) {
      backward_rows.products.push_back(product.const_data_ptr<P>());
    }
    const int64_t work = siblings * (2 * blocks.total + 16 * E);
    torch::stable::parallel_for(0, T, grain(work), [&](int64_t begin, int64_t end) {
      std::vector<C> row(2 * E + *std::max_element(ranks.begin(), ranks.end()));
      TopkScratch<C> scratch(E);
      C* scaled = row.data();
      vectorised(
          [&](auto) { backward_rows(begin, end, scaled, scaled + E, scaled + 2 * E, scratch); });
    });
    result = dgate;
    if (reduced) {
      result = empty(gate.gate_rows(), siblings * E, sums);
      reduce_rows(dgate.const_data_ptr<C>(), gate, T, siblings * E, result.mutable_data_ptr<C>());
    }
  });
  return {dh, u, result};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("shrink_gate_backward", TORCH_BOX(&moelora::shrink_gate_backward));
}
