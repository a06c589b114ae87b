// The rows of every expert, shrunk to its ranks and gated there: forward, and backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Forward: places of a tile, a multiple of the three tokens that share a load of A; and columns of
// x and A at a time: sums of lanes are added up once for each.
constexpr int64_t TILE = 96;
constexpr int64_t COLUMNS = 2048;
// Backward: 64 x 256 of dy, and 256 x r of B: some 64 KiB of float32, or 32 KiB of pairs, each.
constexpr int64_t TILE_BACKWARD = 64;
constexpr int64_t COLUMNS_BACKWARD = 256;

// h and u of one place: what is beyond the rank stays zero.
template <class S, class C>
MOELORA_INLINE void gate_row(const C* sums, int64_t rank, int64_t width, C scale, S* h, S* u) {
  std::fill_n(h, width, S(0.0f));
  std::fill_n(u, width, S(0.0f));
#pragma omp simd
  for (int64_t j = 0; j < rank; ++j) {
    h[j] = narrow<S>(sums[j]);
    u[j] = narrow<S>(scale == 0 ? C{0} : scale * C(widen(h[j])));
  }
}

template <class S, class C>
struct Shrink {
  const Places& places;
  const Blocks& blocks;
  const C* scaling;
  const PairWeights<C>& weights;
  const Mask& mask;
  Rows<S> x;
  int64_t I;
  std::vector<const S*> lora_a;
  int64_t width;
  S* h;
  S* u;

