// Softmax, top-k, renormalise: from router logits to routing weights, with its backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gate.h"
#include "ops.h"

namespace moelora {

std::tuple<Tensor, Tensor> topk_gate(Tensor logits, int64_t top_k, bool renormalize,
                                     double temperature) {
  const auto [N, E] = shape<2>(logits, "logits");
  STD_TORCH_CHECK(1 <= top_k && top_k <= E, "top_k: expected 1 to ", E, ", got ", top_k);
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const Tensor from = row_major(cast(logits, dtype));
  Tensor weights = empty(N, top_k, dtype);
  Tensor indices = empty(N, top_k, ScalarType::Int);
  const TopkOptions options{.K = top_k, .renormalize = renormalize, .temperature = temperature};

  for_dtype(dtype, [&, N = N, E = E](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const C* logits_data = from.const_data_ptr<C>();
    C* weights_data = weights.mutable_data_ptr<C>();
    int32_t* indices_data = indices.mutable_data_ptr<int32_t>();
    torch::stable::parallel_for(0, N, grain(32 * E), [&](int64_t begin, int64_t end) {
      TopkScratch<C> scratch(E);
      vectorised([&](auto) {
        for (int64_t t = begin; t < end; ++t) {
          topk_softmax(logits_data + t * E, E, options, scratch, weights_data + t * top_k,
                       indices_data + t * top_k);
        }
      });
    });
  });
  return {weights, indices};
}

Tensor topk_gate_backward(Tensor dweights, Tensor weights, Tensor indices, Tensor logits,
                          bool renormalize, double temperature) {
  const auto [N, E] = shape<2>(logits, "logits");
  const auto [weights_rows, K] = shape<2>(weights, "weights");
  check_size(weights_rows, N, "weights, rows");
  check_size(dweights.numel(), N * K, "dweights");
  check_size(indices.numel(), N * K, "experts");
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const Tensor of_dweights = row_major(cast(dweights, dtype));
  const Tensor of_weights = row_major(cast(weights, dtype));
  const Tensor of_logits = row_major(cast(logits, dtype));
  const Index of_indices(indices, "experts");
  Tensor dlogits = empty(N, E, dtype);
  const TopkOptions options{.K = K, .renormalize = renormalize, .temperature = temperature};

  for_dtype(dtype, [&, N = N, E = E, K = K](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const C* dweights_data = of_dweights.const_data_ptr<C>();
    const C* weights_data = of_weights.const_data_ptr<C>();
    const C* logits_data = of_logits.const_data_ptr<C>();
    C* dlogits_data = dlogits.mutable_data_ptr<C>();
    torch::stable::parallel_for(0, N, grain(32 * E), [&](int64_t begin, int64_t end) {
      TopkScratch<C> scratch(E);
      for (int64_t t = begin; t < end; ++t) {
        topk_softmax_backward(
            dweights_data + t * K, weights_data + t * K,
            [&](int64_t k) { return of_indices[t * K + k]; }, logits_data + t * E, E, options,
            scratch, dlogits_data + t * E);
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
