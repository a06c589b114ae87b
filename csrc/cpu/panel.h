// Products of small panels in registers and L1: rows widened once, sums kept in the compute dtype.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace moelora {

// Panels are padded to a multiple of this many rows and columns: 16 sums of AVX-512 vectors, or 8
// of AVX2, in every shape of `panel`.
constexpr int64_t PANEL = 16;

constexpr int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

template <class S, class C>
MOELORA_INLINE void widen_row(const S* from, int64_t count, C* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
}

template <class S, class C>
MOELORA_INLINE void widen_rows(const S* from, int64_t stride, int64_t num_rows, int64_t count,
                               C* to, int64_t to_stride) {
  for (int64_t row = 0; row < num_rows; ++row) {
    widen_row(from + row * stride, count, to + row * to_stride);
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

// sum + left * right, lane by lane.
template <class V>
MOELORA_INLINE V multiply_add(V sum, V left, V right) {
  return sum + left * right;
}

#if MOELORA_X86
// The same for bfloat16 pairs, one pair to a lane of 32 bits: both products are added to its sum.
// By value: a sum that is an operand in place is kept on the stack.
MOELORA_INLINE Vector<float, 64>::type multiply_add(Vector<float, 64>::type sum,
                                                    Vector<uint32_t, 64>::type left,
                                                    Vector<uint32_t, 64>::type right) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  return sum;
}
#endif

// How numbers of type S enter a product: widened, or as pairs of bfloat16 where `PAIRS` has them.
// A unit holds what one lane multiplies: PER neighbours in the direction that is summed over.
template <class S, bool PAIRS>
struct Operand {
  static constexpr bool pairs = PAIRS && std::is_same_v<S, BFloat16>;
  static constexpr int64_t PER = pairs ? 2 : 1;
  using Unit = std::conditional_t<pairs, uint32_t, Compute<S>>;
  // Whether rows of S can be read as they are by `dot_tokens`, and what it reads.
  static constexpr bool direct = pairs || std::is_same_v<S, Compute<S>>;
  using Element = std::conditional_t<pairs, S, Compute<S>>;

  static constexpr int64_t units(int64_t count) { return (count + PER - 1) / PER; }

  // A row whose own elements are summed over.
  static MOELORA_INLINE void along(const S* from, int64_t count, Unit* to) {
    if constexpr (pairs) {
      std::memcpy(to, from, count / 2 * sizeof(Unit));
      if (count % 2) to[count / 2] = from[count - 1].x;
    } else {
      widen_row(from, count, to);
    }
  }

  // Up to PER rows that are summed over, side by side; a missing second row is zero.
  static MOELORA_INLINE void across(const S* first, const S* second, int64_t count, Unit* to) {
    if constexpr (pairs) {
      if (second == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) to[j] = first[j].x;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          to[j] = uint32_t{first[j].x} | uint32_t{second[j].x} << 16;
        }
      }
    } else {
      widen_row(first, count, to);
    }
  }
};

