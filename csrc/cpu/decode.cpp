// The op `decode`: a whole layer of n siblings for few tokens, without gradients. It computes and
// reads the experts that the tokens use, and no others. The logits, the top-k experts and the gate
// split the tokens between threads; the shrink splits the rows of A; the expand splits the columns
// of y. With few tokens the expand also computes the base product; else ATen adds it.
#include "decode.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "ops.h"
#include "router.h"

namespace moelora {
namespace {

// A thread must get at least this many multiply-adds, about 3 us. Few tokens read more bytes for a
// multiply-add than the products for which WORK_PER_THREAD is chosen.
constexpr int64_t DECODE_WORK_PER_THREAD = 1 << 15;

// Calls function(Type<W>{}) with the dtype of A or B beside the compute dtype C.
template <class C, class Function>
void for_adapter_dtype(ScalarType dtype, const Function& function) {
  if constexpr (std::is_same_v<C, double>) {
    function(Type<double>{});
  } else {
    switch (dtype) {
      case ScalarType::BFloat16:
        return function(Type<BFloat16>{});
      case ScalarType::Half:
        return function(Type<Half>{});
      default:
        return function(Type<float>{});
    }
  }
}

// Returns the matrices of all siblings with dense rows, in one dtype that `for_adapter_dtype`
// names.
template <class C>
std::vector<Tensor> adapter_matrices(const std::vector<Tensor>& matrices) {
  ScalarType dtype = matrices[0].scalar_type();
  if (std::is_same_v<C, double>) dtype = ScalarType::Double;
  if (std::is_same_v<C, float> && dtype == ScalarType::Double) dtype = ScalarType::Float;
  std::vector<Tensor> result;
  for (const Tensor& matrix : matrices) result.push_back(dense_rows(matrix, dtype));
  return result;
}

// Computes the gate of n linear routers; x is row-major.
void fill_gate(const Tensor& x, const std::vector<Tensor>& router_weight,
               const std::vector<Tensor>& router_bias, int64_t E, const TopkOptions& options,
               const RouterGate& gate) {
  const auto siblings = int64_t(router_weight.size());
  // A router for each sibling: stacking their weights would copy them.
  std::vector<Router> routers;
  std::vector<Tensor> columns_of_logits;
  for (int64_t i = 0; i < siblings; ++i) {
    const auto bias = router_bias.empty() ? std::vector<Tensor>{} : std::vector{router_bias[i]};
    routers.emplace_back(x, std::vector{router_weight[i]}, bias);
    columns_of_logits.push_back(siblings > 1 ? columns(gate.logits, i * E, E) : gate.logits);
  }
  for_dtype(gate.logits.scalar_type(), [&](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const C* logits_data = gate.logits.const_data_ptr<C>();
    C* weights_data = gate.weights.mutable_data_ptr<C>();
    int32_t* experts_data = gate.experts_data();
    const int64_t rows_per_thread = grain(siblings * E * (x.size(1) + 32), DECODE_WORK_PER_THREAD);
    torch::stable::parallel_for(0, x.size(0), rows_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < siblings; ++i) {
        routers[i].logits(x, begin, end, columns_of_logits[i]);
      }
      vectorised([&](auto) {
        topk_rows(logits_data, begin * siblings, end * siblings, E, options, weights_data,
                  experts_data);
      });
    });
  });
}

// The experts that the tokens use, and the tasks that compute h for them.
template <class C>
struct Plan {
  std::vector<UsedExpert> experts;
  std::vector<Pair<C>> pairs;
  // The token of every pair.
  std::vector<int64_t> tokens;
  std::vector<ShrinkTask> tasks;
  int64_t h_size = 0;

