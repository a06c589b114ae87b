// The op `shrink_dx`: dropout(dh A) + dlogits Wr summed over n siblings, the rank-space part of dx.
// ATen computes the products. Threads split the elements for dropout and sums.
#include <torch/csrc/stable/library.h>

#include "dropout.h"
#include "gate.h"
#include "ops.h"
#include "simd.h"

namespace moelora {
namespace {

// Returns sum_i left_i right_i, [T, I]. All factors are stacked into one product, if copying the
// rows of `right` costs less than the passes over the result that it saves.
Tensor sum_of_products(const std::vector<Tensor>& left, const std::vector<Tensor>& right) {
  int64_t total = 0;
  for (const Tensor& factor : right) total += factor.size(0);
  if (left[0].size(0) >= total) return mm(stacked(left, true), stacked(right, false));
  const Tensor sum = mm(left[0], right[0]);
  for (size_t i = 1; i < left.size(); ++i) addmm_out(sum, sum, left[i], right[i]);
  return sum;
}

// sums += terms, element by element in the compute dtype.
void add(const Tensor& sums, const Tensor& terms) {
  for_dtype(sums.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    S* sums_data = sums.mutable_data_ptr<S>();
    const S* terms_data = terms.const_data_ptr<S>();
    torch::stable::parallel_for(0, sums.numel(), WORK_PER_THREAD, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        sums_data[j] = narrow<S>(widen(sums_data[j]) + widen(terms_data[j]));
      }
    });
  });
}

// Returns sum_e dropout_e(sum_i dh_ie A_ie), [T, I]. Every expert has a mask, which is the same for
// all siblings.
Tensor sum_with_dropout_per_expert(const std::vector<Tensor>& dh, const std::vector<Tensor>& lora_a,
                                   const Blocks& blocks, ScalarType storage, double p,
                                   const Tensor& seed) {
  const ScalarType dtype = compute_dtype(storage);
  std::optional<Tensor> sum;
  for (int64_t e = 0; e < blocks.num_experts(); ++e) {
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
  // Check the arguments, and collect the factors of dh A and of dlogits Wr.
  check_floating(dh, "dh");
  const auto [T, dh_columns] = shape<2>(dh, "dh");
  const auto siblings = int64_t(lora_a.size());
  STD_TORCH_CHECK(siblings > 0, "lora_a: expected a tensor for each sibling, got none");
  STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(),
                  "seed: expected a seed if dropout is above 0, got none");
  const auto [R, I] = shape<2>(lora_a[0], "lora_a");
  check_size(dh_columns, siblings * R, "dh, ranks");
  const ScalarType storage = dh.scalar_type();
  const ScalarType dtype = product_dtype(storage);

  const Tensor dh_all = cast(dh, dtype);  // [T, n R]
  std::vector<Tensor> left, right;
  for (int64_t i = 0; i < siblings; ++i) {
    check_size(lora_a[i].size(0), R, "lora_a, ranks");
    check_size(lora_a[i].size(1), I, "lora_a, in_features");
    left.push_back(siblings == 1 ? dh_all : columns(dh_all, i * R, R));
    right.push_back(product_operand(lora_a[i], storage));
  }
  std::vector<Tensor> left_router, right_router;
  if (dlogits) {
    check_size(dlogits->size(0), T, "dlogits, tokens");
    check_size(int64_t(router_weight.size()), siblings, "router_weight, siblings");
    const Tensor dlogits_all = cast(cast(*dlogits, storage), dtype);  // [T, n E]
    const int64_t E = dlogits_all.size(1) / siblings;
    for (int64_t i = 0; i < siblings; ++i) {
      check_size(router_weight[i].size(0), E, "router_weight, experts");
      check_size(router_weight[i].size(1), I, "router_weight, in_features");
      left_router.push_back(siblings == 1 ? dlogits_all : columns(dlogits_all, i * E, E));
      right_router.push_back(product_operand(router_weight[i], storage));
    }
  }

  // Without dropout, one sum holds the products of dh and of dlogits.
  if (dropout_p == 0.0) {
    left.insert(left.end(), left_router.begin(), left_router.end());
    right.insert(right.end(), right_router.begin(), right_router.end());
    return cast(sum_of_products(left, right), storage);
  }

  const Tensor dx =
      dropout_per_expert
          ? cast(sum_with_dropout_per_expert(left, right, Blocks(ranks), storage, dropout_p, *seed),
                 dtype)
          : dropout(sum_of_products(left, right), dropout_p, *seed, 0);
  for (size_t i = 0; i < left_router.size(); ++i) {
    addmm_out(dx, dx, left_router[i], right_router[i]);
  }
  return cast(dx, storage);
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("shrink_dx", TORCH_BOX(&moelora::shrink_dx)); }
