// A router has few rows (E experts), so both products are bound by reading x, which is widened once
// per block of rows and kept in L1.
#include "router.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Widened x: TOKENS x COLUMNS float32 = 12 KiB next to 8 rows of weight in a 48 KiB L1.
constexpr int64_t COLUMNS = 1024;
// Tokens that share one pass over a column block of the weight.
constexpr int64_t TILE = 48;
// Columns and tokens of x per step of the weight_grad: 32 KiB of float32.
constexpr int64_t GRAD_COLUMNS = 128;
constexpr int64_t GRAM_TOKENS = 64;
// Columns of the weight_grad of pairs: their part of x stays in L2 while each expert picks its
// rows.
constexpr int64_t PAIR_COLUMNS = 256;

// Tokens [begin, end) of logits, which hold the bias already.
template <int BYTES, class S, class C>
MOELORA_INLINE void logits_kernel(const S* x, const C* weight, int64_t begin, int64_t end,
                                  int64_t I, int64_t N, C* logits) {
  constexpr int TOKENS = 3;
  alignas(64) C widened[TOKENS * COLUMNS];
  for (int64_t tile = begin; tile < end; tile += TILE) {
    const int64_t tile_end = std::min(tile + TILE, end);
    for (int64_t column = 0; column < I; column += COLUMNS) {
      const int64_t count = std::min(COLUMNS, I - column);
      for (int64_t t = tile; t < tile_end; t += TOKENS) {
        const int64_t tokens = std::min<int64_t>(TOKENS, tile_end - t);
        widen_rows(x + t * I + column, I, tokens, count, widened, COLUMNS);
        C* to = logits + t * N;
        const C* of_tokens[TOKENS] = {widened, widened + COLUMNS, widened + 2 * COLUMNS};
        dot_tokens<BYTES>(tokens, of_tokens, weight + column, I, count, N, to, N);
      }
    }
  }
}

// sums[row, column..] += dlogits[t, row] * x[t, column..] over `tokens`.
template <int BYTES, int ROWS, class C>
MOELORA_INLINE void outer_columns(const C* dlogits, int64_t N, const C* x, int64_t tokens,
                                  int64_t count, C* sums, int64_t I) {
  constexpr int VECTORS = 2;
  constexpr int64_t STEP = VECTORS * Vector<C, BYTES>::LANES;
  int64_t j = 0;
  for (; j + STEP <= count; j += STEP) {
    C* to[ROWS];
    for (int row = 0; row < ROWS; ++row) to[row] = sums + row * I + j;
    panel_block<BYTES, ROWS, VECTORS>(Factors<C>{dlogits, 1, N}, x + j, GRAD_COLUMNS, tokens, to);
  }
  for (int64_t t = 0; t < tokens && j < count; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      for (int64_t rest = j; rest < count; ++rest) {
        sums[row * I + rest] += dlogits[t * N + row] * x[t * GRAD_COLUMNS + rest];
      }
    }
  }
}

// Columns [begin, end) of sums [N, I], tokens in their order.
template <int BYTES, class S, class C>
MOELORA_INLINE void weight_grad_kernel(const C* dlogits, const S* x, int64_t begin, int64_t end,
                                       int64_t T, int64_t I, int64_t N, C* sums) {
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  alignas(64) C widened[GRAM_TOKENS * GRAD_COLUMNS];
  for (int64_t column = begin; column < end; column += GRAD_COLUMNS) {
    const int64_t count = std::min(GRAD_COLUMNS, end - column);
    for (int64_t row = 0; row < N; ++row) std::fill_n(sums + row * I + column, count, C{0});
    for (int64_t t = 0; t < T; t += GRAM_TOKENS) {
      const int64_t tokens = std::min(GRAM_TOKENS, T - t);
      widen_rows(x + t * I + column, I, tokens, count, widened, GRAD_COLUMNS);
      const C* of_tile = dlogits + t * N;
      int64_t row = 0;
      for (; row + ROWS <= N; row += ROWS) {
        outer_columns<BYTES, ROWS>(of_tile + row, N, widened, tokens, count,
                                   sums + row * I + column, I);
      }
      for (; row < N; ++row) {
        outer_columns<BYTES, 1>(of_tile + row, N, widened, tokens, count, sums + row * I + column,
                                I);
      }
    }
  }
}

// sums[j] += sum_k factors[k] rows[k][j] over ROWS rows.
template <int ROWS, class S, class C>
MOELORA_INLINE void add_rows(const C* factors, const S* const* rows, int64_t count, C* sums) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    C sum = 0;
    for (int row = 0; row < ROWS; ++row) sum += factors[row] * C(widen(rows[row][j]));
    sums[j] += sum;
  }
}

