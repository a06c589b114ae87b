// A router has few rows (E experts), so both products are bound by reading x, which is widened once
// per block of rows and kept in L1.
#include "router.h"

#include "simd.h"

namespace moelora {
namespace {

// Widened x: TOKENS x COLUMNS float32 = 12 KiB next to 8 rows of weight in a 48 KiB L1.
constexpr int64_t COLUMNS = 1024;
// Tokens that share one pass over a column block of the weight.
constexpr int64_t TILE = 48;
// Columns and tokens of x per step of the gram: 32 KiB of float32.
constexpr int64_t GRAM_COLUMNS = 128;
constexpr int64_t GRAM_TOKENS = 64;

template <class S, class C>
MOELORA_INLINE void widen_rows(const S* from, int64_t stride, int64_t num_rows, int64_t count,
                               C* to, int64_t to_stride) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const S* source = from + row * stride;
    C* target = to + row * to_stride;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) target[j] = widen(source[j]);
  }
}

// The sum of a vector's lanes, by halving.
template <class C, int BYTES, class V>
MOELORA_INLINE C sum_lanes(const V& vector) {
  if constexpr (BYTES == 16) {
    C sum = 0;
    for (int64_t lane = 0; lane < Vector<C, 16>::LANES; ++lane) sum += vector[lane];
    return sum;
  } else {
    typename Vector<C, BYTES / 2>::type halves[2];
    std::memcpy(halves, &vector, BYTES);
    return sum_lanes<C, BYTES / 2>(halves[0] + halves[1]);
  }
}

// logits[t, row] += <x[t], weight[row]> for TOKENS x ROWS pairs, all in registers.
template <int BYTES, int TOKENS, int ROWS, class C>
MOELORA_INLINE void dot_block(const C* x, const C* weight, int64_t weight_stride, int64_t count,
                              C* logits, int64_t logits_stride) {
  using V = typename Vector<C, BYTES>::type;
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  V sum[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t) {
    for (int row = 0; row < ROWS; ++row) sum[t][row] = V{};
  }
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    V of_x[TOKENS];
    for (int t = 0; t < TOKENS; ++t) load(of_x[t], x + t * COLUMNS + j);
    for (int row = 0; row < ROWS; ++row) {
      V of_weight;
      load(of_weight, weight + row * weight_stride + j);
      for (int t = 0; t < TOKENS; ++t) sum[t][row] += of_x[t] * of_weight;
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      C total = sum_lanes<C, BYTES>(sum[t][row]);
      for (int64_t rest = j; rest < count; ++rest) {
        total += x[t * COLUMNS + rest] * weight[row * weight_stride + rest];
      }
      logits[t * logits_stride + row] += total;
    }
  }
}

template <int BYTES, int TOKENS, class C>
MOELORA_INLINE void dot_rows(const C* x, const C* weight, int64_t weight_stride, int64_t count,
                             int64_t N, C* logits) {
  // 3 x 8 sums fill the 32 registers of AVX-512, 3 x 4 the 16 of everything narrower.
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  int64_t row = 0;
  for (; row + ROWS <= N; row += ROWS) {
    dot_block<BYTES, TOKENS, ROWS>(x, weight + row * weight_stride, weight_stride, count,
                                   logits + row, N);
  }
  for (; row + 2 <= N; row += 2) {
    dot_block<BYTES, TOKENS, 2>(x, weight + row * weight_stride, weight_stride, count, logits + row,
                                N);
  }
  for (; row < N; ++row) {
    dot_block<BYTES, TOKENS, 1>(x, weight + row * weight_stride, weight_stride, count, logits + row,
                                N);
  }
}

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
        if (tokens == 3) {
          dot_rows<BYTES, 3>(widened, weight + column, I, count, N, to);
        } else if (tokens == 2) {
          dot_rows<BYTES, 2>(widened, weight + column, I, count, N, to);
        } else {
          dot_rows<BYTES, 1>(widened, weight + column, I, count, N, to);
        }
      }
    }
  }
}

