// The ops `router_logits` (x Wrt + br) and `router_grad` (dWr = dlogits^T x, dbr = sum dlogits),
// and dWr and dbr of the grouped form. A router has few rows, so reading x bounds the products: a
// block of x is widened once and stays in L1. Threads split the tokens for logits, the columns of
// dWr, and experts times column blocks for the grouped dWr.
#include "router.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Columns of a block of x: three tokens of it in float32 have 12 KiB. They share a 48 KiB L1 with 8
// rows of the weight.
constexpr int64_t COLUMNS = 1024;
// Tokens that share one pass over a column block of the weight.
constexpr int64_t TOKEN_BLOCK = 48;
// Columns and tokens of a block of x in dWr: 32 KiB of float32.
constexpr int64_t GRAD_COLUMNS = 128;
constexpr int64_t GRAD_TOKENS = 64;
// Columns of a block of x in the grouped dWr: the block stays in L2 while each expert reads its
// rows.
constexpr int64_t PAIR_COLUMNS = 256;

// logits[t] += x[t] Wrt for the tokens [begin, end).
template <int BYTES, class S, class C>
MOELORA_INLINE void logits_kernel(const S* x, const C* weight, int64_t begin, int64_t end,
                                  int64_t I, int64_t N, C* logits, int64_t stride) {
  constexpr int TOKENS = 3;
  alignas(64) C widened[TOKENS * COLUMNS];
  for (int64_t block = begin; block < end; block += TOKEN_BLOCK) {
    const int64_t block_end = std::min(block + TOKEN_BLOCK, end);
    for (int64_t column = 0; column < I; column += COLUMNS) {
      const int64_t count = std::min(COLUMNS, I - column);
      for (int64_t t = block; t < block_end; t += TOKENS) {
        const int64_t tokens = std::min<int64_t>(TOKENS, block_end - t);
        widen_rows(x + t * I + column, I, tokens, count, widened, COLUMNS);
        const C* token_rows[TOKENS] = {widened, widened + COLUMNS, widened + 2 * COLUMNS};
        dot_tokens<BYTES>(tokens, token_rows, weight + column, I, count, N, logits + t * stride,
                          stride);
      }
    }
  }
}

// sums[row, j] += sum_t dlogits[t, row] * x[t, j] for ROWS rows, `count` columns and `tokens`
// tokens.
template <int BYTES, int ROWS, class C>
MOELORA_INLINE void outer_columns(const C* dlogits, int64_t N, const C* x, int64_t tokens,
                                  int64_t count, C* sums, int64_t I) {
  constexpr int VECTORS = 2;
  constexpr int64_t STEP = VECTORS * Vector<C, BYTES>::LANES;
  int64_t j = 0;
  for (; j + STEP <= count; j += STEP) {
    C* out_rows[ROWS];
    for (int row = 0; row < ROWS; ++row) out_rows[row] = sums + row * I + j;
    panel_block<BYTES, ROWS, VECTORS>(Factors<C>{dlogits, 1, N}, x + j, GRAD_COLUMNS, tokens,
                                      out_rows);
  }
  // The columns that do not fill vectors.
  for (int64_t t = 0; t < tokens && j < count; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      for (int64_t k = j; k < count; ++k) {
        sums[row * I + k] += dlogits[t * N + row] * x[t * GRAD_COLUMNS + k];
      }
    }
  }
}

// Computes the columns [begin, end) of sums [N, I] = dlogits^T x. The tokens are summed in their
// order.
template <int BYTES, class S, class C>
MOELORA_INLINE void weight_grad_kernel(const C* dlogits, const S* x, int64_t begin, int64_t end,
                                       int64_t T, int64_t I, int64_t N, C* sums) {
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  alignas(64) C widened[GRAD_TOKENS * GRAD_COLUMNS];
  for (int64_t column = begin; column < end; column += GRAD_COLUMNS) {
    const int64_t count = std::min(GRAD_COLUMNS, end - column);
    for (int64_t row = 0; row < N; ++row) std::fill_n(sums + row * I + column, count, C{0});
    for (int64_t t = 0; t < T; t += GRAD_TOKENS) {
      const int64_t tokens = std::min(GRAD_TOKENS, T - t);
      widen_rows(x + t * I + column, I, tokens, count, widened, GRAD_COLUMNS);
      const C* dlogits_block = dlogits + t * N;
      int64_t row = 0;
      for (; row + ROWS <= N; row += ROWS) {
        outer_columns<BYTES, ROWS>(dlogits_block + row, N, widened, tokens, count,
                                   sums + row * I + column, I);
      }
      for (; row < N; ++row) {
        outer_columns<BYTES, 1>(dlogits_block + row, N, widened, tokens, count,
                                sums + row * I + column, I);
      }
    }
  }
}