  Plan(const Gate<C>& gate, const C* scaling, const Blocks& blocks, bool share_a, int64_t T,
       int64_t siblings) {
    const int64_t E = blocks.num_experts();
    std::vector<C> scaled_gates(T * siblings * E);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t i = 0; i < siblings; ++i) {
        gate.load_scaled(t, i, scaling, scaled_gates.data() + (t * siblings + i) * E);
      }
    }
    // Experts that share A read the h of the token.
    for (int64_t i = 0; i < siblings; ++i) {
      for (int64_t e = 0; e < E; ++e) {
        const auto first = int64_t(pairs.size());
        for (int64_t t = 0; t < T; ++t) {
          const C factor = scaled_gates[(t * siblings + i) * E + e];
          // A factor of zero selects zero, so that it also hides a NaN of h.
          if (factor == 0) continue;
          const int64_t shared_h = (i * T + t) * blocks.ranks[0];
          pairs.push_back({.token = t, .factor = factor, .h = share_a ? shared_h : h_size});
          if (!share_a) h_size += blocks.ranks[e];
        }
        const auto last = int64_t(pairs.size());
        if (last > first) experts.push_back({i, e, first, last});
      }
    }
    if (share_a) {
      h_size = siblings * T * blocks.ranks[0];
      for (int64_t t = 0; t < T; ++t) tokens.push_back(t);
      for (int64_t i = 0; i < siblings; ++i) {
        add_tasks(i, 0, blocks.ranks[0], tokens.data(), T, i * T * blocks.ranks[0], tasks);
      }
      return;
    }
    for (const Pair<C>& pair : pairs) tokens.push_back(pair.token);
    for (const UsedExpert& used : experts) {
      add_tasks(used.sibling, blocks.begin[used.expert], blocks.ranks[used.expert],
                tokens.data() + used.first, used.last - used.first, pairs[used.first].h, tasks);
    }
  }
};

// Fills h, which is zero.
template <class C>
void shrink_all(const Plan<C>& plan, const Tensor& x, const std::vector<Tensor>& lora_a, C* h) {
  const int64_t I = x.size(1);
  const std::vector<Tensor> matrices = adapter_matrices<C>(lora_a);
  for_dtype(x.scalar_type(), [&](auto x_type) {
    using S = typename decltype(x_type)::type;
    if constexpr (std::is_same_v<Compute<S>, C>) {
      for_adapter_dtype<C>(matrices[0].scalar_type(), [&](auto type) {
        using W = typename decltype(type)::type;
        const S* x_data = x.const_data_ptr<S>();
        const int64_t work = TASK_ROWS * I;
        torch::stable::parallel_for(
            0, int64_t(plan.tasks.size()), grain(work, DECODE_WORK_PER_THREAD),
            [&](int64_t begin, int64_t end) {
              vectorised([&](auto width) {
                for (int64_t n = begin; n < end; ++n) {
                  const ShrinkTask& task = plan.tasks[n];
                  const Tensor& a = matrices[task.sibling];
                  shrink<decltype(width)>(task, x_data, I,
                                          Matrix<W>{a.const_data_ptr<W>(), a.stride(0)}, h);
                }
              });
            });
      });
    }
  });
}

// Column blocks [first, last) of the y of one sibling.
struct Strip {
  int64_t sibling;
  int64_t first;
  int64_t last;
};

