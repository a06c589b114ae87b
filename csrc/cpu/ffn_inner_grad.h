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

// A thread's sums of one strip, and scratch space.
template <class C, class Unit>
struct GradSums {
  // dBg^T, dBu^T and dAd, [ranks, STRIP]: of the last pairs of each expert, and of those before.
  C* partial[ADAPTERS];
  C* total[ADAPTERS];
  Unit* rank_units;  // [CHUNK, padded(width)]
  Unit* row_units;   // [CHUNK, STRIP]
  int64_t* terms;    // [E], the pairs in `partial`
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
    for (int64_t i = 0; i < ADAPTERS; ++i) {
      std::fill_n(sums.partial[i], inner.ranks * STRIP, C{0});
      std::fill_n(sums.total[i], inner.ranks * STRIP, C{0});
    }
    std::fill_n(sums.terms, inner.blocks.num_experts(), 0);
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
  template <class Sums>
  MOELORA_INLINE void finish(int64_t strip, const Sums& sums) const {
    for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) add_partial(e, sums);
    if (grads[0].scalar_type() == inner.tensors.dtype) {
      write<S>(strip, sums);
    } else {
      write<C>(strip, sums);
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
    const int64_t first = inner.begin[e] * STRIP, count = inner.blocks.ranks[e] * STRIP;
    for (int64_t i = 0; i < ADAPTERS; ++i) {
      C *total = sums.total[i] + first, *partial = sums.partial[i] + first;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) {
        total[j] += partial[j];
        partial[j] = 0;
      }
    }
  }

  // Writes the totals in the dtype L of the gradients.
  template <class L, class Sums>
  MOELORA_INLINE void write(int64_t strip, const Sums& sums) const {
    const InnerTensors& t = inner.tensors;
    const int64_t columns = inner.columns(strip);
    for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
      const int64_t rank = inner.blocks.ranks[e], begin = inner.blocks.begin[e];
      const int64_t offset = inner.begin[e] * STRIP;
      for (int64_t i = 0; i < 2; ++i) {
        L* db = grads[i].mutable_data_ptr<L>() + strip * STRIP * t.R + begin;
        const C* total = sums.total[i] + offset;
        for (int64_t k = 0; k < columns; ++k) {
          for (int64_t j = 0; j < rank; ++j) db[k * t.R + j] = narrow<L>(total[j * STRIP + k]);
        }
      }
      L* da = grads[2].mutable_data_ptr<L>() + begin * t.F + strip * STRIP;
      const C* total = sums.total[2] + offset;
      for (int64_t j = 0; j < rank; ++j) {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) da[j * t.F + k] = narrow<L>(total[j * STRIP + k]);
      }
    }
  }
};

}  // namespace
}  // namespace moelora
