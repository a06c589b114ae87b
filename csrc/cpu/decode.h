// The kernels of `decode`: the shrink and the expand of a few tokens, with the experts that each
// token uses. decode.cpp is the only file that includes this header. In an anonymous namespace, the
// compiler inlines functions that are called once.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "gate.h"
#include "panel.h"

namespace moelora {
namespace {

// A matrix in row-major order. Its rows are dense; their stride may be larger than a row.
template <class S>
struct Matrix {
  const S* data;
  int64_t stride;
};

// A token that uses an expert: the factor scale * gate, and where h begins.
template <class C>
struct Pair {
  int64_t token;
  C factor;
  int64_t h;
};

// An expert that at least one token uses: the pairs [first, last), in the order of their tokens.
struct UsedExpert {
  int64_t sibling;
  int64_t expert;
  int64_t first;
  int64_t last;
};

// --- shrink

// Rows of A, and tokens, of one task.
constexpr int64_t TASK_ROWS = 8;
constexpr int64_t TASK_TOKENS = 6;
// Columns of a block of x and A that is widened: 22 KiB of float32.
constexpr int64_t WIDENED_COLUMNS = 512;

// h of some tokens and some rows of A: h[k * stride + row] = <x[tokens[k]], A[first_row + row]>.
struct ShrinkTask {
  int64_t sibling;
  int64_t first_row;
  int64_t num_rows;
  const int64_t* tokens;
  int64_t num_tokens;
  int64_t h;
  int64_t stride;
};

// Adds the tasks for `rank` rows of A and `num_tokens` tokens, whose h begins at `h`.
inline void add_tasks(int64_t sibling, int64_t a_row, int64_t rank, const int64_t* tokens,
                      int64_t num_tokens, int64_t h, std::vector<ShrinkTask>& tasks) {
  for (int64_t row = 0; row < rank; row += TASK_ROWS) {
    for (int64_t k = 0; k < num_tokens; k += TASK_TOKENS) {
      tasks.push_back({.sibling = sibling,
                       .first_row = a_row + row,
                       .num_rows = std::min(TASK_ROWS, rank - row),
                       .tokens = tokens + k,
                       .num_tokens = std::min(TASK_TOKENS, num_tokens - k),
                       .h = h + k * rank + row,
                       .stride = rank});
    }
  }
}

// Computes a task. h is zero before. Numbers that `dot_tokens` does not read in place are widened
// in blocks of WIDENED_COLUMNS; others can be fetched AHEAD.
template <class Width, bool AHEAD = false, class S, class W, class C>
MOELORA_INLINE void shrink(const ShrinkTask& task, const S* x, int64_t I, Matrix<W> a, C* h) {
  constexpr int BYTES = Width{}();
  constexpr int64_t TOKENS = 3;
  constexpr bool in_place = std::is_same_v<S, W> && Operand<S, Width::bf16_pairs>::in_place;
  constexpr int64_t widened_rows = std::is_same_v<W, C> ? 0 : TASK_ROWS;
  alignas(64) C widened_x[in_place ? 1 : TOKENS * WIDENED_COLUMNS];
  alignas(64) C widened_a[in_place ? 1 : widened_rows * WIDENED_COLUMNS + 1];
  const W* a_rows = a.data + task.first_row * a.stride;
  for (int64_t k = 0; k < task.num_tokens; k += TOKENS) {
    const int64_t tokens = std::min(TOKENS, task.num_tokens - k);
    const S* x_rows[TOKENS] = {};
    for (int64_t t = 0; t < tokens; ++t) x_rows[t] = x + task.tokens[k + t] * I;
    C* sums = h + task.h + k * task.stride;
    if constexpr (in_place) {
      dot_tokens<BYTES, AHEAD>(tokens, x_rows, a_rows, a.stride, I, task.num_rows, sums,
                               task.stride);
    } else {
      const C* widened_tokens[TOKENS] = {widened_x, widened_x + WIDENED_COLUMNS,
                                         widened_x + 2 * WIDENED_COLUMNS};
      for (int64_t column = 0; column < I; column += WIDENED_COLUMNS) {
        const int64_t count = std::min(WIDENED_COLUMNS, I - column);
        for (int64_t t = 0; t < tokens; ++t) {
          widen_row(x_rows[t] + column, count, widened_x + t * WIDENED_COLUMNS);
        }
        if constexpr (std::is_same_v<W, C>) {
          dot_tokens<BYTES>(tokens, widened_tokens, a_rows + column, a.stride, count, task.num_rows,
                            sums, task.stride);
        } else {
          widen_rows(a_rows + column, a.stride, task.num_rows, count, widened_a, WIDENED_COLUMNS);
          dot_tokens<BYTES>(tokens, widened_tokens, static_cast<const C*>(widened_a),
                            WIDENED_COLUMNS, count, task.num_rows, sums, task.stride);
        }
      }
    }
  }
}

// --- expand

// The expand computes the base product of up to this many tokens, if `dot_tokens` reads x in place.
// It reads W once, and does not wait for the columns of B. Time of a layer / nn.Linear with W
// [4096, 4096] on 2 threads of a Zen 4, cold caches: with ATen's product -> with this one.
//     tokens      1              2              4              16
//     bfloat16    1.17 -> 0.94   1.08 -> 0.79   1.14 -> 0.78   1.14 -> 0.89
//     float32     1.06 -> 0.72   1.04 -> 0.35   1.06 -> 0.33   1.03 -> 0.55
// Numbers that are widened first would be slower than ATen: 1.50 for bfloat16 without pairs. The
// limit leaves room for processors with a matrix unit, which ATen uses for many tokens.
constexpr int64_t BASE_TOKENS = 16;
// Ranks of a partial sum: a longer sum would lose bits. Their columns of B stay in L1.
constexpr int64_t RANK_BLOCK = 64;
// Output columns of a block: the lanes of the widest vector of float32.
constexpr int64_t BLOCK_COLUMNS = 16;
// Column blocks of a strip: the work between two choices of a dtype or a vector level.
constexpr int64_t STRIP_BLOCKS = 4;
// How many column blocks ahead B is fetched.
constexpr int64_t PREFETCH_BLOCKS = 4;

// Returns lanes 0, 0, 1, 1, ... of the lower halves of two vectors in turn; or of the upper halves.
template <int FIRST, class V, int... LANE>
MOELORA_INLINE V interleave(V left, V right, std::integer_sequence<int, LANE...>) {
  constexpr int LANES = sizeof...(LANE);
  return __builtin_shufflevector(left, right, (FIRST + LANE / 2 + LANE % 2 * LANES)...);
}

// Transposes a square of vectors. Each step moves the highest bit of the row number to the lowest
// bit of the lane number, and the highest bit of the lane number to the lowest of the row number.
template <int LANES, class V>
MOELORA_INLINE void transpose(V (&square)[LANES]) {
  constexpr auto ALL = std::make_integer_sequence<int, LANES>{};
  for (int step = 1; step < LANES; step *= 2) {
    V next[LANES];
    for (int row = 0; row < LANES / 2; ++row) {
      next[2 * row] = interleave<0>(square[row], square[row + LANES / 2], ALL);
      next[2 * row + 1] = interleave<LANES / 2>(square[row], square[row + LANES / 2], ALL);
    }
    for (int row = 0; row < LANES; ++row) square[row] = next[row];
  }
}

// Widens two 16-bit numbers in each lane: the numbers in the low halves, or in the high halves.
template <bool HIGH, class W, class V, class U>
MOELORA_INLINE V widen_halves(U pairs) {
  if constexpr (std::is_same_v<W, BFloat16>) {
    return (V)(HIGH ? pairs & 0xFFFF0000 : pairs << 16);
  } else {
    // The steps of `widen`.
    const U number = HIGH ? pairs >> 16 : pairs;
    const U magnitude = (number & 0x7FFF) << 13;
    const U sign = (number & 0x8000) << 16;
    const U finite = (U)((V)magnitude * 0x1p112f);
    const U special = magnitude | 0x7F800000;
    const U is_special = (U)(magnitude >= 0x0F800000);
    return (V)(sign | (is_special & special) | (~is_special & finite));
  }
}

// Fills out [count, BLOCK_COLUMNS] with the transpose of `count` columns of BLOCK_COLUMNS rows,
// widened. Vectors take most columns, and vectors of half the width the rest. A lane of a vector
// holds one number of C, or two neighbours of 16 bits.
template <int BYTES, class W, class C>
MOELORA_INLINE void transpose_columns(Matrix<W> rows, int64_t count, C* out) {
  constexpr int64_t PER_LANE = sizeof(C) / sizeof(W);
  using Unit = std::conditional_t<PER_LANE == 2, uint32_t, C>;
  using U = typename Vector<Unit, BYTES>::type;
  using V = typename Vector<C, BYTES>::type;
  constexpr int LANES = int(Vector<C, BYTES>::LANES);
  int64_t column = 0;
  for (; column + PER_LANE * LANES <= count; column += PER_LANE * LANES) {
    for (int64_t first = 0; first < BLOCK_COLUMNS; first += LANES) {
      U square[LANES];
      for (int row = 0; row < LANES; ++row) {
        square[row] = load<Unit, BYTES>(rows.data + (first + row) * rows.stride + column);
      }
      transpose<LANES>(square);
      C* first_out = out + column * BLOCK_COLUMNS + first;
      for (int row = 0; row < LANES; ++row, first_out += PER_LANE * BLOCK_COLUMNS) {
        if constexpr (PER_LANE == 2) {
          store<C, BYTES>(first_out, widen_halves<false, W, V>(square[row]));
          store<C, BYTES>(first_out + BLOCK_COLUMNS, widen_halves<true, W, V>(square[row]));
        } else {
          store<C, BYTES>(first_out, square[row]);
        }
      }
    }
  }
  if (column == count) return;
  const Matrix<W> rest{rows.data + column, rows.stride};
  C* rest_out = out + column * BLOCK_COLUMNS;
  if constexpr (BYTES > 16) {
    transpose_columns<BYTES / 2>(rest, count - column, rest_out);
  } else {
    for (int64_t k = 0; k < count - column; ++k) {
      for (int64_t row = 0; row < BLOCK_COLUMNS; ++row) {
        rest_out[k * BLOCK_COLUMNS + row] = C(widen(rest.data[row * rest.stride + k]));
      }
    }
  }
}

// The same for the last rows of a matrix; the other rows count as zeros.
template <class W, class C>
MOELORA_INLINE void transpose_tail(Matrix<W> rows, int64_t num_rows, int64_t count, C* out) {
  std::fill_n(out, count * BLOCK_COLUMNS, C{0});
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < count; ++k) {
      out[k * BLOCK_COLUMNS + row] = C(widen(rows.data[row * rows.stride + k]));
    }
  }
}