// sums[t, row] += <x[t], weight[row]> for TOKENS x ROWS pairs, all in registers. Q is a compute
// dtype, or BFloat16 where its pairs can be multiplied.
template <int BYTES, int TOKENS, int ROWS, class Q, class C>
MOELORA_INLINE void dot_block(const Q* const* x, const Q* weight, int64_t weight_stride,
                              int64_t count, C* sums, int64_t sums_stride) {
  using V = typename Vector<C, BYTES>::type;
  using Unit = std::conditional_t<std::is_same_v<Q, C>, C, uint32_t>;
  using U = typename Vector<Unit, BYTES>::type;
  constexpr int64_t ELEMENTS = BYTES / sizeof(Q);
  V sum[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t) {
    for (int row = 0; row < ROWS; ++row) sum[t][row] = V{};
  }
  int64_t j = 0;
  for (; j + ELEMENTS <= count; j += ELEMENTS) {
    U of_x[TOKENS];
    for (int t = 0; t < TOKENS; ++t) of_x[t] = load<Unit, BYTES>(x[t] + j);
    for (int row = 0; row < ROWS; ++row) {
      const U of_weight = load<Unit, BYTES>(weight + row * weight_stride + j);
      for (int t = 0; t < TOKENS; ++t) {
        sum[t][row] = multiply_add(sum[t][row], of_x[t], of_weight);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      C rest = 0;
      for (int64_t k = j; k < count; ++k) {
        rest += widen(x[t][k]) * widen(weight[row * weight_stride + k]);
      }
      sums[t * sums_stride + row] += sum_lanes<C, BYTES>(sum[t][row]) + rest;
    }
  }
}

// sums[t, row] += <x[t], weight[row]> for TOKENS tokens and N rows.
template <int BYTES, int TOKENS, class Q, class C>
MOELORA_INLINE void dot_rows(const Q* const* x, const Q* weight, int64_t weight_stride,
                             int64_t count, int64_t N, C* sums, int64_t sums_stride) {
  // 3 x 8 sums fill the 32 registers of AVX-512, 3 x 4 the 16 of everything narrower.
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  int64_t row = 0;
  for (; row + ROWS <= N; row += ROWS) {
    dot_block<BYTES, TOKENS, ROWS>(x, weight + row * weight_stride, weight_stride, count,
                                   sums + row, sums_stride);
  }
  for (; row + 2 <= N; row += 2) {
    dot_block<BYTES, TOKENS, 2>(x, weight + row * weight_stride, weight_stride, count, sums + row,
                                sums_stride);
  }
  for (; row < N; ++row) {
    dot_block<BYTES, TOKENS, 1>(x, weight + row * weight_stride, weight_stride, count, sums + row,
                                sums_stride);
  }
}

// `dot_rows` for up to three tokens.
template <int BYTES, class Q, class C>
MOELORA_INLINE void dot_tokens(int64_t tokens, const Q* const* x, const Q* weight,
                               int64_t weight_stride, int64_t count, int64_t N, C* sums,
                               int64_t sums_stride) {
  if (tokens == 3) {
    dot_rows<BYTES, 3>(x, weight, weight_stride, count, N, sums, sums_stride);
  } else if (tokens == 2) {
    dot_rows<BYTES, 2>(x, weight, weight_stride, count, N, sums, sums_stride);
  } else if (tokens == 1) {
    dot_rows<BYTES, 1>(x, weight, weight_stride, count, N, sums, sums_stride);
  }
}

// A matrix that is read one unit at a time: element (j, n) at data[j * row + n * step].
template <class Unit>
struct Factors {
  const Unit* data;
  int64_t row;
  int64_t step;
};

// out[row][column] += sum_n left(row, n) * right[n, column] for ROWS x VECTORS vectors.
template <int BYTES, int ROWS, int VECTORS, class Unit, class C>
MOELORA_INLINE void panel_block(const Factors<Unit>& left, const Unit* right, int64_t right_stride,
                                int64_t steps, C* const* out) {
  using V = typename Vector<C, BYTES>::type;
  using U = typename Vector<Unit, BYTES>::type;
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  static_assert(sizeof(Unit) == sizeof(C));
  // A pair may be two numbers of a row of bfloat16.
  typedef Unit anywhere __attribute__((may_alias, aligned(2)));
  V sum[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) sum[row][v] = load<C, BYTES>(out[row] + v * LANES);
  }
  for (int64_t n = 0; n < steps; ++n) {
    U of_right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      of_right[v] = load<Unit, BYTES>(right + n * right_stride + v * LANES);
    }
    const Unit* factor = left.data + n * left.step;
    for (int row = 0; row < ROWS; ++row) {
      const U of_left = U{} + *reinterpret_cast<const anywhere*>(factor + row * left.row);
      for (int v = 0; v < VECTORS; ++v) {
        sum[row][v] = multiply_add(sum[row][v], of_left, of_right[v]);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) store<C, BYTES>(out[row] + v * LANES, sum[row][v]);
  }
}

template <int BYTES, int VECTORS, class Unit, class C>
MOELORA_INLINE void panel_rows(int64_t rows, const Factors<Unit>& left, const Unit* right,
                               int64_t right_stride, int64_t steps, C* out, int64_t out_stride) {
  constexpr int SUMS = BYTES == 64 ? 16 : 8;
  constexpr int ROWS = SUMS / VECTORS;
  for (int64_t row = 0; row < rows; row += ROWS) {
    const Factors<Unit> of_rows{left.data + row * left.row, left.row, left.step};
    C* to[ROWS];
    for (int64_t k = 0; k < ROWS; ++k) to[k] = out + (row + k) * out_stride;
    panel_block<BYTES, ROWS, VECTORS>(of_rows, right, right_stride, steps, to);
  }
}

// out[row, column] += sum_n left(row, n) * right[n, column]; rows and columns multiples of PANEL.
template <int BYTES, class Unit, class C>
MOELORA_INLINE void panel(int64_t rows, int64_t columns, const Factors<Unit>& left,
                          const Unit* right, int64_t right_stride, int64_t steps, C* out,
                          int64_t out_stride) {
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  int64_t column = 0;
  if constexpr (BYTES == 64) {
    for (; column + 4 * LANES <= columns; column += 4 * LANES) {
      panel_rows<BYTES, 4>(rows, left, right + column, right_stride, steps, out + column,
                           out_stride);
    }
  }
  for (; column + 2 * LANES <= columns; column += 2 * LANES) {
    panel_rows<BYTES, 2>(rows, left, right + column, right_stride, steps, out + column, out_stride);
  }
  for (; column < columns; column += LANES) {
    panel_rows<BYTES, 1>(rows, left, right + column, right_stride, steps, out + column, out_stride);
  }
}

}  // namespace moelora
