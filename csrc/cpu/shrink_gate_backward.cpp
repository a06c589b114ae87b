// The op `shrink_gate_backward` for n siblings, with du = dy B:
//     dh = scale * gate (.) du            u = scale * gate (.) h, again, for dB
//     dgate[t, e] = scale * <du, h>       over the ranks of e
// If a linear router made the gate, dlogits follow from dgate. ATen computes du. Threads split the
// tokens, and for sums over the tokens of a gate row they split the gate rows.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate.h"
#include "ops.h"

namespace moelora {
namespace {

// Computes dh [width] and u [R] of one token and sibling from du [R], h [width] and scaled_gate
// [E]. shared_dh [r] is scratch space, and is used only if the experts share A.
template <class S, class P, class C>
MOELORA_INLINE void backward_row(const P* product, const S* h, const C* scaled_gate,
                                 const Blocks& blocks, bool share_a, C* shared_dh, S* dh, S* u) {
  const int64_t E = blocks.num_experts();
  if (share_a) std::fill_n(shared_dh, blocks.ranks[0], C{0});
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = blocks.begin[e];
    const int64_t rank = blocks.ranks[e];
    const S* expert_h = h + (share_a ? 0 : first);
    const P* expert_product = product + first;
    S* expert_u = u + first;
    const C factor = scaled_gate[e];
    // A factor of zero selects zero, so that it also hides a NaN.
#pragma omp simd
    for (int64_t j = 0; j < rank; ++j) {
      expert_u[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(expert_h[j])));
    }
    if (share_a) {
#pragma omp simd
      for (int64_t j = 0; j < rank; ++j) {
        shared_dh[j] += factor == 0 ? C{0} : factor * C(widen(expert_product[j]));
      }
    } else {
      S* expert_dh = dh + first;
#pragma omp simd
      for (int64_t j = 0; j < rank; ++j) {
        expert_dh[j] = narrow<S>(factor == 0 ? C{0} : factor * C(widen(expert_product[j])));
      }
    }
  }
  if (share_a) {
    for (int64_t j = 0; j < blocks.ranks[0]; ++j) dh[j] = narrow<S>(shared_dh[j]);
  }
}

// Returns <du, h> over the ranks of one expert.
template <class S, class P, class C>
MOELORA_INLINE C inner_product(const P* product, const S* h, int64_t rank) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < rank; ++j) sum += C(widen(product[j])) * C(widen(h[j]));
  return sum;
}

// Fills row_sums [G, width] with dgate [T, width], summed over the tokens of each gate row in the
// order of the tokens.
template <class C>
void reduce_rows(const C* dgate, const Gate<C>& gate, int64_t T, int64_t width, C* row_sums) {
  const int64_t G = gate.gate_rows();
  // A thread owns gate rows and reads every token, so the order of a sum does not depend on how
  // many threads there are.
  const int64_t rows_per_thread = std::max<int64_t>(1, G / 64);
  torch::stable::parallel_for(0, G, rows_per_thread, [&](int64_t begin, int64_t end) {
    std::fill(row_sums + begin * width, row_sums + end * width, C{0});
    for (int64_t t = 0; t < T; ++t) {
      const int64_t row = gate.row_of_token(t);
      if (row < begin || row >= end) continue;
      for (int64_t e = 0; e < width; ++e) row_sums[row * width + e] += dgate[t * width + e];
    }
  });
}

// Computes dh, u, and dgate or dlogits of a range of tokens. `width` is R, or r if the experts
// share A.
template <class S, class P, class C>
struct BackwardRows {
  const Gate<C>& gate;
  const Blocks& blocks;
  const C* scaling;
  TopkOptions options;
  bool share_a;
  int64_t siblings;
  int64_t width;
  std::vector<const P*> products;  // n x [T, R]
  const S* h;
  // [T, n E], or null if it is not needed.
  const C* logits;
  // [T, n E], or null if no gradient reaches the logits on another way.
  const C* dlogits;
  S* dh;
  S* u;
  // The gradient of the gate's weights, or of the logits with options.K > 0.
  C* dgate;

  // Returns the gradient of one gate weight: scale * <du, h> over the ranks of expert e.
  MOELORA_INLINE C gate_gradient(const P* product, const S* h_row, int64_t e) const {
    const int64_t first = blocks.begin[e];
    return scaling[e] *
           inner_product<S, P, C>(product + first, h_row + (share_a ? 0 : first), blocks.ranks[e]);
  }

