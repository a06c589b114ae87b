// From the rank space of every expert to features: strips of columns, their sums kept in L2, so that
// y is written once and rounded once however many slots a token has.
#include <torch/csrc/stable/library.h>

#include "dropout.h"
#include "grouped.h"

namespace moelora {
namespace {

// Columns of a strip: 4 vectors of AVX-512.
constexpr int64_t STRIP = 64;
// Rows of y whose sums are kept at a time: 512 KiB of float32.
constexpr int64_t BLOCK = 2048;
// Places per product.
constexpr int64_t STEP = 16;

// The places that add to each block of rows, in the order of experts.
struct ByBlock {
  std::vector<int32_t> places;
  std::vector<int64_t> begin;

  template <class RowOf>
  ByBlock(const Places& all, int64_t first, int64_t last, int64_t blocks, const RowOf& row_of)
      : places(last - first), begin(blocks + 1) {
    for (int64_t place = first; place < last; ++place) {
      ++begin[row_of(all.pair(place)) / BLOCK + 1];
    }
    for (int64_t block = 0; block < blocks; ++block) begin[block + 1] += begin[block];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t place = first; place < last; ++place) {
      places[next[row_of(all.pair(place)) / BLOCK]++] = int32_t(place);
    }
  }
};

template <class S, class C>
struct Expand {
  const Places& places;
  const Blocks& blocks;
  const Mask& mask;
  const ByBlock& by_block;
  const S* u;
  int64_t width;
  std::vector<const S*> matrices;
  // Strides of the matrices: from one feature, and from one rank, to the next.
  int64_t feature;
  int64_t rank;
  int64_t first_expert;
  int64_t fan;
  int64_t O;

  // sums [rows of the block, STRIP] += the terms of the block's places, for columns from `strip`
  // on; term [STEP, STRIP], matrix [width, STRIP], of_u [STEP, width].
  template <class Level, class Unit>
  MOELORA_INLINE void operator()(int64_t block, int64_t strip, C* sums, C* term, Unit* matrix,
                                 Unit* of_u) const {
    using P = Operand<S, Level::pairs>;
    const int64_t columns = std::min(STRIP, O - strip);
    const int64_t E = blocks.experts();
    int64_t expert = first_expert;
    int64_t n = by_block.begin[block];
    const int64_t last = by_block.begin[block + 1];
    while (n < last) {
      while (by_block.places[n] >= places.last(expert)) ++expert;
      const int64_t e = expert % E;
      const int64_t steps = blocks.ranks[e];
      pack<P>(matrices[expert / E - first_expert / E] + blocks.begin[e] * rank, steps, strip,
              columns, matrix);
      for (; n < last && by_block.places[n] < places.last(expert);) {
        int64_t count = 0;
        for (; count < STEP && n + count < last; ++count) {
          const int64_t place = by_block.places[n + count];
          if (place >= places.last(expert)) break;
          P::along(u + place * width, steps, of_u + count * width);
        }
        std::fill_n(term, STEP * STRIP, C{0});
        panel<Level{}()>(STEP, STRIP, Factors<Unit>{of_u, width, 1}, matrix, STRIP,
                         P::units(steps), term, STRIP);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t row = places.pair(by_block.places[n + k]) / fan;
          C* of_row = term + k * STRIP;
          if (mask.active()) mask.apply(of_row, row * O + strip, columns, e);
          C* to = sums + (row - block * BLOCK) * STRIP;
#pragma omp simd
          for (int64_t j = 0; j < STRIP; ++j) to[j] += of_row[j];
        }
        n += count;
      }
    }
  }

 private:
  // The columns [strip, strip + columns) of an expert's matrix, a row of units for each PER ranks.
  template <class P>
  MOELORA_INLINE void pack(const S* from, int64_t ranks, int64_t strip, int64_t columns,
                           typename P::Unit* to) const {
    using Unit = typename P::Unit;
    if (feature == 1) {
      for (int64_t j = 0; j < ranks; j += P::PER) {
        const S* of_rank = from + j * rank + strip;
        Unit* of_units = to + j / P::PER * STRIP;
        P::across(of_rank, j + 1 < ranks ? of_rank + rank : nullptr, columns, of_units);
        std::fill(of_units + columns, of_units + STRIP, Unit{0});
      }
      return;
    }
    for (int64_t j = 0; j < ranks; j += P::PER * PANEL) {
      alignas(64) Unit block[STRIP * PANEL] = {};
      const int64_t count = std::min(P::PER * PANEL, ranks - j);
      for (int64_t o = 0; o < columns; ++o) {
        P::along(from + (strip + o) * feature + j, count, block + o * PANEL);
      }
      for (int64_t k = 0; k < P::units(count); ++k) {
        Unit* of_units = to + (j / P::PER + k) * STRIP;
        for (int64_t o = 0; o < STRIP; ++o) of_units[o] = block[o * PANEL + k];
      }
    }
  }
};

// y[row, column] = start + sums of one block and strip.
template <class Y, class C>
MOELORA_INLINE void finish(const C* sums, int64_t begin, int64_t end, int64_t strip, int64_t O,
                           const Y* start, int64_t start_stride, int64_t start_fan, Y* y) {
  const int64_t columns = std::min(STRIP, O - strip);
  for (int64_t row = begin; row < end; ++row) {
    const C* of_row = sums + (row - begin) * STRIP;
    Y* to = y + row * O + strip;
    if (start == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = narrow<Y>(of_row[j]);
    } else {
      const Y* from = start + row / start_fan * start_stride + strip;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = narrow<Y>(of_row[j] + C(widen(from[j])));
    }
  }
}