// sums[p] += factor_p * sum_k h_p[k] columns[k] for PAIRS pairs. Each sum has 4 chains of
// additions, so its bits do not depend on PAIRS.
template <int BYTES, int PAIRS, class C>
MOELORA_INLINE void add_pairs(const Pair<C>* pairs, const C* h, const C* columns, int64_t count,
                              C* sums) {
  using V = typename Vector<C, BYTES>::type;
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  constexpr int CHAINS = 4;
  for (int64_t lane = 0; lane < BLOCK_COLUMNS; lane += LANES) {
    V chains[PAIRS][CHAINS];
    for (int p = 0; p < PAIRS; ++p) {
      for (int chain = 0; chain < CHAINS; ++chain) chains[p][chain] = V{};
    }
    int64_t k = 0;
    for (; k + CHAINS <= count; k += CHAINS) {
      for (int chain = 0; chain < CHAINS; ++chain) {
        const V column = load<C, BYTES>(columns + (k + chain) * BLOCK_COLUMNS + lane);
        for (int p = 0; p < PAIRS; ++p) {
          const V factor = V{} + h[pairs[p].h + k + chain];
          chains[p][chain] = multiply_add(chains[p][chain], factor, column);
        }
      }
    }
    for (; k < count; ++k) {
      const V column = load<C, BYTES>(columns + k * BLOCK_COLUMNS + lane);
      for (int p = 0; p < PAIRS; ++p) {
        chains[p][0] = multiply_add(chains[p][0], V{} + h[pairs[p].h + k], column);
      }
    }
    for (int p = 0; p < PAIRS; ++p) {
      C* sum = sums + pairs[p].token * BLOCK_COLUMNS + lane;
      const V total = (chains[p][0] + chains[p][1]) + (chains[p][2] + chains[p][3]);
      store<C, BYTES>(sum, multiply_add(load<C, BYTES>(sum), V{} + pairs[p].factor, total));
    }
  }
}

