// The gradients of the adapters in `ffn_inner_backward`, one strip after the other:
//     dBg = dz_gate^T u_gate        dBu = dz_up^T u_up        dAd = dh^T dropout(a)
// ffn_inner_backward.cpp is the only file that includes this header.
#pragma once

#include <array>
#include <vector>

#include "ffn_inner.h"

namespace moelora {
namespace {

// Pairs of a partial sum: a longer sum would lose bits.
constexpr int64_t MAX_TERMS = 256;
// The gradients: dBg, dBu and dAd.
constexpr int64_t ADAPTERS = 3;

// A thread's sums of the strips of a range, one after the other, and scratch space.
template <class C, class Unit>
struct GradSums {
  // dBg^T, dBu^T and dAd, [strips, ranks, STRIP]: of the last pairs of each expert, and of the
  // pairs before.
  C* partial[ADAPTERS];
  C* total[ADAPTERS];
  Unit* rank_units;  // [CHUNK, padded(width)]
  Unit* row_units;   // [CHUNK, STRIP]
  int64_t* terms;    // [strips, E], the pairs in `partial`
  bool* has_total;   // [strips, E]

  // Returns the sums of a strip. `ranks` and `num_experts` are the sizes of a strip.
  MOELORA_INLINE GradSums strip(int64_t index, int64_t ranks, int64_t num_experts) const {
    GradSums sums = *this;
    for (int64_t i = 0; i < ADAPTERS; ++i) {
      sums.partial[i] += index * ranks * STRIP;
      sums.total[i] += index * ranks * STRIP;
    }
    sums.terms += index * num_experts;
    sums.has_total += index * num_experts;
    return sums;
  }
};

template <class S, class C>
struct AdapterGrads {
  const Inner<S, C>& inner;
  // dBg [F, R], dBu [F, R] and dAd [R, F], all in S or all in C; empty if they are not needed.
  std::vector<Tensor> grads;
  // u_gate, u_up and dh, [P, width].
  std::array<const Tensor*, ADAPTERS> coefficients;

  bool needed() const { return !grads.empty(); }

  // Starts a strip.
  template <class Sums>
  MOELORA_INLINE void clear(const Sums& sums) const {
    for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
      sums.terms[e] = 0;
      sums.has_total[e] = false;
      if (!inner.has_pairs(e)) continue;
      for (C* partial : sums.partial) {
        std::fill_n(partial + inner.begin[e] * STRIP, padded(inner.blocks.ranks[e]) * STRIP, C{0});
      }
    }
  }

  // Adds the terms of a chunk. values [CHUNK, STRIP] are dz_gate, dz_up and dropout(a).
  template <class Level, class V, class Sums>
  MOELORA_INLINE void add(const Chunk& chunk, V* const* values, const Sums& sums) const {
    int64_t& terms = sums.terms[chunk.expert];
    if (terms + chunk.size() > MAX_TERMS) {
      add_partial(chunk.expert, sums);
      terms = 0;
    }
    terms += chunk.size();
    // One call for all, because every call is inlined.
    for (int64_t i = 0; i < ADAPTERS; ++i) add_to<Level>(i, chunk, values[i], sums);
  }

  // Writes the gradients of a strip.
  template <class Level, class Sums>
  MOELORA_INLINE void finish(int64_t strip, const Sums& sums) const {
    for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
      if (sums.has_total[e]) add_partial(e, sums);
    }
    if (grads[0].scalar_type() == inner.tensors.dtype) {
      write<Level, S>(strip, sums);
    } else {
      write<Level, C>(strip, sums);
    }
  }