// Returns the strips of up to STRIP_BLOCKS column blocks that hold every y.
std::vector<Strip> split_into_strips(const std::vector<Tensor>& y) {
  std::vector<Strip> strips;
  for (int64_t i = 0; i < int64_t(y.size()); ++i) {
    const int64_t blocks = (y[i].size(1) + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    for (int64_t first = 0; first < blocks; first += STRIP_BLOCKS) {
      strips.push_back({i, first, std::min(first + STRIP_BLOCKS, blocks)});
    }
  }
  return strips;
}

// The terms of y without experts. Each list has a tensor for each sibling, or none.
struct Base {
  // x [T, I], row-major.
  Tensor x;
  // [O, I] in x's dtype with dense rows: the expand adds x Wt.
  std::vector<Tensor> weights;
  // [O] or [T, O] in y's dtype.
  std::vector<Tensor> starts;
};

// Returns whether the expand computes the base product.
bool expands_base(const Tensor& x, const std::vector<Tensor>& weights) {
  const ScalarType dtype = x.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16 && simd_level() == Level::avx512bf16;
  const bool in_place = is_bf16 || dtype == compute_dtype(dtype);
  return in_place && x.size(0) <= BASE_TOKENS &&
         std::all_of(weights.begin(), weights.end(), [&](const Tensor& weight) {
           return weight.scalar_type() == dtype && has_dense_rows(weight);
         });
}

// sums [blocks of the strip, T, BLOCK_COLUMNS] += x Wt. `tokens` are 0, 1, ..., T - 1.
template <class C>
void add_base(const Strip& strip, const Base& base, const std::vector<int64_t>& tokens, C* sums) {
  const auto T = int64_t(tokens.size());
  for_dtype(base.x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    if constexpr (std::is_same_v<Compute<S>, C>) {
      const Tensor& weight = base.weights[strip.sibling];
      const Matrix<S> matrix{weight.const_data_ptr<S>(), weight.stride(0)};
      const S* x = base.x.const_data_ptr<S>();
      const int64_t end = std::min(strip.last * BLOCK_COLUMNS, weight.size(0));
      vectorised([&](auto width) {
        if constexpr (Operand<S, decltype(width)::bf16_pairs>::in_place) {
          for (int64_t row = strip.first * BLOCK_COLUMNS; row < end; row += TASK_ROWS) {
            const int64_t block = row / BLOCK_COLUMNS - strip.first;
            const ShrinkTask task{.sibling = strip.sibling,
                                  .first_row = row,
                                  .num_rows = std::min(TASK_ROWS, end - row),
                                  .tokens = tokens.data(),
                                  .num_tokens = T,
                                  .h = block * T * BLOCK_COLUMNS + row % BLOCK_COLUMNS,
                                  .stride = BLOCK_COLUMNS};
            shrink<decltype(width), true>(task, x, weight.size(1), matrix, sums);
          }
        }
      });
    }
  });
}

