// The op `weight_grad`: dA = dh^T dropout(x), dB_i = dy_i^T u_i, dWr = dlogits^T x, dbr = sum
// dlogits. All are products that sum over the tokens. ATen computes dA and dB, router.cpp dWr and
// dbr.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "router.h"
#include "simd.h"

namespace moelora {
namespace {

// Returns dA = dh^T dropout(x), [n R, I] in the product dtype.
Tensor weight_grad_a(const Tensor& x, const Tensor& dh, const Blocks& blocks, int64_t siblings,
                     double p, bool per_expert, const std::optional<Tensor>& seed) {
  const ScalarType dtype = product_dtype(x.scalar_type());
  const Tensor dh_t = transposed(cast(dh, dtype));  // [n R, T]
  if (p == 0.0) return mm(dh_t, cast(x, dtype));
  if (!per_expert) return mm(dh_t, cast(dropout(x, p, *seed, 0), dtype));
  check_size(dh.size(1), siblings * blocks.total, "dh, ranks");
  // Every expert has a mask: one product for the rows of each expert and sibling.
  const Tensor da = empty(dh.size(1), x.size(1), dtype);
  for (int64_t e = 0; e < blocks.num_experts(); ++e) {
    const Tensor dropped = cast(dropout(x, p, *seed, e), dtype);
    for (int64_t i = 0; i < siblings; ++i) {
      const int64_t first = i * blocks.total + blocks.begin[e];
      mm_out(rows(da, first, blocks.ranks[e]), rows(dh_t, first, blocks.ranks[e]), dropped);
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
  STD_TORCH_CHECK(siblings > 0, "dy: expected a tensor for each sibling, got none");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(),
                  "seed: expected a seed if dropout is above 0, got none");
  check_size(dh.size(0), T, "dh, tokens");
  const auto [u_tokens, u_columns] = shape<2>(u, "u");
  check_size(u_tokens, T, "u, tokens");
  check_size(u_columns, siblings * blocks.total, "u, ranks");
  const ScalarType dtype = product_dtype(x.scalar_type());
  x = row_major(x);

  // dA.
  const Tensor da =
      cast(weight_grad_a(x, dh, blocks, siblings, dropout_p, dropout_per_expert, seed), lora_dtype);

  // dWr and dbr; empty without a router.
  Tensor drouter = absent(router_dtype);
  Tensor dbias = absent(router_dtype);
  if (dlogits) {
    const Tensor wide_dlogits = row_major(cast(*dlogits, compute_dtype(x.scalar_type())));
    drouter = cast(router_weight_grad(wide_dlogits, x), router_dtype);
    const Tensor bias_row = cast(sum_over_tokens(wide_dlogits), router_dtype);  // [1, n E]
    dbias = torch::stable::select(bias_row, 0, 0);
  }

  // dB of every sibling.
  std::vector<Tensor> db;
  const Tensor u_all = cast(u, dtype);  // [T, n R]
  for (int64_t i = 0; i < siblings; ++i) {
    check_size(dy[i].size(0), T, "dy, tokens");
    const Tensor dy_t = transposed(product_operand(dy[i], x.scalar_type()));
    const Tensor u_i = siblings == 1 ? u_all : columns(u_all, i * blocks.total, blocks.total);
    db.push_back(cast(mm(dy_t, u_i), lora_dtype));
  }
  return {da, drouter, dbias, db};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("weight_grad", TORCH_BOX(&moelora::weight_grad));
}
