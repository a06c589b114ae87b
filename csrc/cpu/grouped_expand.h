// One strip of `grouped_expand`: the packed columns of all matrices, and the sum of one row of y
// over its pairs. grouped_expand.cpp splits y into strips and rows, and is the only file that
// includes this header. In an anonymous namespace, the compiler inlines functions that are called
// once.
#pragma once

#include <vector>

#include "dropout.h"
#include "grouped.h"
#include "vectors.h"

namespace moelora {
namespace {

// Columns of a strip; fewer if the matrices have many ranks.
constexpr int64_t STRIP = 64;
// Terms of a partial sum: a longer sum would lose bits.
constexpr int64_t MAX_TERMS = 64;

// The term that a pair adds to its row of y: its units of u, times the packed units of its expert's
// matrix from `first_unit` on.
struct Term {
  int32_t first_unit;
  // Units of u; 0 if the pair is not routed.
  int32_t steps;
  int32_t expert;
};

// S is the dtype of u and of the matrices, C their compute dtype.
template <class S, class C>
struct Expand {
  const Routing& routing;
  int64_t first_expert;
  const Blocks& blocks;
  const Mask& mask;
  const S* u;                      // [P, width]
  int64_t width;                   // the largest rank
  std::vector<const S*> matrices;  // m x [O, R]
  // Strides of the matrices: from a feature to the next one, and from a rank to the next one.
  int64_t feature_stride;
  int64_t rank_stride;
  int64_t pairs_per_row;
  int64_t O;
  // One more rank of every expert, which dropout does not reach: coefficients [P] of the pairs
  // times expert_rows [n E, O] of their experts. Both are null if there is none.
  const S* coefficients = nullptr;
  const S* expert_rows = nullptr;

  // Returns how many units one column of all matrices has.
  template <class P>
  int64_t units_per_column() const {
    int64_t units = 0;
    for (int64_t rank : blocks.ranks) units += P::units(rank) + extra_units();
    return int64_t(matrices.size()) * units;
  }

  // Returns how many units of u_units a pair has.
  int64_t units_per_pair() const { return width + extra_units(); }

  // Packs the columns [strip, strip + columns) of all matrices: packed [units, strip_width], a row
  // of units for each PER_UNIT ranks. The units of an expert without pairs are not written.
  template <class P>
  MOELORA_INLINE void pack_strip(int64_t strip, int64_t columns, int64_t strip_width,
                                 typename P::Unit* packed) const {
    const S* expert_row = expert_rows;
    int64_t expert = first_expert;
    for (const S* matrix : matrices) {
      for (int64_t e = 0; e < blocks.num_experts(); ++e, ++expert) {
        const int64_t steps = P::units(blocks.ranks[e]);
        if (routing.begin(expert) < routing.end(expert)) {
          pack_expert<P>(matrix + blocks.begin[e] * rank_stride, blocks.ranks[e], strip, columns,
                         strip_width, packed);
          if (extra_units()) {
            P::interleave(expert_row + strip, nullptr, columns, packed + steps * strip_width);
          }
        }
        packed += (steps + extra_units()) * strip_width;
        if (extra_units()) expert_row += O;
      }
    }
  }

  // Returns the terms of all pairs, and fills u_units [P, units_per_pair] with their rows of u.
  template <class P>
  std::vector<Term> pack_terms(typename P::Unit* u_units) const {
    std::vector<Term> terms(routing.num_pairs());
    int64_t expert = first_expert;
    int64_t first_unit = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      for (int64_t e = 0; e < blocks.num_experts(); ++e, ++expert) {
        const int64_t steps = P::units(blocks.ranks[e]);
        for (int64_t position = routing.begin(expert); position < routing.end(expert); ++position) {
          const int64_t pair = routing.pair(position);
          terms[pair] = {int32_t(first_unit), int32_t(steps), int32_t(e)};
          typename P::Unit* pair_units = u_units + pair * units_per_pair();
          P::pack_row(u + position * width, blocks.ranks[e], pair_units);
          if (extra_units()) P::pack_row(coefficients + pair, 1, pair_units + steps);
        }
        first_unit += steps + extra_units();
      }
    }
    return terms;
  }