 private:
  template <class Level, class V, class Sums>
  MOELORA_INLINE void add_to(int64_t i, const Chunk& chunk, const V* values,
                             const Sums& sums) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Unit = typename P::Unit;
    const int64_t width = inner.tensors.width, rank = inner.blocks.ranks[chunk.expert];
    const int64_t w = padded(rank);
    const S* data = coefficients[i]->const_data_ptr<S>();
    const auto coefficient_row = [&](int64_t n) MOELORA_INLINE_LAMBDA {
      return data + inner.token_blocks.position(chunk.begin + n) * width;
    };
    const Unit* right = Inner<S, C>::template units_of<P>(values);
    for (int64_t n = 0; n < chunk.size(); n += P::PER_UNIT) {
      const bool has_second = P::PER_UNIT > 1 && n + 1 < chunk.size();
      P::interleave(coefficient_row(n), has_second ? coefficient_row(n + 1) : nullptr, rank,
                    sums.rank_units + n / P::PER_UNIT * w);
      if constexpr (P::bf16_pairs) {
        const V* row = values + n * STRIP;
        P::interleave(row, has_second ? row + STRIP : nullptr, STRIP,
                      sums.row_units + n / P::PER_UNIT * STRIP);
      }
    }
    if constexpr (P::bf16_pairs) right = sums.row_units;
    // Rows beyond the rank are computed and not used.
    strip_panel<Level{}()>(panel_height(rank), Factors<Unit>{sums.rank_units, 1, w}, right,
                           P::units(chunk.size()),
                           sums.partial[i] + inner.begin[chunk.expert] * STRIP);
  }

  // Adds the partial sums of an expert to its totals, and clears them.
  template <class Sums>
  MOELORA_INLINE void add_partial(int64_t e, const Sums& sums) const {
    const int64_t first = inner.begin[e] * STRIP, count = padded(inner.blocks.ranks[e]) * STRIP;
    for (int64_t i = 0; i < ADAPTERS; ++i) {
      C *total = sums.total[i] + first, *partial = sums.partial[i] + first;
      if (!sums.has_total[e]) std::fill_n(total, count, C{0});
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        total[j] += partial[j];
        partial[j] = 0;
      }
    }
    sums.has_total[e] = true;
  }

  // Writes the sums in the dtype L of the gradients; zeros for an expert without pairs.
  template <class Level, class L, class Sums>
  MOELORA_INLINE void write(int64_t strip, const Sums& sums) const {
    const InnerTensors& t = inner.tensors;
    const int64_t columns = inner.columns(strip);
    for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
      const int64_t rank = inner.blocks.ranks[e], begin = inner.blocks.begin[e];
      const int64_t offset = inner.begin[e] * STRIP;
      const bool has_pairs = inner.has_pairs(e);
      C* const* all_sums = sums.has_total[e] ? sums.total : sums.partial;
      for (int64_t i = 0; i < 2; ++i) {
        L* db = grads[i].mutable_data_ptr<L>() + strip * STRIP * t.R + begin;
        const C* total = all_sums[i] + offset;
        if (!has_pairs) {
          for (int64_t k = 0; k < columns; ++k) std::fill_n(db + k * t.R, rank, L(0.0f));
          continue;
        }
        // PANEL ranks and PANEL columns at a time.
        alignas(64) C block[PANEL * PANEL];
        for (int64_t j = 0; j < rank; j += PANEL) {
          for (int64_t k = 0; k < columns; k += PANEL) {
            for (int64_t m = 0; m < PANEL; ++m) {
              std::copy_n(total + (j + m) * STRIP + k, PANEL, block + m * PANEL);
            }
            transpose_block<Level{}()>(block);
            const int64_t width = std::min(PANEL, rank - j);
            if (width == PANEL && k + PANEL <= columns) {
              for (int64_t m = 0; m < PANEL; ++m) {
#pragma omp simd
                for (int64_t n = 0; n < PANEL; ++n) {
                  db[(k + m) * t.R + j + n] = narrow<L>(block[m * PANEL + n]);
                }
              }
              continue;
            }
            for (int64_t m = 0; m < std::min(PANEL, columns - k); ++m) {
#pragma omp simd
              for (int64_t n = 0; n < width; ++n) {
                db[(k + m) * t.R + j + n] = narrow<L>(block[m * PANEL + n]);
              }
            }
          }
        }
      }
      L* da = grads[2].mutable_data_ptr<L>() + begin * t.F + strip * STRIP;
      const C* total = all_sums[2] + offset;
      for (int64_t j = 0; j < rank; ++j) {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) {
          da[j * t.F + k] = narrow<L>(has_pairs ? total[j * STRIP + k] : C{0});
        }
      }
    }
  }
};

}  // namespace
}  // namespace moelora