  // Computes the tokens [begin, end). scaled_gate [E], dweights [E] and shared_dh [largest rank]
  // are scratch space.
  MOELORA_INLINE void operator()(int64_t begin, int64_t end, C* scaled_gate, C* dweights,
                                 C* shared_dh, TopkScratch<C>& scratch) const {
    const int64_t E = blocks.num_experts();
    const int64_t R = blocks.total;
    const int64_t slots = gate.is_sparse() ? gate.slots() : E;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < siblings; ++i) {
        const int64_t n = t * siblings + i;
        const P* product = products[i] + t * R;
        const S* h_row = h + n * width;
        gate.load_scaled(t, i, scaling, scaled_gate);
        backward_row(product, h_row, scaled_gate, blocks, share_a, shared_dh, dh + n * width,
                     u + n * R);

        // The gradient of the gate's weights: the result, or an intermediate of dlogits.
        C* dweights_row = options.K > 0 ? dweights : dgate + n * slots;
        if (gate.is_sparse()) {
          for (int64_t k = 0; k < slots; ++k) {
            const int64_t expert = gate.expert(n * slots + k);
            const bool routed = expert >= 0 && expert < E;
            dweights_row[k] = routed ? gate_gradient(product, h_row, expert) : C{0};
          }
        } else {
          for (int64_t e = 0; e < E; ++e) dweights_row[e] = gate_gradient(product, h_row, e);
        }
        if (options.K == 0) continue;

        C* dlogits_row = dgate + n * E;
        topk_softmax_backward(
            dweights, gate.weights() + n * slots,
            [&](int64_t k) { return gate.is_sparse() ? gate.expert(n * slots + k) : k; },
            logits + n * E, E, options, scratch, dlogits_row);
        if (dlogits == nullptr) continue;
        for (int64_t e = 0; e < E; ++e) dlogits_row[e] += dlogits[n * E + e];
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
  // Check the arguments.
  STD_TORCH_CHECK(gate_weights.has_value(), "gate_weights: expected a tensor, got none");
  check_floating(h, "h");
  const auto [T, h_columns] = shape<2>(h, "h");
  const Blocks blocks(ranks);
  const int64_t E = blocks.num_experts();
  const auto siblings = int64_t(dy.size());
  STD_TORCH_CHECK(siblings > 0, "dy: expected a tensor for each sibling, got none");
  check_size(int64_t(lora_b.size()), siblings, "lora_b, siblings");
  check_size(int64_t(scaling.size()), E, "scaling");
  if (share_a) blocks.check_shared();
  const int64_t width = share_a ? blocks.ranks[0] : blocks.total;
  check_size(h_columns, siblings * width, "h, ranks");
  const ScalarType dtype = h.scalar_type();
  const ScalarType sum_dtype = compute_dtype(dtype);
  h = row_major(h);

  // du = dy B of every sibling, [T, R] in the product dtype.
  std::vector<Tensor> products;
  for (int64_t i = 0; i < siblings; ++i) {
    const auto [O, rank] = shape<2>(lora_b[i], "lora_b");
    const auto [tokens, out_features] = shape<2>(dy[i], "dy");
    check_size(rank, blocks.total, "lora_b, ranks");
    check_size(tokens, T, "dy, tokens");
    check_size(out_features, O, "dy, out_features");
    products.push_back(mm(product_operand(dy[i], dtype), product_operand(lora_b[i], dtype)));
  }
  const auto dense_logits = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return tensor;
    check_size(tensor->numel(), T * siblings * E, name);
    return std::optional<Tensor>(row_major(cast(*tensor, sum_dtype)));
  };
  if (top_k > 0) {
    STD_TORCH_CHECK(renormalize || logits.has_value(),
                    "logits: expected a tensor if renormalize is False, got none");
    logits = renormalize ? std::nullopt : dense_logits(logits, "logits");
    dlogits = dense_logits(dlogits, "dlogits");
  }

  Tensor dh = empty(T, siblings * width, dtype);
  Tensor u = empty(T, siblings * blocks.total, dtype);
  Tensor result;  // dgate, or dlogits with top_k > 0
  for_dtype(dtype, [&, T = T](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    using P = std::conditional_t<std::is_same_v<S, Half>, float, S>;
    const Gate<C> gate(*gate_weights, experts, rows, T, siblings, E);
    const int64_t slots = gate.is_sparse() ? gate.slots() : E;
    if (top_k > 0) {
      check_size(slots, top_k, "gate_weights, experts per token");
      check_size(gate.gate_rows(), T, "gate_weights, tokens");
    }
    // Tokens share a gate row: dgate is then summed over them.
    const bool shares_rows =
        top_k == 0 && !gate.is_sparse() && (gate.has_rows() || gate.gate_rows() == 1);
    Tensor dgate = empty(T, siblings * (top_k > 0 ? E : slots), sum_dtype);
    const std::vector<C> scales = to_compute<C>(scaling);
    BackwardRows<S, P, C> backward_rows{
        .gate = gate,
        .blocks = blocks,
        .scaling = scales.data(),
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
      std::vector<C> buffer(2 * E + *std::max_element(ranks.begin(), ranks.end()));
      TopkScratch<C> scratch(E);
      C* scaled_gate = buffer.data();
      vectorised([&](auto) {
        backward_rows(begin, end, scaled_gate, scaled_gate + E, scaled_gate + 2 * E, scratch);
      });
    });
    result = dgate;
    if (shares_rows) {
      result = empty(gate.gate_rows(), siblings * E, sum_dtype);
      reduce_rows(dgate.const_data_ptr<C>(), gate, T, siblings * E, result.mutable_data_ptr<C>());
    }
  });
  return {dh, u, result};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("shrink_gate_backward", TORCH_BOX(&moelora::shrink_gate_backward));
}