// `count` columns of an expert's sum over its places, in their order; `sums` starts at zero.
template <class S, class C>
MOELORA_INLINE void sum_over_places(const Places& places, int64_t expert, const C* dlogits,
                                    const Rows<S>& x, int64_t count, C* sums) {
  constexpr int ROWS = 4;
  C part[PAIR_COLUMNS];
  const int64_t end = places.last(expert);
  for (int64_t first = places.first(expert); first < end; first += GRAM_TOKENS) {
    const int64_t last = std::min(first + GRAM_TOKENS, end);
    std::fill_n(part, count, C{0});
    for (int64_t place = first; place < last; place += ROWS) {
      const int64_t given = std::min<int64_t>(ROWS, last - place);
      C factors[ROWS];
      const S* rows[ROWS];
      for (int64_t k = 0; k < given; ++k) {
        factors[k] = dlogits[places.pair(place + k)];
        rows[k] = x.row(x.of_place[place + k]);
      }
      if (given == ROWS) {
        add_rows<ROWS>(factors, rows, count, part);
      } else {
        for (int64_t k = 0; k < given; ++k) add_rows<1>(factors + k, rows + k, count, part);
      }
    }
    for (int64_t j = 0; j < count; ++j) sums[j] += part[j];
  }
}

}  // namespace

Router::Router(const Tensor& x, const std::vector<Tensor>& weights,
               const std::vector<Tensor>& biases)
    : weight(row_major(cast(weights[0], compute_dtype(x.scalar_type())))) {
  const auto [E, I] = shape<2>(weights[0], "router_weight");
  const auto siblings = int64_t(weights.size());
  for (const Tensor& of_sibling : weights) {
    const auto [experts, inputs] = shape<2>(of_sibling, "router_weight");
    check_size(experts, E, "router_weight, experts");
    check_size(inputs, x.size(1), "router_weight, in_features");
  }
  for (const Tensor& of_sibling : biases) check_size(of_sibling.numel(), E, "router_bias");

  bool all_pairs = x.scalar_type() == ScalarType::BFloat16 && simd_level() == Level::avx512bf16;
  for (const Tensor& of_sibling : weights) {
    all_pairs = all_pairs && of_sibling.scalar_type() == ScalarType::BFloat16;
  }
  if (all_pairs) {
    pairs = siblings > 1 ? empty(siblings * E, I, ScalarType::BFloat16) : row_major(weights[0]);
  }
  if (siblings > 1) weight = empty(siblings * E, I, weight.scalar_type());
  if (!biases.empty()) bias = empty(1, siblings * E, weight.scalar_type());
  for (int64_t i = 0; i < siblings; ++i) {
    if (siblings > 1) {
      Tensor part = rows(weight, i * E, E);
      torch::stable::copy_(part, weights[i]);
      if (pairs) {
        Tensor of_pairs = rows(*pairs, i * E, E);
        torch::stable::copy_(of_pairs, weights[i]);
      }
    }
    if (bias) {
      Tensor part = columns(*bias, i * E, E);
      torch::stable::copy_(part, biases[i]);
    }
  }
  if (!pairs || siblings * E % PANEL != 0 || I % 2 != 0) return;
  const int64_t N = siblings * E;
  const auto* words = pairs->const_data_ptr<BFloat16>();
  by_column.resize(I / 2 * N);
  for (int64_t row = 0; row < N; ++row) {
    for (int64_t n = 0; n < I / 2; ++n) {
      std::memcpy(&by_column[n * N + row], words + row * I + 2 * n, sizeof(uint32_t));
    }
  }
}

void Router::logits(const Tensor& x, int64_t begin, int64_t end, const Tensor& to) const {
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const int64_t N = weight.size(0);
    const int64_t I = weight.size(1);
    const S* x_data = x.const_data_ptr<S>();
    const C* weight_data = weight.const_data_ptr<C>();
    C* logits_data = to.mutable_data_ptr<C>();
    const C* start = bias ? bias->const_data_ptr<C>() : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t row = 0; row < N; ++row) logits_data[t * N + row] = start ? start[row] : C{0};
    }
    vectorised([&](auto level) {
      using Level = decltype(level);
      if constexpr (Operand<S, Level::pairs>::pairs) {
        if (pairs) {
          const S* narrow_weight = pairs->const_data_ptr<S>();
          int64_t first = begin;
          for (; !by_column.empty() && first + PANEL <= end; first += PANEL) {
            const auto* of_tokens = reinterpret_cast<const uint32_t*>(x_data + first * I);
            panel<level()>(PANEL, N, Factors<uint32_t>{of_tokens, I / 2, 1}, by_column.data(), N,
                           I / 2, logits_data + first * N, N);
          }
          for (int64_t t = first; t < end; t += 3) {
            const S* const of_tokens[3] = {x_data + t * I, x_data + (t + 1) * I,
                                           x_data + (t + 2) * I};
            dot_tokens<level()>(std::min<int64_t>(3, end - t), of_tokens, narrow_weight, I, I, N,
                                logits_data + t * N, N);
          }
          return;
        }
      }
      logits_kernel<level()>(x_data, weight_data, begin, end, I, N, logits_data);
    });
  });
}