// Fills y n x [T, O_i] with the base + u Bt.
template <class C>
void expand_all(const Plan<C>& plan, const Blocks& blocks, const C* h,
                const std::vector<Tensor>& lora_b, const Base& base, const std::vector<Tensor>& y) {
  const int64_t T = y[0].size(0);
  const std::vector<Tensor> matrices = adapter_matrices<C>(lora_b);
  const std::vector<Strip> strips = split_into_strips(y);
  // The used experts of sibling i are [experts_before[i], experts_before[i + 1]).
  std::vector<int64_t> experts_before(y.size() + 1);
  int64_t work = T;
  for (const UsedExpert& used : plan.experts) {
    ++experts_before[used.sibling + 1];
    work += blocks.ranks[used.expert] * (2 + used.last - used.first);
  }
  for (size_t i = 0; i < y.size(); ++i) experts_before[i + 1] += experts_before[i];
  work /= int64_t(y.size());
  if (!base.weights.empty()) work += T * base.x.size(1);
  work *= STRIP_BLOCKS * BLOCK_COLUMNS;
  std::vector<int64_t> tokens(T);
  std::iota(tokens.begin(), tokens.end(), 0);

  const auto expand_strips = [&](int64_t begin, int64_t end) {
    std::vector<C> sums(STRIP_BLOCKS * T * BLOCK_COLUMNS);
    for (int64_t n = begin; n < end; ++n) {
      const Strip& strip = strips[n];
      const int64_t i = strip.sibling;
      const int64_t O = y[i].size(1);
      std::fill(sums.begin(), sums.end(), C{0});
      if (!base.weights.empty()) add_base(strip, base, tokens, sums.data());
      for_adapter_dtype<C>(matrices[i].scalar_type(), [&](auto type) {
        using W = typename decltype(type)::type;
        const Matrix<W> b{matrices[i].const_data_ptr<W>(), matrices[i].stride(0)};
        vectorised([&](auto width) {
          for (int64_t k = experts_before[i]; k < experts_before[i + 1]; ++k) {
            const UsedExpert& used = plan.experts[k];
            expand<width()>(used, plan.pairs.data(), h, b, O, blocks.begin[used.expert],
                            blocks.ranks[used.expert], strip.first, strip.last, T, sums.data());
          }
        });
      });
      for_dtype(y[i].scalar_type(), [&](auto type) {
        using Y = typename decltype(type)::type;
        const std::vector<Tensor>& starts = base.starts;
        const Y* start = starts.empty() ? nullptr : starts[i].const_data_ptr<Y>();
        const bool is_matrix = !starts.empty() && starts[i].dim() == 2;
        const int64_t stride = is_matrix ? starts[i].stride(0) : 0;
        Y* y_data = y[i].mutable_data_ptr<Y>();
        vectorised([&](auto) {
          write_columns(start, stride, sums.data(), T, O, strip.first, strip.last, y_data);
        });
      });
    }
  };
  torch::stable::parallel_for(0, int64_t(strips.size()), grain(work, DECODE_WORK_PER_THREAD),
                              expand_strips);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> decode(
    Tensor x, std::vector<Tensor> base_weight, std::vector<Tensor> base_bias,
    std::vector<Tensor> base_output, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
    std::vector<Tensor> router_weight, std::vector<Tensor> router_bias,
    std::optional<Tensor> gate_weights, std::optional<Tensor> experts, std::optional<Tensor> rows,
    std::optional<Tensor> /*logits*/, std::vector<int64_t> ranks, std::vector<double> scaling,
    bool share_a, int64_t top_k, bool renormalize, double temperature) {
  // Check the arguments.
  const Blocks blocks(ranks);
  check_shrink(x, lora_a, blocks, scaling, share_a);
  const auto siblings = int64_t(lora_a.size());
  check_siblings(siblings, lora_b, base_weight, base_bias, base_output);
  x = row_major(x);
  const int64_t T = x.size(0);
  const int64_t E = blocks.num_experts();
  const ScalarType dtype = x.scalar_type();
  for (int64_t i = 0; i < siblings; ++i) {
    const auto [O, rank] = shape<2>(lora_b[i], "lora_b");
    check_size(rank, blocks.total, "lora_b, ranks");
    if (!base_output.empty()) {
      const auto [tokens, out_features] = shape<2>(base_output[i], "base_output");
      check_size(tokens, T, "base_output, tokens");
      check_size(out_features, O, "base_output, out_features");
    } else {
      const auto [out_features, width] = shape<2>(base_weight[i], "base_weight");
      check_size(out_features, O, "base_weight, out_features");
      check_size(width, x.size(1), "base_weight, in_features");
    }
    if (!base_bias.empty()) check_size(base_bias[i].numel(), O, "base_bias");
  }

  // Make the gate of the routers.
  const RouterGate router(router_weight, router_bias, dtype, T, siblings, E, top_k);
  if (router_weight.empty()) {
    STD_TORCH_CHECK(gate_weights.has_value(),
                    "gate_weights: expected a tensor if there is no router, got none");
  } else {
    const TopkOptions options{.K = top_k, .renormalize = renormalize, .temperature = temperature};
    fill_gate(x, router_weight, router_bias, E, options, router);
    gate_weights = router.weights;
    experts = top_k < E ? std::optional<Tensor>(router.experts) : std::nullopt;
    rows = std::nullopt;
  }

  // y starts from the base's output, or from its bias.
  const bool fused = expands_base(x, base_weight);
  Base base{.x = x, .weights = fused ? base_weight : std::vector<Tensor>{}, .starts = {}};
  std::vector<Tensor> y;
  for (int64_t i = 0; i < siblings; ++i) {
    const ScalarType y_dtype = base_output.empty() ? dtype : base_output[i].scalar_type();
    y.push_back(empty(T, lora_b[i].size(0), y_dtype));
    if (!base_output.empty()) base.starts.push_back(dense_rows(base_output[i], y_dtype));
    if (!base_bias.empty()) base.starts.push_back(row_major(cast(base_bias[i], y_dtype)));
  }
  for_dtype(compute_dtype(dtype), [&](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const Gate<C> gate(*gate_weights, experts, rows, T, siblings, E);
    const std::vector<C> scales = to_compute<C>(scaling);
    const Plan<C> plan(gate, scales.data(), blocks, share_a, T, siblings);
    std::vector<C> h(plan.h_size);
    shrink_all(plan, x, lora_a, h.data());
    expand_all(plan, blocks, h.data(), lora_b, base, y);
  });
  // ATen's base product is last and in place: y is rounded with it, and not before.
  for (size_t i = 0; i < base_weight.size() && !fused; ++i) {
    addmm_out(y[i], y[i], x, transposed(base_weight[i]));
  }
  return {y, router.weights, router.experts, router.logits};
}

}  // namespace
}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("decode", TORCH_BOX(&moelora::decode)); }