// Asks for the columns of B that the block after next reads: the rows are far apart, so the
// processor does not foresee them.
template <class W>
MOELORA_INLINE void prefetch(Matrix<W> rows, int64_t num_rows, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(W);
  for (int64_t row = 0; row < num_rows; ++row) {
    const W* data = rows.data + row * rows.stride;
    for (int64_t k = 0; k < count; k += LINE) __builtin_prefetch(data + k);
  }
}

// Adds the terms of one expert to the column blocks [first_block, last_block) of y [T, O].
// sums [blocks, T, BLOCK_COLUMNS]; the expert has `rank` columns of b from `column` on.
template <int BYTES, class W, class C>
MOELORA_INLINE void expand(const UsedExpert& expert, const Pair<C>* pairs, const C* h, Matrix<W> b,
                           int64_t O, int64_t column, int64_t rank, int64_t first_block,
                           int64_t last_block, int64_t T, C* sums) {
  alignas(64) C columns[RANK_BLOCK * BLOCK_COLUMNS];
  for (int64_t block = first_block; block < last_block; ++block, sums += T * BLOCK_COLUMNS) {
    const int64_t row = block * BLOCK_COLUMNS;
    const int64_t ahead = row + PREFETCH_BLOCKS * BLOCK_COLUMNS;
    for (int64_t first = 0; first < rank; first += RANK_BLOCK) {
      const int64_t count = std::min(RANK_BLOCK, rank - first);
      const W* data = b.data + column + first;
      prefetch(Matrix<W>{data + ahead * b.stride, b.stride},
               std::clamp<int64_t>(O - ahead, 0, BLOCK_COLUMNS), count);
      const Matrix<W> rows{data + row * b.stride, b.stride};
      if (row + BLOCK_COLUMNS <= O) {
        transpose_columns<BYTES>(rows, count, columns);
      } else {
        transpose_tail(rows, O - row, count, columns);
      }
      int64_t pair = expert.first;
      for (; pair + 2 <= expert.last; pair += 2) {
        add_pairs<BYTES, 2>(pairs + pair, h + first, columns, count, sums);
      }
      if (pair < expert.last) {
        add_pairs<BYTES, 1>(pairs + pair, h + first, columns, count, sums);
      }
    }
  }
}

// Writes y [count] = start + sums. `start` is null for zeros.
template <class Y, class C>
MOELORA_INLINE void write_row(const Y* start, const C* sums, int64_t count, Y* y) {
  for (int64_t k = 0; k < count; ++k) {
    y[k] = narrow<Y>(start ? C(widen(start[k])) + sums[k] : sums[k]);
  }
}

// Writes the column blocks [first_block, last_block) of y [T, O] = start + sums. `start` is null
// for zeros; its stride is 0 if it is a vector.
template <class Y, class C>
MOELORA_INLINE void write_columns(const Y* start, int64_t start_stride, const C* sums, int64_t T,
                                  int64_t O, int64_t first_block, int64_t last_block, Y* y) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t column = block * BLOCK_COLUMNS;
    for (int64_t t = 0; t < T; ++t, sums += BLOCK_COLUMNS) {
      const Y* start_row = start ? start + t * start_stride + column : nullptr;
      Y* y_row = y + t * O + column;
      if (column + BLOCK_COLUMNS <= O) {
        write_row(start_row, sums, BLOCK_COLUMNS, y_row);
      } else {
        write_row(start_row, sums, O - column, y_row);
      }
    }
  }
}

}  // namespace
}  // namespace moelora
