// The two products of a linear router, in the compute dtype whatever dtype x has.
#pragma once

#include "aten.h"

namespace moelora {

// x Wt + b: x [T, I] row-major; weight n x [E, I]; bias n x [E] or none. [T, n E], compute dtype.
Tensor router_logits(const Tensor& x, const std::vector<Tensor>& weight,
                     const std::vector<Tensor>& bias);

// dlogits^T x, summed over the tokens in their order: [N, I] in the compute dtype.
Tensor router_gram(const Tensor& dlogits, const Tensor& x);

}  // namespace moelora