Tensor grouped_expand(Tensor u, std::vector<Tensor> matrices, std::optional<Tensor> start,
                      Tensor order, Tensor offsets, Tensor /*tiles*/, std::vector<int64_t> ranks,
                      int64_t tokens, int64_t first, bool per_pair, double dropout_p,
                      bool dropout_per_expert, std::optional<Tensor> seed) {
  check_floating(u, "u");
  const Blocks blocks(ranks);
  const int64_t E = blocks.experts();
  const auto siblings = int64_t(matrices.size());
  STD_TORCH_CHECK(siblings > 0, "matrices: expected one per sibling, got none");
  const ScalarType dtype = u.scalar_type();
  const Places places(order, offsets, offsets.numel() - 1);
  const int64_t first_expert = first * E;
  STD_TORCH_CHECK(first >= 0 && first_expert + siblings * E <= places.experts(),
                  "first: siblings ", first, " to ", first + siblings, " of ",
                  places.experts() / E);
  STD_TORCH_CHECK(!per_pair || places.experts() == E, "per_pair: expected one sibling");
  u = row_major(u);
  const auto [pairs, width] = shape<2>(u, "u");
  check_size(pairs, places.pairs(), "u, pairs");
  check_size(width, *std::max_element(ranks.begin(), ranks.end()), "u, ranks");
  const Mask mask(dropout_p, dropout_per_expert, seed);

  // Either all matrices with dense features (A, transposed) or all with dense ranks (B).
  bool features = true;
  for (Tensor& matrix : matrices) {
    matrix = cast(matrix, dtype);
    features = features && matrix.stride(0) == 1 && matrix.stride(1) == matrices[0].stride(1);
  }
  const int64_t O = matrices[0].size(0);
  for (Tensor& matrix : matrices) {
    if (!features) matrix = row_major(matrix);
    check_size(matrix.size(0), O, "matrices, features");
    check_size(matrix.size(1), blocks.total, "matrices, ranks");
  }
  const bool of_tokens = start && start->dim() == 2;
  const ScalarType result = of_tokens ? start->scalar_type() : dtype;
  if (start) {
    start = of_tokens ? dense_rows(*start, result) : row_major(cast(*start, result));
    check_size(start->size(start->dim() - 1), O, "start, features");
    if (of_tokens) check_size(start->size(0), tokens, "start, tokens");
  }

  const int64_t rows = per_pair ? pairs : tokens;
  const int64_t fan = per_pair ? 1 : places.fan(tokens, "tokens");
  const int64_t token_fan = places.fan(tokens, "tokens");
  const int64_t num_blocks = (rows + BLOCK - 1) / BLOCK;
  const int64_t strips = (O + STRIP - 1) / STRIP;
  const ByBlock by_block(places, places.first(first_expert),
                         places.last(first_expert + siblings * E - 1), num_blocks,
                         [&](int64_t pair) { return pair / fan; });
  const Tensor y = empty(rows, O, result);
  for_dtype(dtype, [&, width = width](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    Expand<S, C> expand{.places = places,
                        .blocks = blocks,
                        .mask = mask,
                        .by_block = by_block,
                        .u = u.const_data_ptr<S>(),
                        .width = width,
                        .matrices = {},
                        .feature = features ? 1 : matrices[0].stride(0),
                        .rank = features ? matrices[0].stride(1) : 1,
                        .first_expert = first_expert,
                        .fan = fan,
                        .O = O};
    for (const Tensor& matrix : matrices) expand.matrices.push_back(matrix.const_data_ptr<S>());
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<C> buffer((std::min(rows, BLOCK) + width + STEP) * STRIP + STEP * width);
      C* sums = buffer.data();
      C* term = sums + std::min(rows, BLOCK) * STRIP;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / strips;
        const int64_t strip = task % strips * STRIP;
        const int64_t last_row = std::min(rows, (block + 1) * BLOCK);
        std::fill_n(sums, (last_row - block * BLOCK) * STRIP, C{0});
        vectorised([&](auto level) {
          using Unit = typename Operand<S, decltype(level)::pairs>::Unit;
          auto* matrix = reinterpret_cast<Unit*>(term + STEP * STRIP);
          expand.template operator()<decltype(level)>(block, strip, sums, term, matrix,
                                                      matrix + width * STRIP);
        });
        for_dtype(result, [&](auto of_y) {
          using Y = typename decltype(of_y)::type;
          const Y* from = start ? start->const_data_ptr<Y>() : nullptr;
          const int64_t stride = of_tokens ? start->stride(0) : 0;
          vectorised([&](auto) {
            finish<Y, C>(sums, block * BLOCK, last_row, strip, O, from, stride,
                         per_pair ? token_fan : 1, y.mutable_data_ptr<Y>());
          });
        });
      }
    };
    const int64_t work = STRIP * (std::min(rows, BLOCK) + pairs * width / std::max<int64_t>(num_blocks, 1));
    torch::stable::parallel_for(0, num_blocks * strips, grain(work), run);
  });
  return y;
}

}  // namespace
}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_expand", TORCH_BOX(&moelora::grouped_expand));
}
