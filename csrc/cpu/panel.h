// Small matrix products in registers, for one thread.
//
//     dot_tokens    sums [tokens, N] += x weight^T       both are read along the summed dimension
//     panel         out [rows, columns] += left right    both are read in units, see Operand
//
// Numbers are widened before they are multiplied, and sums are in the compute dtype. bfloat16 is
// multiplied in pairs instead if the vector level can do that.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace moelora {

// `panel` computes a multiple of this many columns. With as many rows, every block that it works on
// has 16 vectors of sums with AVX-512, or 8 with narrower vectors.
constexpr int64_t PANEL = 16;

// Returns `count`, rounded up to a multiple of PANEL.
constexpr int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

template <class S, class C>
MOELORA_INLINE void widen_row(const S* row, int64_t count, C* widened) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) widened[j] = widen(row[j]);
}

template <class S, class C>
MOELORA_INLINE void widen_rows(const S* rows, int64_t stride, int64_t num_rows, int64_t count,
                               C* widened, int64_t widened_stride) {
  for (int64_t row = 0; row < num_rows; ++row) {
    widen_row(rows + row * stride, count, widened + row * widened_stride);
  }
}

// Returns the sum of all lanes. It adds the upper half to the lower half until 16 bytes are left.
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

// Returns sum + left * right, lane by lane.
template <class V>
MOELORA_INLINE V multiply_add(V sum, V left, V right) {
  return sum + left * right;
}

#if MOELORA_X86
// The same for bfloat16 pairs: a lane of 32 bits holds a pair, and both products are added to its
// sum. It returns a value, because a sum that is changed in place stays on the stack.
MOELORA_INLINE Vector<float, 64>::type multiply_add(Vector<float, 64>::type sum,
                                                    Vector<uint32_t, 64>::type left,
                                                    Vector<uint32_t, 64>::type right) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  return sum;
}
#endif

// How numbers of type S enter a product: widened, or in pairs if S is bfloat16 and BF16_PAIRS.
// A unit holds the numbers that one lane multiplies: PER_UNIT neighbours along the summed
// dimension.
template <class S, bool BF16_PAIRS>
struct Operand {
  static constexpr bool bf16_pairs = BF16_PAIRS && std::is_same_v<S, BFloat16>;
  static constexpr int64_t PER_UNIT = bf16_pairs ? 2 : 1;
  using Unit = std::conditional_t<bf16_pairs, uint32_t, Compute<S>>;
  // Whether `dot_tokens` reads rows of S in place; otherwise they are widened first.
  static constexpr bool in_place = bf16_pairs || std::is_same_v<S, Compute<S>>;
  // The elements that `dot_tokens` reads.
  using Element = std::conditional_t<bf16_pairs, S, Compute<S>>;

  // Returns how many units hold `count` numbers.
  static constexpr int64_t units(int64_t count) { return (count + PER_UNIT - 1) / PER_UNIT; }

  // Packs one row whose elements are summed over: units(count) units.
  static MOELORA_INLINE void pack_row(const S* row, int64_t count, Unit* packed) {
    if constexpr (bf16_pairs) {
      std::memcpy(packed, row, count / 2 * sizeof(Unit));
      if (count % 2) packed[count / 2] = row[count - 1].x;
    } else {
      widen_row(row, count, packed);
    }
  }

  // Packs up to PER_UNIT rows that are summed over: `count` units. `second` may be null, which
  // stands for zeros.
  static MOELORA_INLINE void interleave(const S* first, const S* second, int64_t count,
                                        Unit* packed) {
    if constexpr (bf16_pairs) {
      if (second == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) packed[j] = first[j].x;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          packed[j] = uint32_t{first[j].x} | uint32_t{second[j].x} << 16;
        }
      }
    } else {
      widen_row(first, count, packed);
    }
  }
};

// sums[t, row] += <x[t], weight[row]> for TOKENS tokens and ROWS rows, all in registers. Q is a
// compute dtype, or BFloat16 if the level multiplies pairs of it. AHEAD: the next ROWS rows are
// fetched into L2.
template <int BYTES, int TOKENS, int ROWS, bool AHEAD, class Q, class C>
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
    U x_vectors[TOKENS];
    for (int t = 0; t < TOKENS; ++t) x_vectors[t] = load<Unit, BYTES>(x[t] + j);
    for (int row = 0; row < ROWS; ++row) {
      const Q* source = weight + row * weight_stride + j;
      if constexpr (AHEAD) __builtin_prefetch(source + ROWS * weight_stride, 0, 2);
      const U weight_vector = load<Unit, BYTES>(source);
      for (int t = 0; t < TOKENS; ++t) {
        sum[t][row] = multiply_add(sum[t][row], x_vectors[t], weight_vector);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int row = 0; row < ROWS; ++row) {
      C tail = 0;
      for (int64_t k = j; k < count; ++k) {
        tail += widen(x[t][k]) * widen(weight[row * weight_stride + k]);
      }
      sums[t * sums_stride + row] += sum_lanes<C, BYTES>(sum[t][row]) + tail;
    }
  }
}

