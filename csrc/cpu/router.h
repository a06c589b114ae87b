// The two products of a linear router, in the compute dtype whatever dtype x has.
#pragma once

#include <optional>
#include <vector>

#include "aten.h"

namespace moelora {

// The rows and biases of all siblings' routers, in the compute dtype.
struct Router {
  Tensor weight;  // [N, I], N = n E
  // The same as it was given, where all is bfloat16: its pairs with those of x are exact.
  std::optional<Tensor> pairs;
  // And those transposed, one row of N for each two columns, where N fills vectors.
  std::vector<uint32_t> by_column;
  std::optional<Tensor> bias;  // [1, N]

  // weight n x [E, I]; bias n x [E] or none. The compute dtype is that of `x`.
  Router(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases);

  // logits [T, N] = x Wt + b of the tokens [begin, end); x [T, I] row-major. For use in a thread.
  void logits(const Tensor& x, int64_t begin, int64_t end, const Tensor& to) const;
};

// dlogits^T x, summed over the tokens in their order: [N, I] in the compute dtype.
Tensor router_weight_grad(const Tensor& dlogits, const Tensor& x);

// The sum of dlogits [T, N] over the tokens, in their order and in double: a float would lose bits
// that a long product keeps. [1, N] in the compute dtype.
Tensor sum_over_tokens(const Tensor& dlogits);

}  // namespace moelora