// sums[j] += sum_k factors[k] * rows[k][j] over ROWS rows.
template <int ROWS, class S, class C>
MOELORA_INLINE void add_rows(const C* factors, const S* const* rows, int64_t count, C* sums) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    C sum = 0;
    for (int row = 0; row < ROWS; ++row) sum += factors[row] * C(widen(rows[row][j]));
    sums[j] += sum;
  }
}

// sums[j] += sum_p dlogits_p * x_p[j] over the pairs p of an expert, for `count` columns. The pairs
// are summed in the order of their positions. A partial sum has GRAD_TOKENS pairs.
template <class S, class C>
MOELORA_INLINE void sum_over_pairs(const Routing& routing, int64_t expert, const C* dlogits,
                                   const Rows<S>& x, int64_t count, C* sums) {
  constexpr int ROWS = 4;
  C partial[PAIR_COLUMNS];
  const int64_t end = routing.end(expert);
  for (int64_t block = routing.begin(expert); block < end; block += GRAD_TOKENS) {
    const int64_t block_end = std::min(block + GRAD_TOKENS, end);
    std::fill_n(partial, count, C{0});
    for (int64_t position = block; position < block_end; position += ROWS) {
      const int64_t num_rows = std::min<int64_t>(ROWS, block_end - position);
      C factors[ROWS];
      const S* rows[ROWS];
      for (int64_t k = 0; k < num_rows; ++k) {
        factors[k] = dlogits[routing.pair(position + k)];
        rows[k] = x.row(x.row_of_position[position + k]);
      }
      if (num_rows == ROWS) {
        add_rows<ROWS>(factors, rows, count, partial);
      } else {
        for (int64_t k = 0; k < num_rows; ++k) add_rows<1>(factors + k, rows + k, count, partial);
      }
    }
    for (int64_t j = 0; j < count; ++j) sums[j] += partial[j];
  }
}

}  // namespace

Router::Router(const Tensor& x, const std::vector<Tensor>& weights,
               const std::vector<Tensor>& biases) {
  // Check the shapes.
  STD_TORCH_CHECK(!weights.empty(), "router_weight: expected a tensor for each sibling, got none");
  const auto [E, I] = shape<2>(weights[0], "router_weight");
  const auto siblings = int64_t(weights.size());
  is_bf16 = x.scalar_type() == ScalarType::BFloat16 && simd_level() == Level::avx512bf16;
  for (const Tensor& sibling_weight : weights) {
    const auto [num_experts, in_features] = shape<2>(sibling_weight, "router_weight");
    check_size(num_experts, E, "router_weight, experts");
    check_size(in_features, x.size(1), "router_weight, in_features");
    is_bf16 = is_bf16 && sibling_weight.scalar_type() == ScalarType::BFloat16;
  }
  for (const Tensor& sibling_bias : biases) check_size(sibling_bias.numel(), E, "router_bias");

  // Stack the weights and biases of all siblings.
  const ScalarType compute = compute_dtype(x.scalar_type());
  const ScalarType dtype = is_bf16 ? ScalarType::BFloat16 : compute;
  const int64_t N = siblings * E;
  weight = siblings > 1 ? empty(N, I, dtype) : row_major(cast(weights[0], dtype));
  if (!biases.empty()) bias = empty(1, N, compute);
  for (int64_t i = 0; i < siblings; ++i) {
    if (siblings > 1) {
      Tensor row_block = rows(weight, i * E, E);
      torch::stable::copy_(row_block, weights[i]);
    }
    if (bias) {
      Tensor column_block = columns(*bias, i * E, E);
      torch::stable::copy_(column_block, biases[i]);
    }
  }

  // Transpose the pairs of columns, for `panel`.
  if (!is_bf16 || x.size(0) < PANEL || N % PANEL != 0 || I % 2 != 0) return;
  const auto* weight_data = weight.const_data_ptr<BFloat16>();
  bf16_pairs.resize(I / 2 * N);
  for (int64_t row = 0; row < N; ++row) {
    for (int64_t n = 0; n < I / 2; ++n) {
      std::memcpy(&bf16_pairs[n * N + row], weight_data + row * I + 2 * n, sizeof(uint32_t));
    }
  }
}