Tensor router_weight_grad(const Tensor& dlogits, const Tensor& x) {
  const auto [T, I] = shape<2>(x, "x");
  const auto [dlogits_rows, N] = shape<2>(dlogits, "dlogits");
  check_size(dlogits_rows, T, "dlogits, tokens");
  const ScalarType dtype = compute_dtype(x.scalar_type());
  const Tensor left = row_major(cast(dlogits, dtype));
  Tensor sums = empty(N, I, dtype);
  for_dtype(x.scalar_type(), [&, T = T, I = I, N = N](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const C* left_data = left.const_data_ptr<C>();
    const S* x_data = x.const_data_ptr<S>();
    C* to = sums.mutable_data_ptr<C>();
    const int64_t num_blocks = (I + GRAD_COLUMNS - 1) / GRAD_COLUMNS;
    const int64_t work = T * N * GRAD_COLUMNS;
    torch::stable::parallel_for(0, num_blocks, grain(work), [&](int64_t first, int64_t last) {
      vectorised([&](auto width) {
        weight_grad_kernel<width()>(left_data, x_data, first * GRAD_COLUMNS,
                                    std::min(last * GRAD_COLUMNS, I), T, I, N, to);
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
    const C* from = dlogits.const_data_ptr<C>();
    C* to = sums.mutable_data_ptr<C>();
    std::vector<double> sum(N);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t e = 0; e < N; ++e) sum[e] += from[t * N + e];
    }
    std::copy(sum.begin(), sum.end(), to);
  });
  return sums;
}

Tensor router_logits(Tensor x, std::vector<Tensor> router_weight, std::vector<Tensor> router_bias) {
  check_floating(x, "x");
  const auto [T, I] = shape<2>(x, "x");
  STD_TORCH_CHECK(!router_weight.empty(), "router_weight: expected one per sibling, got none");
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
  const Tensor wide = row_major(cast(dlogits, compute_dtype(x.scalar_type())));
  const Tensor sums = cast(sum_over_tokens(wide), router_dtype);
  return {cast(router_weight_grad(wide, row_major(x)), router_dtype),
          torch::stable::select(sums, 0, 0)};
}

std::tuple<Tensor, Tensor> grouped_router_grad(Tensor dlogits, Tensor x, Tensor order,
                                               Tensor offsets, ScalarType router_dtype) {
  check_floating(x, "x");
  const int64_t N = offsets.numel() - 1;
  const int64_t I = x.size(1);
  const Places places(order, offsets, N);
  const ScalarType dtype = compute_dtype(x.scalar_type());
  x = row_major(x);
  dlogits = row_major(cast(dlogits, dtype));
  check_size(dlogits.numel(), places.pairs(), "dlogits, pairs");
  const Tensor sums = empty(N, I, dtype);
  const Tensor of_bias = empty(1, N, dtype);
  const std::vector<int32_t> row_of_x = places.rows_of(x, "x");
  for_dtype(x.scalar_type(), [&, N = N, I = I](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const C* from = dlogits.const_data_ptr<C>();
    const S* x_data = x.const_data_ptr<S>();
    C* to = sums.mutable_data_ptr<C>();
    const int64_t strips = (I + PAIR_COLUMNS - 1) / PAIR_COLUMNS;
    const int64_t work = places.pairs() * PAIR_COLUMNS / N;
    torch::stable::parallel_for(0, strips * N, grain(work), [&](int64_t begin, int64_t end) {
      vectorised([&](auto) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t expert = task % N;
          const int64_t column = task / N * PAIR_COLUMNS;
          const int64_t count = std::min(PAIR_COLUMNS, I - column);
          C* of_expert = to + expert * I + column;
          std::fill_n(of_expert, count, C{0});
          sum_over_places(places, expert, from, Rows<S>{x_data + column, I, row_of_x.data()}, count,
                          of_expert);
        }
      });
    });
    for (int64_t expert = 0; expert < N; ++expert) {
      double sum = 0;
      for (int64_t n = places.first(expert); n < places.last(expert); ++n) {
        sum += from[places.pair(n)];
      }
      of_bias.mutable_data_ptr<C>()[expert] = C(sum);
    }
  });
  return {cast(sums, router_dtype), torch::stable::select(cast(of_bias, router_dtype), 0, 0)};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("router_logits", TORCH_BOX(&moelora::router_logits));
  m.impl("router_grad", TORCH_BOX(&moelora::router_grad));
}
