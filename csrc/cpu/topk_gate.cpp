// The ops `topk_gate` and `topk_gate_backward`: softmax, top-k and renormalisation, from router
// logits [G, E] to weights and experts [G, K]. Threads split the rows; gate.h computes one row.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate.h"
#include "ops.h"

namespace moelora {

std::tuple<Tensor, Tensor> topk_gate(Tensor logits, int64_t top_k, bool renormalize,
                                     double temperature) {
  const auto [G, E] = shape<2>(logits, "logits");
  STD_TORCH_CHECK(1 <= top_k && top_k <= E, "top_k: expected 1 to ", E, ", got ", top_k);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const Tensor dense_logits = row_major(cast(logits, dtype));
  Tensor weights = empty(G, top_k, dtype);
  Tensor experts = empty(G, top_k, ScalarType::Int);
  const TopkOptions options{.K = top_k, .renormalize = renormalize, .temperature = temperature};

  for_dtype(dtype, [&, G = G, E = E](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const C* logits_data = dense_logits.const_data_ptr<C>();
    C* weights_data = weights.mutable_data_ptr<C>();
    int32_t* experts_data = experts.mutable_data_ptr<int32_t>();
    torch::stable::parallel_for(0, G, grain(32 * E), [&](int64_t begin, int64_t end) {
      vectorised([&](auto) {
        topk_rows(logits_data, begin, end, E, options, weights_data, experts_data);
      });
    });
  });
  return {weights, experts};
}

Tensor topk_gate_backward(Tensor dweights, Tensor weights, Tensor experts, Tensor logits,
                          bool renormalize, double temperature) {
  const auto [G, E] = shape<2>(logits, "logits");
  const auto [weights_rows, K] = shape<2>(weights, "weights");
  check_size(weights_rows, G, "weights, rows");
  check_size(dweights.numel(), G * K, "dweights");
  check_size(experts.numel(), G * K, "experts");
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const Tensor dense_dweights = row_major(cast(dweights, dtype));
  const Tensor dense_weights = row_major(cast(weights, dtype));
  const Tensor dense_logits = row_major(cast(logits, dtype));
  const IntegerTensor expert_ids(experts, "experts");
  Tensor dlogits = empty(G, E, dtype);
  const TopkOptions options{.K = K, .renormalize = renormalize, .temperature = temperature};

  for_dtype(dtype, [&, G = G, E = E, K = K](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const C* dweights_data = dense_dweights.const_data_ptr<C>();
    const C* weights_data = dense_weights.const_data_ptr<C>();
    const C* logits_data = dense_logits.const_data_ptr<C>();
    C* dlogits_data = dlogits.mutable_data_ptr<C>();
    torch::stable::parallel_for(0, G, grain(32 * E), [&](int64_t begin, int64_t end) {
      TopkScratch<C> scratch(E);
      for (int64_t row = begin; row < end; ++row) {
        topk_softmax_backward(
            dweights_data + row * K, weights_data + row * K,
            [&](int64_t k) { return expert_ids[row * K + k]; }, logits_data + row * E, E, options,
            scratch, dlogits_data + row * E);
      }
    });
  });
  return dlogits;
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&moelora::topk_gate));
  m.impl("topk_gate_backward", TORCH_BOX(&moelora::topk_gate_backward));
}