  // sums [TILE, width], of_a [width, COLUMNS], of_x and kept [3, COLUMNS].
  template <class Level>
  MOELORA_INLINE void tile(const Tile& tile, C* sums, C* of_a, C* of_x, S* kept) const {
    using P = Operand<S, Level::pairs>;
    using Q = typename P::Element;
    constexpr int BYTES = Level{}();
    const int64_t E = blocks.experts();
    const int64_t e = tile.expert % E;
    const int64_t rank = blocks.ranks[e];
    const S* a = lora_a[tile.expert / E] + blocks.begin[e] * I;
    const int64_t count = tile.last - tile.first;
    std::fill_n(sums, count * rank, C{0});
    for (int64_t column = 0; column < I; column += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, I - column);
      if (!P::direct) widen_rows(a + column, I, rank, columns, of_a, COLUMNS);
      for (int64_t t = 0; t < count; t += 3) {
        const int64_t tokens = std::min<int64_t>(3, count - t);
        const Q* of_tokens[3] = {};
        for (int64_t k = 0; k < tokens; ++k) {
          const int64_t row = x.of_place[tile.first + t + k];
          const S* from = dropped(mask, x.row(row) + column, row * I + column, columns, e,
                                  of_x + k * COLUMNS, kept + k * COLUMNS);
          if constexpr (P::direct) {
            of_tokens[k] = from;
          } else {
            widen_row(from, columns, of_x + k * COLUMNS);
            of_tokens[k] = of_x + k * COLUMNS;
          }
        }
        if constexpr (P::direct) {
          dot_tokens<BYTES>(tokens, of_tokens, a + column, I, columns, rank, sums + t * rank, rank);
        } else {
          dot_tokens<BYTES>(tokens, of_tokens, of_a, COLUMNS, columns, rank, sums + t * rank, rank);
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t place = tile.first + t;
      const C scale = scaling[e] * weights[places.pair(place)];
      gate_row(sums + t * rank, rank, width, scale, h + place * width, u + place * width);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> grouped_shrink(Tensor x, std::vector<Tensor> lora_a,
                                          std::optional<Tensor> weights, Tensor order,
                                          Tensor offsets, Tensor /*tiles*/, Tensor /*chunks*/,
                                          std::vector<int64_t> ranks, std::vector<double> scaling,
                                          double dropout_p, bool dropout_per_expert,
                                          std::optional<Tensor> seed) {
  check_floating(x, "x");
  const auto [rows, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(lora_a.size());
  check_size(int64_t(scaling.size()), blocks.experts(), "scaling");
  const ScalarType dtype = x.scalar_type();
  const Places places(order, offsets, siblings * blocks.experts());
  const Mask mask(dropout_p, dropout_per_expert, seed);
  x = row_major(x);
  for (Tensor& a : lora_a) {
    a = row_major(cast(a, dtype));
    const auto [R, inputs] = shape<2>(a, "lora_a");
    check_size(R, blocks.total, "lora_a, ranks");
    check_size(inputs, I, "lora_a, in_features");
  }
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  const Tensor h = empty(places.pairs(), width, dtype);
  const Tensor u = empty(places.pairs(), width, dtype);
  const std::vector<int32_t> row_of_place = places.rows_of(x, "x");
  for_dtype(dtype, [&, I = I](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const std::vector<C> factors = to_compute<C>(scaling);
    const PairWeights<C> of_pairs(weights, places, compute_dtype(dtype));
    Shrink<S, C> shrink{.places = places,
                        .blocks = blocks,
                        .scaling = factors.data(),
                        .weights = of_pairs,
                        .mask = mask,
                        .x = {x.const_data_ptr<S>(), I, row_of_place.data()},
                        .I = I,
                        .lora_a = {},
                        .width = width,
                        .h = h.mutable_data_ptr<S>(),
                        .u = u.mutable_data_ptr<S>()};
    for (const Tensor& a : lora_a) shrink.lora_a.push_back(a.const_data_ptr<S>());
    const std::vector<Tile> tiles = tiles_of(places, TILE);
    torch::stable::parallel_for(
        0, int64_t(tiles.size()), grain(TILE * width * I), [&](int64_t begin, int64_t end) {
          std::vector<C> buffer(TILE * width + (width + 3) * COLUMNS);
          std::vector<S> kept(mask.active() ? 3 * COLUMNS : 0);
          C* of_a = buffer.data() + TILE * width;
          vectorised([&](auto level) {
            for (int64_t n = begin; n < end; ++n) {
              shrink.template tile<decltype(level)>(tiles[n], buffer.data(), of_a,
                                                    of_a + width * COLUMNS, kept.data());
            }
          });
        });
    clear_rows<S>(h, places.routed());
    clear_rows<S>(u, places.routed());
  });
  return {h, u};
}

namespace {

template <class S, class C>
struct ShrinkBackward {
  const Places& places;
  const Blocks& blocks;
  const C* scaling;
  const PairWeights<C>& weights;
  std::vector<Rows<S>> dy;
  std::vector<Rows<S>> lora_b;
  std::vector<int64_t> O;
  int64_t width;
  const S* h;
  S* dh;
  S* u;
  C* dweights;

  // sums [TILE, w], of_b [COLUMNS, w], of_dy [TILE, COLUMNS], w the padded width.
  template <class Level, class Unit>
  MOELORA_INLINE void tile(const Tile& tile, C* sums, Unit* of_b, Unit* of_dy) const {
    using P = Operand<S, Level::pairs>;
    const int64_t E = blocks.experts();
    const int64_t i = tile.expert / E;
    const int64_t e = tile.expert % E;
    const int64_t rank = blocks.ranks[e];
    const int64_t columns = padded(rank);
    const int64_t count = tile.last - tile.first;
    std::fill_n(sums, TILE_BACKWARD * columns, C{0});
    for (int64_t first = 0; first < O[i]; first += COLUMNS_BACKWARD) {
      const int64_t steps = std::min(COLUMNS_BACKWARD, O[i] - first);
      for (int64_t o = 0; o < steps; o += P::PER) {
        const S* of_row = lora_b[i].row(first + o) + blocks.begin[e];
        P::across(of_row, o + 1 < steps ? of_row + lora_b[i].stride : nullptr, rank,
                  of_b + o / P::PER * columns);
      }
      for (int64_t t = 0; t < count; ++t) {
        const S* from = dy[i].row(dy[i].of_place[tile.first + t]) + first;
        // The next piece of the row, while this one is multiplied.
        const int64_t ahead = std::min(steps, O[i] - first - steps);
        for (int64_t o = 0; o < ahead; o += 64 / int64_t(sizeof(S))) {
          __builtin_prefetch(from + steps + o);
        }
        P::along(from, steps, of_dy + t * COLUMNS_BACKWARD);
      }
      panel<Level{}()>(padded(count), columns, Factors<Unit>{of_dy, COLUMNS_BACKWARD, 1}, of_b,
                       columns, P::units(steps), sums, columns);
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t place = tile.first + t;
      const int64_t pair = places.pair(place);
      const C scale = scaling[e] * weights[pair];
      const C* product = sums + t * columns;
      const S* of_h = h + place * width;
      S* to_dh = dh + place * width;
      S* to_u = u + place * width;
      std::fill_n(to_dh, width, S(0.0f));
      std::fill_n(to_u, width, S(0.0f));
      C inner = 0;
#pragma omp simd reduction(+ : inner)
      for (int64_t j = 0; j < rank; ++j) {
        const C value = C(widen(of_h[j]));
        to_dh[j] = narrow<S>(scale == 0 ? C{0} : scale * product[j]);
        to_u[j] = narrow<S>(scale == 0 ? C{0} : scale * value);
        inner += product[j] * value;
      }
      if (dweights) dweights[pair] = scaling[e] * inner;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grouped_shrink_backward(
    std::vector<Tensor> dy, std::vector<Tensor> lora_b, Tensor h, std::optional<Tensor> weights,
    Tensor order, Tensor offsets, Tensor /*tiles*/, Tensor /*chunks*/, std::vector<int64_t> ranks,
    std::vector<double> scaling) {
  check_floating(h, "h");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(dy.size());
  check_size(int64_t(lora_b.size()), siblings, "lora_b, siblings");
  check_size(int64_t(scaling.size()), blocks.experts(), "scaling");
  const ScalarType dtype = h.scalar_type();
  const ScalarType sums = compute_dtype(dtype);
  const Places places(order, offsets, siblings * blocks.experts());
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  h = row_major(h);
  const auto [pairs, columns] = shape<2>(h, "h");
  check_size(pairs, places.pairs(), "h, pairs");
  check_size(columns, width, "h, ranks");
  std::vector<int64_t> O;
  const std::vector<int32_t> row_of_place = places.rows_of(dy[0], "dy");
  for (int64_t i = 0; i < siblings; ++i) {
    check_size(dy[i].size(0), dy[0].size(0), "dy, rows");
    dy[i] = dense_rows(dy[i], dtype);
    lora_b[i] = dense_rows(lora_b[i], dtype);
    O.push_back(dy[i].size(1));
    check_size(lora_b[i].size(0), O[i], "lora_b, out_features");
    check_size(lora_b[i].size(1), blocks.total, "lora_b, ranks");
  }
  const Tensor dh = empty(pairs, width, dtype);
  const Tensor u = empty(pairs, width, dtype);
  const Tensor dweights = weights ? empty(weights->size(0), weights->size(1), sums) : absent(sums);
  for_dtype(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const std::vector<C> factors = to_compute<C>(scaling);
    const PairWeights<C> of_pairs(weights, places, sums);
    ShrinkBackward<S, C> shrink{.places = places,
                                .blocks = blocks,
                                .scaling = factors.data(),
                                .weights = of_pairs,
                                .dy = {},
                                .lora_b = {},
                                .O = O,
                                .width = width,
                                .h = h.const_data_ptr<S>(),
                                .dh = dh.mutable_data_ptr<S>(),
                                .u = u.mutable_data_ptr<S>(),
                                .dweights = weights ? dweights.mutable_data_ptr<C>() : nullptr};
    for (int64_t i = 0; i < siblings; ++i) {
      shrink.dy.push_back({dy[i].const_data_ptr<S>(), dy[i].stride(0), row_of_place.data()});
      shrink.lora_b.push_back({lora_b[i].const_data_ptr<S>(), lora_b[i].stride(0), nullptr});
    }
    const std::vector<Tile> tiles = tiles_of(places, TILE_BACKWARD);
    const int64_t w = padded(width);
    torch::stable::parallel_for(
        0, int64_t(tiles.size()), grain(TILE_BACKWARD * width * O[0]),
        [&](int64_t begin, int64_t end) {
          std::vector<C> buffer((TILE_BACKWARD + COLUMNS_BACKWARD) * w +
                                TILE_BACKWARD * COLUMNS_BACKWARD);
          vectorised([&](auto level) {
            using Unit = typename Operand<S, decltype(level)::pairs>::Unit;
            auto* of_b = reinterpret_cast<Unit*>(buffer.data() + TILE_BACKWARD * w);
            for (int64_t n = begin; n < end; ++n) {
              shrink.template tile<decltype(level)>(tiles[n], buffer.data(), of_b,
                                                    of_b + COLUMNS_BACKWARD * w);
            }
          });
        });
    clear_rows<S>(dh, places.routed());
    clear_rows<S>(u, places.routed());
    if (weights) {
      C* of_nobody = dweights.mutable_data_ptr<C>();
      for (int64_t n = places.routed(); n < pairs; ++n) of_nobody[places.pair(n)] = C{0};
    }
  });
  return {dh, u, dweights};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_shrink", TORCH_BOX(&moelora::grouped_shrink));
  m.impl("grouped_shrink_backward", TORCH_BOX(&moelora::grouped_shrink_backward));
}