void Router::logits(const Tensor& x, int64_t begin, int64_t end, const Tensor& out) const {
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const int64_t N = weight.size(0);
    const int64_t I = weight.size(1);
    const int64_t stride = out.stride(0);
    const S* x_data = x.const_data_ptr<S>();
    C* logits_data = out.mutable_data_ptr<C>();
    // The logits start from the bias.
    const C* bias_data = bias ? bias->const_data_ptr<C>() : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t row = 0; row < N; ++row) {
        logits_data[t * stride + row] = bias_data ? bias_data[row] : C{0};
      }
    }
    vectorised([&](auto level) {
      using Level = decltype(level);
      if constexpr (Operand<S, Level::bf16_pairs>::bf16_pairs) {
        if (is_bf16) {
          // Blocks of PANEL tokens, then up to three tokens at a time.
          const S* narrow_weight = weight.const_data_ptr<S>();
          int64_t first = begin;
          for (; !bf16_pairs.empty() && first + PANEL <= end; first += PANEL) {
            const auto* x_pairs = reinterpret_cast<const uint32_t*>(x_data + first * I);
            panel<level()>(PANEL, N, Factors<uint32_t>{x_pairs, I / 2, 1}, bf16_pairs.data(), N,
                           I / 2, logits_data + first * stride, stride);
          }
          for (int64_t t = first; t < end; t += 3) {
            const S* const token_rows[3] = {x_data + t * I, x_data + (t + 1) * I,
                                            x_data + (t + 2) * I};
            dot_tokens<level()>(std::min<int64_t>(3, end - t), token_rows, narrow_weight, I, I, N,
                                logits_data + t * stride, stride);
          }
          return;
        }
      }
      logits_kernel<level()>(x_data, weight.const_data_ptr<C>(), begin, end, I, N, logits_data,
                             stride);
    });
  });
}

Tensor router_weight_grad(const Tensor& dlogits, const Tensor& x) {
  const auto [T, I] = shape<2>(x, "x");
  const auto [dlogits_rows, N] = shape<2>(dlogits, "dlogits");
  check_size(dlogits_rows, T, "dlogits, tokens");
  const ScalarType dtype = compute_dtype(x.scalar_type());
  const Tensor dense_dlogits = row_major(cast(dlogits, dtype));
  Tensor sums = empty(N, I, dtype);
  for_dtype(x.scalar_type(), [&, T = T, I = I, N = N](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const C* dlogits_data = dense_dlogits.const_data_ptr<C>();
    const S* x_data = x.const_data_ptr<S>();
    C* sums_data = sums.mutable_data_ptr<C>();
    const int64_t num_blocks = (I + GRAD_COLUMNS - 1) / GRAD_COLUMNS;
    const int64_t work = T * N * GRAD_COLUMNS;
    torch::stable::parallel_for(0, num_blocks, grain(work), [&](int64_t first, int64_t last) {
      vectorised([&](auto width) {
        weight_grad_kernel<width()>(dlogits_data, x_data, first * GRAD_COLUMNS,
                                    std::min(last * GRAD_COLUMNS, I), T, I, N, sums_data);
      });
    });
  });
  return sums;
}