  // Sets sums [VECTORS] to the terms of row `index` of y, added in the order of slots. dropped_term
  // [strip width] is scratch space.
  template <class Level, int VECTORS, class Unit, class V>
  MOELORA_INLINE void sum_row(int64_t index, int64_t strip, int64_t columns, const Unit* packed,
                              const Term* terms, const Unit* u_units, C* dropped_term,
                              V* sums) const {
    constexpr int64_t LANES = Vector<C, Level{}()>::LANES;
    constexpr int64_t WIDTH = VECTORS * LANES;
    Partial<V, VECTORS> partial;
    for (int v = 0; v < VECTORS; ++v) sums[v] = V{};
    for (int64_t pair = index * pairs_per_row; pair < (index + 1) * pairs_per_row; ++pair) {
      const int64_t steps = terms[pair].steps;
      const Unit* left = u_units + pair * units_per_pair();
      const Unit* right = packed + terms[pair].first_unit * WIDTH;
      if (extra_units() && steps > 0) {
        add_product<Level>(left + steps, right + steps * WIDTH, 1, partial, sums);
      }
      if (!mask.active()) {
        add_product<Level>(left, right, steps, partial, sums);
        continue;
      }
      // With dropout, the term is computed alone, and masked in memory.
      Partial<V, VECTORS> term_partial;
      V term[VECTORS];
      for (int v = 0; v < VECTORS; ++v) term[v] = V{};
      add_product<Level>(left, right, steps, term_partial, term);
      term_partial.flush(term);
      for (int v = 0; v < VECTORS; ++v) store<C, Level{}()>(dropped_term + v * LANES, term[v]);
      mask.apply(dropped_term, index, strip, O, columns, terms[pair].expert);
      for (int v = 0; v < VECTORS; ++v) sums[v] += load<C, Level{}()>(dropped_term + v * LANES);
    }
    partial.flush(sums);
  }

 private:
  // Units that an expert's row of expert_rows adds to its matrix.
  int64_t extra_units() const { return expert_rows == nullptr ? 0 : 1; }

  // Sums of few terms. There are two sets, because each step of one set would wait for the step
  // before. Both start at zero again after MAX_TERMS steps.
  template <class V, int VECTORS>
  struct Partial {
    V even[VECTORS] = {};
    V odd[VECTORS] = {};
    int64_t num_terms = 0;

    // Adds the sets to sums, and clears them.
    MOELORA_INLINE void flush(V* sums) {
      for (int v = 0; v < VECTORS; ++v) {
        sums[v] += even[v] + odd[v];
        even[v] = odd[v] = V{};
      }
      num_terms = 0;
    }
  };

  // partial + sums += sum_n left[n] * right[n, :] over `steps` units.
  template <class Level, int VECTORS, class Unit, class V>
  MOELORA_INLINE void add_product(const Unit* left, const Unit* right, int64_t steps,
                                  Partial<V, VECTORS>& partial, V* sums) const {
    using U = typename Vector<Unit, Level{}()>::type;
    constexpr int64_t LANES = Vector<Unit, Level{}()>::LANES;
    for (int64_t begin = 0; begin < steps; begin += MAX_TERMS) {
      const int64_t end = std::min(steps, begin + MAX_TERMS);
      if (partial.num_terms + end - begin > MAX_TERMS) partial.flush(sums);
      partial.num_terms += end - begin;
      int64_t n = begin;
      for (; n + 2 <= end; n += 2) {
        const U first = U{} + left[n];
        const U second = U{} + left[n + 1];
        for (int v = 0; v < VECTORS; ++v) {
          partial.even[v] = multiply_add(partial.even[v], first,
                                         load<Unit, Level{}()>(right + (n * VECTORS + v) * LANES));
          partial.odd[v] =
              multiply_add(partial.odd[v], second,
                           load<Unit, Level{}()>(right + ((n + 1) * VECTORS + v) * LANES));
        }
      }
      if (n == end) continue;
      for (int v = 0; v < VECTORS; ++v) {
        partial.even[v] = multiply_add(partial.even[v], U{} + left[n],
                                       load<Unit, Level{}()>(right + (n * VECTORS + v) * LANES));
      }
    }
  }

  // Packs `count` ranks of one expert, if the features of a rank are dense.
  template <class P>
  MOELORA_INLINE void pack_ranks(const S* ranks, int64_t stride, int64_t count, int64_t strip,
                                 int64_t columns, int64_t strip_width,
                                 typename P::Unit* packed) const {
    for (int64_t j = 0; j < count; j += P::PER_UNIT) {
      const S* rank_row = ranks + j * stride + strip;
      P::interleave(rank_row, j + 1 < count ? rank_row + stride : nullptr, columns,
                    packed + j / P::PER_UNIT * strip_width);
    }
  }

  // Packs the matrix of one expert: packed [units of `rank`, strip_width].
  template <class P>
  MOELORA_INLINE void pack_expert(const S* matrix, int64_t rank, int64_t strip, int64_t columns,
                                  int64_t strip_width, typename P::Unit* packed) const {
    using Unit = typename P::Unit;
    if (feature_stride == 1) {
      pack_ranks<P>(matrix, rank_stride, rank, strip, columns, strip_width, packed);
      return;
    }
    // The ranks of a feature are dense: pack PANEL units of every column, and transpose them.
    for (int64_t j = 0; j < rank; j += P::PER_UNIT * PANEL) {
      alignas(64) Unit block[STRIP * PANEL];
      const int64_t count = std::min(P::PER_UNIT * PANEL, rank - j);
      for (int64_t o = 0; o < columns; ++o) {
        P::pack_row(matrix + (strip + o) * feature_stride + j, count, block + o * PANEL);
      }
      for (int64_t k = 0; k < P::units(count); ++k) {
        Unit* unit_row = packed + (j / P::PER_UNIT + k) * strip_width;
        for (int64_t o = 0; o < columns; ++o) unit_row[o] = block[o * PANEL + k];
      }
    }
  }
};

}  // namespace
}  // namespace moelora
