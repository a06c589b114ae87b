// Linear routers of n siblings: the logits x Wrt + br, and the gradients of Wr and br. Sums are in
// the compute dtype, whatever dtype x has.
#pragma once

#include <optional>
#include <vector>

#include "aten.h"

namespace moelora {

// The weights and biases of n routers, stacked. N = n E.
struct Router {
  // [N, I] in the compute dtype; in bfloat16 if is_bf16.
  Tensor weight;
  // Whether x and all weights are bfloat16, and the processor multiplies bfloat16 pairs: these
  // products are exact.
  bool is_bf16 = false;
  // [I / 2, N]: `weight` transposed, a pair of columns in each number. Empty if not is_bf16, N is
  // not a multiple of PANEL, I is odd, or x has fewer than PANEL tokens.
  std::vector<uint32_t> bf16_pairs;
  std::optional<Tensor> bias;  // [1, N] in the compute dtype

  // weights n x [E, I]; biases n x [E], or empty. `x` names the compute dtype.
  Router(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases);

  // Fills rows [begin, end) of out [T, N], whose rows are dense, with the logits; x [T, I]
  // row-major. Threads call it for their tokens.
  void logits(const Tensor& x, int64_t begin, int64_t end, const Tensor& out) const;
};

// Returns dWr = dlogits^T x, [N, I] in the compute dtype. The tokens are summed in their order.
Tensor router_weight_grad(const Tensor& dlogits, const Tensor& x);

// Returns dbr, the sum of dlogits [T, N] over the tokens: [1, N] in the compute dtype. The tokens
// are summed in their order and in double, because a long sum in float loses bits.
Tensor sum_over_tokens(const Tensor& dlogits);

}  // namespace moelora
