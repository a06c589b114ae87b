// The gradients of the parameters: products that sum over the tokens.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "router.h"
#include "simd.h"

namespace moelora {
namespace {

// dA = dh^T dropout(x) in the product dtype, [n R, I].
Tensor weight_grad_a(const Tensor& x, const Tensor& dh, const Blocks& blocks, int64_t siblings,
                     double p, bool per_expert, const std::optional<Tensor>& seed) {
  const ScalarType dtype = product_dtype(x.scalar_type());
  const Tensor left = transposed(cast(dh, dtype));
  if (p == 0.0) return mm(left, cast(x, dtype));
  if (!per_expert) return mm(left, cast(dropout(x, p, *seed, 0), dtype));
  check_size(dh.size(1), siblings * blocks.total, "dh, ranks");
  const Tensor da = empty(dh.size(1), x.size(1), dtype);
  for (int64_t e = 0; e < blocks.experts(); ++e) {
    const Tensor dropped = cast(dropout(x, p, *seed, e), dtype);
    for (int64_t i = 0; i < siblings; ++i) {
      const int64_t first = i * blocks.total + blocks.begin[e];
      mm_out(rows(da, first, blocks.ranks[e]), rows(left, first, blocks.ranks[e]), dropped);
    }
  }
  return da;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> weight_grad(
    Tensor x, Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> dy, Tensor u,
    std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
    std::optional<Tensor> seed, ScalarType lora_dtype, ScalarType router_dtype) {
  check_floating(x, "x");
  const auto [T, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(dy.size());
  STD_TORCH_CHECK(siblings > 0, "dy: expected one per sibling, got none");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "seed: needed for dropout");
  check_size(dh.size(0), T, "dh, tokens");
  const auto [u_tokens, u_columns] = shape<2>(u, "u");
  check_size(u_tokens, T, "u, tokens");
  check_size(u_columns, siblings * blocks.total, "u, ranks");
  const ScalarType dtype = product_dtype(x.scalar_type());
  x = row_major(x);

  const Tensor da =
      cast(weight_grad_a(x, dh, blocks, siblings, dropout_p, dropout_per_expert, seed), lora_dtype);
  Tensor drouter = absent(router_dtype);
  Tensor dbias = absent(router_dtype);
  if (dlogits) {
    const Tensor wide = row_major(cast(*dlogits, compute_dtype(x.scalar_type())));
    drouter = cast(router_weight_grad(wide, x), router_dtype);
    const Tensor sums = cast(sum_over_tokens(wide), router_dtype);
    dbias = torch::stable::select(sums, 0, 0);
  }
  std::vector<Tensor> db;
  const Tensor gated = cast(u, dtype);
  for (int64_t i = 0; i < siblings; ++i) {
    check_size(dy[i].size(0), T, "dy, tokens");
    const Tensor left = transposed(product_operand(dy[i], x.scalar_type()));
    const Tensor right = siblings == 1 ? gated : columns(gated, i * blocks.total, blocks.total);
    db.push_back(cast(mm(left, right), lora_dtype));
  }
  return {da, drouter, dbias, db};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("weight_grad", TORCH_BOX(&moelora::weight_grad));
}