Tensor sum_over_tokens(const Tensor& dlogits) {
  const auto [T, N] = shape<2>(dlogits, "dlogits");
  const Tensor sums = empty(1, N, dlogits.scalar_type());
  for_dtype(dlogits.scalar_type(), [&, T = T, N = N](auto type) {
    using C = typename decltype(type)::type;
    const C* dlogits_data = dlogits.const_data_ptr<C>();
    C* sums_data = sums.mutable_data_ptr<C>();
    std::vector<double> double_sums(N);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t e = 0; e < N; ++e) double_sums[e] += dlogits_data[t * N + e];
    }
    std::copy(double_sums.begin(), double_sums.end(), sums_data);
  });
  return sums;
}

Tensor router_logits(Tensor x, std::vector<Tensor> router_weight, std::vector<Tensor> router_bias) {
  check_floating(x, "x");
  const auto [T, I] = shape<2>(x, "x");
  x = row_major(x);
  const Router router(x, router_weight, router_bias);
  const int64_t N = router.weight.size(0);
  const Tensor logits = empty(T, N, compute_dtype(x.scalar_type()));
  torch::stable::parallel_for(0, T, grain(N * I), [&](int64_t begin, int64_t end) {
    router.logits(x, begin, end, logits);
  });
  return logits;
}

std::tuple<Tensor, Tensor> router_grad(Tensor dlogits, Tensor x, ScalarType router_dtype) {
  check_floating(x, "x");
  const Tensor wide_dlogits = row_major(cast(dlogits, compute_dtype(x.scalar_type())));
  const Tensor dbias = cast(sum_over_tokens(wide_dlogits), router_dtype);  // [1, N]
  return {cast(router_weight_grad(wide_dlogits, row_major(x)), router_dtype),
          torch::stable::select(dbias, 0, 0)};
}

std::tuple<Tensor, Tensor> grouped_router_grad(Tensor dlogits, Tensor x, Tensor order,
                                               Tensor offsets, ScalarType router_dtype) {
  check_floating(x, "x");
  const int64_t N = offsets.numel() - 1;
  const int64_t I = x.size(1);
  const Routing routing(order, offsets, N);
  const ScalarType dtype = compute_dtype(x.scalar_type());
  x = row_major(x);
  dlogits = row_major(cast(dlogits, dtype));
  check_size(dlogits.numel(), routing.num_pairs(), "dlogits, pairs");
  const Tensor drouter = empty(N, I, dtype);
  const Tensor dbias = empty(1, N, dtype);
  const std::vector<int32_t> x_rows = routing.rows_of_positions(x, "x");
  for_dtype(x.scalar_type(), [&, N = N, I = I](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const C* dlogits_data = dlogits.const_data_ptr<C>();
    const S* x_data = x.const_data_ptr<S>();
    C* drouter_data = drouter.mutable_data_ptr<C>();

    // A task is one expert on one column block. Tasks of one column block follow one another.
    const int64_t column_blocks = (I + PAIR_COLUMNS - 1) / PAIR_COLUMNS;
    const int64_t work = routing.num_pairs() * PAIR_COLUMNS / N;
    torch::stable::parallel_for(0, column_blocks * N, grain(work), [&](int64_t begin, int64_t end) {
      vectorised([&](auto) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t expert = task % N;
          const int64_t column = task / N * PAIR_COLUMNS;
          const int64_t count = std::min(PAIR_COLUMNS, I - column);
          C* expert_row = drouter_data + expert * I + column;
          std::fill_n(expert_row, count, C{0});
          sum_over_pairs(routing, expert, dlogits_data, Rows<S>{x_data + column, I, x_rows.data()},
                         count, expert_row);
        }
      });
    });

    for (int64_t expert = 0; expert < N; ++expert) {
      double sum = 0;
      for (int64_t position = routing.begin(expert); position < routing.end(expert); ++position) {
        sum += dlogits_data[routing.pair(position)];
      }
      dbias.mutable_data_ptr<C>()[expert] = C(sum);
    }
  });
  return {cast(drouter, router_dtype), torch::stable::select(cast(dbias, router_dtype), 0, 0)};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("router_logits", TORCH_BOX(&moelora::router_logits));
  m.impl("router_grad", TORCH_BOX(&moelora::router_grad));
}