// sums[row, column..] += dlogits[t, row] * x[t, column..] over `tokens`, ROWS x VECTORS registers.
template <int BYTES, int ROWS, int VECTORS, class C>
MOELORA_INLINE void outer_block(const C* dlogits, int64_t N, const C* x, int64_t tokens, C* sums,
                                int64_t I) {
  using V = typename Vector<C, BYTES>::type;
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  V sum[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) load(sum[row][v], sums + row * I + v * LANES);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    V of_x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) load(of_x[v], x + t * GRAM_COLUMNS + v * LANES);
    for (int row = 0; row < ROWS; ++row) {
      for (int v = 0; v < VECTORS; ++v) sum[row][v] += dlogits[t * N + row] * of_x[v];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) store(sums + row * I + v * LANES, sum[row][v]);
  }
}

template <int BYTES, int ROWS, class C>
MOELORA_INLINE void outer_columns(const C* dlogits, int64_t N, const C* x, int64_t tokens,
                                  int64_t count, C* sums, int64_t I) {
  constexpr int VECTORS = 2;
  constexpr int64_t STEP = VECTORS * Vector<C, BYTES>::LANES;
  int64_t j = 0;
  for (; j + STEP <= count; j += STEP) {
    outer_block<BYTES, ROWS, VECTORS>(dlogits, N, x + j, tokens, sums + j, I);
  }
  for (int64_t t = 0; t < tokens && j < count; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      for (int64_t rest = j; rest < count; ++rest) {
        sums[row * I + rest] += dlogits[t * N + row] * x[t * GRAM_COLUMNS + rest];
      }
    }
  }
}

// Columns [begin, end) of sums [N, I], tokens in their order.
template <int BYTES, class S, class C>
MOELORA_INLINE void gram_kernel(const C* dlogits, const S* x, int64_t begin, int64_t end, int64_t T,
                                int64_t I, int64_t N, C* sums) {
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  alignas(64) C widened[GRAM_TOKENS * GRAM_COLUMNS];
  for (int64_t column = begin; column < end; column += GRAM_COLUMNS) {
    const int64_t count = std::min(GRAM_COLUMNS, end - column);
    for (int64_t row = 0; row < N; ++row) std::fill_n(sums + row * I + column, count, C{0});
    for (int64_t t = 0; t < T; t += GRAM_TOKENS) {
      const int64_t tokens = std::min(GRAM_TOKENS, T - t);
      widen_rows(x + t * I + column, I, tokens, count, widened, GRAM_COLUMNS);
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

  if (siblings > 1) weight = empty(siblings * E, I, weight.scalar_type());
  if (!biases.empty()) bias = empty(1, siblings * E, weight.scalar_type());
  for (int64_t i = 0; i < siblings; ++i) {
    if (siblings > 1) {
      Tensor part = rows(weight, i * E, E);
      torch::stable::copy_(part, weights[i]);
    }
    if (bias) {
      Tensor part = columns(*bias, i * E, E);
      torch::stable::copy_(part, biases[i]);
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
    vectorised([&](auto width) {
      logits_kernel<width()>(x_data, weight_data, begin, end, I, N, logits_data);
    });
  });
}

Tensor router_gram(const Tensor& dlogits, const Tensor& x) {
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
    const int64_t num_blocks = (I + GRAM_COLUMNS - 1) / GRAM_COLUMNS;
    const int64_t work = T * N * GRAM_COLUMNS;
    torch::stable::parallel_for(0, num_blocks, grain(work), [&](int64_t first, int64_t last) {
      vectorised([&](auto width) {
        gram_kernel<width()>(left_data, x_data, first * GRAM_COLUMNS,
                             std::min(last * GRAM_COLUMNS, I), T, I, N, to);
      });
    });
  });
  return sums;
}

}  // namespace moelora