// sums[t, row] += <x[t], weight[row]> for TOKENS tokens and N rows of the weight.
template <int BYTES, int TOKENS, bool AHEAD, class Q, class C>
MOELORA_INLINE void dot_rows(const Q* const* x, const Q* weight, int64_t weight_stride,
                             int64_t count, int64_t N, C* sums, int64_t sums_stride) {
  // 3 x 8 sums, and the operands, fill the 32 registers of AVX-512. 3 x 4 sums fill the 16
  // registers of narrower vectors.
  constexpr int ROWS = BYTES == 64 ? 8 : 4;
  int64_t row = 0;
  for (; row + ROWS <= N; row += ROWS) {
    dot_block<BYTES, TOKENS, ROWS, AHEAD>(x, weight + row * weight_stride, weight_stride, count,
                                          sums + row, sums_stride);
  }
  for (; row + 2 <= N; row += 2) {
    dot_block<BYTES, TOKENS, 2, false>(x, weight + row * weight_stride, weight_stride, count,
                                       sums + row, sums_stride);
  }
  for (; row < N; ++row) {
    dot_block<BYTES, TOKENS, 1, false>(x, weight + row * weight_stride, weight_stride, count,
                                       sums + row, sums_stride);
  }
}

// `dot_rows` for up to three tokens.
template <int BYTES, bool AHEAD = false, class Q, class C>
MOELORA_INLINE void dot_tokens(int64_t tokens, const Q* const* x, const Q* weight,
                               int64_t weight_stride, int64_t count, int64_t N, C* sums,
                               int64_t sums_stride) {
  if (tokens == 3) {
    dot_rows<BYTES, 3, AHEAD>(x, weight, weight_stride, count, N, sums, sums_stride);
  } else if (tokens == 2) {
    dot_rows<BYTES, 2, AHEAD>(x, weight, weight_stride, count, N, sums, sums_stride);
  } else if (tokens == 1) {
    dot_rows<BYTES, 1, AHEAD>(x, weight, weight_stride, count, N, sums, sums_stride);
  }
}

// A matrix of which `panel` reads one unit at a time: unit (row, n) is
// data[row * row_stride + n * step_stride].
template <class Unit>
struct Factors {
  const Unit* data;
  int64_t row_stride;
  int64_t step_stride;
};

// out[row][column] += sum_n left(row, n) * right[n, column] for ROWS rows of VECTORS vectors, all
// in registers.
template <int BYTES, int ROWS, int VECTORS, class Unit, class C>
MOELORA_INLINE void panel_block(const Factors<Unit>& left, const Unit* right, int64_t right_stride,
                                int64_t steps, C* const* out) {
  using V = typename Vector<C, BYTES>::type;
  using U = typename Vector<Unit, BYTES>::type;
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  static_assert(sizeof(Unit) == sizeof(C));
  // A unit may be two numbers in a row of bfloat16, at any even address.
  typedef Unit unaligned __attribute__((may_alias, aligned(2)));
  V sum[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) sum[row][v] = load<C, BYTES>(out[row] + v * LANES);
  }
  for (int64_t n = 0; n < steps; ++n) {
    U right_vectors[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      right_vectors[v] = load<Unit, BYTES>(right + n * right_stride + v * LANES);
    }
    const Unit* factor = left.data + n * left.step_stride;
    for (int row = 0; row < ROWS; ++row) {
      const U left_vector =
          U{} + *reinterpret_cast<const unaligned*>(factor + row * left.row_stride);
      for (int v = 0; v < VECTORS; ++v) {
        sum[row][v] = multiply_add(sum[row][v], left_vector, right_vectors[v]);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int v = 0; v < VECTORS; ++v) store<C, BYTES>(out[row] + v * LANES, sum[row][v]);
  }
}

// `panel_block` for a multiple of 4 rows.
template <int BYTES, int VECTORS, class Unit, class C>
MOELORA_INLINE void panel_rows(int64_t rows, const Factors<Unit>& left, const Unit* right,
                               int64_t right_stride, int64_t steps, C* out, int64_t out_stride) {
  constexpr int SUMS = BYTES == 64 ? 16 : 8;
  constexpr int ROWS = SUMS / VECTORS;
  int64_t row = 0;
  const auto blocks = [&](auto block_rows) MOELORA_INLINE_LAMBDA {
    constexpr int BLOCK = block_rows();
    for (; row + BLOCK <= rows; row += BLOCK) {
      const Factors<Unit> left_rows{left.data + row * left.row_stride, left.row_stride,
                                    left.step_stride};
      C* out_rows[BLOCK];
      for (int64_t k = 0; k < BLOCK; ++k) out_rows[k] = out + (row + k) * out_stride;
      panel_block<BYTES, BLOCK, VECTORS>(left_rows, right, right_stride, steps, out_rows);
    }
  };
  blocks(std::integral_constant<int, ROWS>{});
  if constexpr (ROWS > 8) blocks(std::integral_constant<int, 8>{});
  if constexpr (ROWS > 4) blocks(std::integral_constant<int, 4>{});
}

// out[row, column] += sum_n left(row, n) * right[n, column]. Rows are a multiple of 4, columns of
// PANEL; n counts `steps` units.
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
