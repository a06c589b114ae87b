// The rank-space part of dx: dropout(dh A) + dlogits Wr, summed over the siblings.
#include <torch/csrc/stable/library.h>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "simd.h"

namespace moelora {
namespace {

// sum_i left_i right_i, right_i [., I]: one product over everything stacked, unless copying the
// rows of `right` costs more than the passes over the result that it saves.
Tensor sum_of_products(const std::vector<Tensor>& left, const std::vector<Tensor>& right) {
  int64_t total = 0;
  for (const Tensor& part : right) total += part.size(0);
  if (left[0].size(0) >= total) return mm(stacked(left, true), stacked(right, false));
  const Tensor sum = mm(left[0], right[0]);
  for (size_t i = 1; i < left.size(); ++i) addmm_out(sum, sum, left[i], right[i]);
  return sum;
}

// to += from, element by element in the compute dtype.
void add(const Tensor& to, const Tensor& from) {
  for_dtype(to.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    S* sums = to.mutable_data_ptr<S>();
    const S* terms = from.const_data_ptr<S>();
    torch::stable::parallel_for(0, to.numel(), WORK_PER_THREAD, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) sums[j] = narrow<S>(widen(sums[j]) + widen(terms[j]));
    });
  });
}

// sum_e dropout_e(sum_i dh_ie A_ie): every expert has a mask of its own, the same for all siblings.
Tensor dropped_per_expert(const std::vector<Tensor>& dh, const std::vector<Tensor>& lora_a,
                          const Blocks& blocks, ScalarType storage, double p, const Tensor& seed) {
  const ScalarType dtype = compute_dtype(storage);
  std::optional<Tensor> sum;
  for (int64_t e = 0; e < blocks.experts(); ++e) {
    std::vector<Tensor> left, right;
    for (size_t i = 0; i < dh.size(); ++i) {
      left.push_back(columns(dh[i], blocks.begin[e], blocks.ranks[e]));
      right.push_back(rows(lora_a[i], blocks.begin[e], blocks.ranks[e]));
    }
    const Tensor dropped = dropout(cast(sum_of_products(left, right), dtype), p, seed, e);
    if (sum) {
      add(*sum, dropped);
    } else {
      sum = dropped;
    }
  }
  return *sum;
}

}  // namespace

Tensor shrink_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                 std::vector<Tensor> router_weight, std::vector<int64_t> ranks, double dropout_p,
                 bool dropout_per_expert, std::optional<Tensor> seed) {
  check_floating(dh, "dh");
  const auto [T, width] = shape<2>(dh, "dh");
  const auto siblings = int64_t(lora_a.size());
  STD_TORCH_CHECK(siblings > 0, "lora_a: expected one per sibling, got none");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "seed: needed for dropout");
  const auto [R, I] = shape<2>(lora_a[0], "lora_a");
  check_size(width, siblings * R, "dh, ranks");
  const ScalarType storage = dh.scalar_type();
  const ScalarType dtype = product_dtype(storage);

  const Tensor of_all = cast(dh, dtype);
  std::vector<Tensor> left, right;
  for (int64_t i = 0; i < siblings; ++i) {
    check_size(lora_a[i].size(0), R, "lora_a, ranks");
    check_size(lora_a[i].size(1), I, "lora_a, in_features");
    left.push_back(siblings == 1 ? of_all : columns(of_all, i * R, R));
    right.push_back(product_operand(lora_a[i], storage));
  }
  std::vector<Tensor> left_router, right_router;
  if (dlogits) {
    check_size(dlogits->size(0), T, "dlogits, tokens");
    check_size(int64_t(router_weight.size()), siblings, "router_weight, siblings");
    const Tensor of_routers = cast(cast(*dlogits, storage), dtype);
    const int64_t E = of_routers.size(1) / siblings;
    for (int64_t i = 0; i < siblings; ++i) {
      check_size(router_weight[i].size(0), E, "router_weight, experts");
      check_size(router_weight[i].size(1), I, "router_weight, in_features");
      left_router.push_back(siblings == 1 ? of_routers : columns(of_routers, i * E, E));
      right_router.push_back(product_operand(router_weight[i], storage));
    }
  }

  if (dropout_p == 0.0) {
    left.insert(left.end(), left_router.begin(), left_router.end());
    right.insert(right.end(), right_router.begin(), right_router.end());
    return cast(sum_of_products(left, right), storage);
  }
  const Tensor dx =
      dropout_per_expert
          ? cast(dropped_per_expert(left, right, Blocks(ranks), storage, dropout_p, *seed), dtype)
          : dropout(sum_of_products(left, right), dropout_p, *seed, 0);
  for (size_t i = 0; i < left_router.size(); ++i)
    addmm_out(dx, dx, left_router[i], right_router[i]);
  return cast(dx, storage);
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("shrink_dx", TORCH_BOX(&moelora::shrink_dx)); }
