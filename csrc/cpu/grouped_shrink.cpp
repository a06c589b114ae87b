// The ops `grouped_shrink` and `grouped_shrink_backward`: from features to the ranks of each pair's
// expert. For pair p of expert e:
//     forward     h_p = dropout(x_p) At_e        u_p = scale_e * weight_p * h_p
//     backward    du_p = dy_p B_e                dh_p = scale_e * weight_p * du_p
//                 dweight_p = scale_e <du_p, h_p>; and u_p again, for dB
// Threads split the tiles. A tile is a range of sorted positions of one expert.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Forward. Positions of a tile: a multiple of the three rows that share a load of A. Columns of a
// block of x and A: the lanes of a sum are added up once for each block.
constexpr int64_t TILE_FORWARD = 96;
constexpr int64_t COLUMNS_FORWARD = 2048;
// Backward. A block of dy is 64 x 256: 64 KiB of float32, or 32 KiB of bfloat16 pairs. A block of B
// is 256 x r, and as large if r is 64.
constexpr int64_t TILE_BACKWARD = 64;
constexpr int64_t COLUMNS_BACKWARD = 256;

// Writes h and u [width] of one position. Columns beyond the rank are zero.
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

// The forward of one tile.
template <class S, class C>
struct Shrink {
  const Routing& routing;
  const Blocks& blocks;
  const C* scaling;
  const PairWeights<C>& weights;
  const Mask& mask;
  Rows<S> x;
  int64_t I;
  std::vector<const S*> lora_a;  // n x [R, I]
  int64_t width;                 // the largest rank
  S* h;
  S* u;

  // Computes h and u of one tile. Scratch space: sums [TILE_FORWARD, width], widened_a [width,
  // COLUMNS_FORWARD], widened_x [3, COLUMNS_FORWARD] and dropped_x [3, COLUMNS_FORWARD].
  template <class Level>
  MOELORA_INLINE void run(const Tile& tile, C* sums, C* widened_a, C* widened_x,
                          S* dropped_x) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Q = typename P::Element;
    constexpr int BYTES = Level{}();
    const int64_t E = blocks.num_experts();
    const int64_t e = tile.expert % E;
    const int64_t rank = blocks.ranks[e];
    const S* a = lora_a[tile.expert / E] + blocks.begin[e] * I;
    const int64_t count = tile.end - tile.begin;

    // sums = dropout(x) At, one block of columns after the other.
    std::fill_n(sums, count * rank, C{0});
    for (int64_t column = 0; column < I; column += COLUMNS_FORWARD) {
      const int64_t columns = std::min(COLUMNS_FORWARD, I - column);
      if (!P::in_place) widen_rows(a + column, I, rank, columns, widened_a, COLUMNS_FORWARD);
      for (int64_t t = 0; t < count; t += 3) {
        const int64_t tokens = std::min<int64_t>(3, count - t);
        const Q* token_rows[3] = {};
        for (int64_t k = 0; k < tokens; ++k) {
          const int64_t row = x.row_of_position[tile.begin + t + k];
          const S* x_row =
              drop_row(mask, x.row(row) + column, row, column, I, columns, e,
                       widened_x + k * COLUMNS_FORWARD, dropped_x + k * COLUMNS_FORWARD);
          if constexpr (P::in_place) {
            token_rows[k] = x_row;
          } else {
            widen_row(x_row, columns, widened_x + k * COLUMNS_FORWARD);
            token_rows[k] = widened_x + k * COLUMNS_FORWARD;
          }
        }
        if constexpr (P::in_place) {
          dot_tokens<BYTES>(tokens, token_rows, a + column, I, columns, rank, sums + t * rank,
                            rank);
        } else {
          dot_tokens<BYTES>(tokens, token_rows, widened_a, COLUMNS_FORWARD, columns, rank,
                            sums + t * rank, rank);
        }
      }
    }

    // Round to h, and gate.
    for (int64_t t = 0; t < count; ++t) {
      const int64_t position = tile.begin + t;
      const C scale = scaling[e] * weights[routing.pair(position)];
      gate_row(sums + t * rank, rank, width, scale, h + position * width, u + position * width);
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
  const auto [x_rows, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(lora_a.size());
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  const ScalarType dtype = x.scalar_type();
  const Routing routing(order, offsets, siblings * blocks.num_experts());
  const Mask mask(dropout_p, dropout_per_expert, seed);
  x = row_major(x);
  for (Tensor& a : lora_a) {
    a = row_major(cast(a, dtype));
    const auto [R, in_features] = shape<2>(a, "lora_a");
    check_size(R, blocks.total, "lora_a, ranks");
    check_size(in_features, I, "lora_a, in_features");
  }
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  const Tensor h = empty(routing.num_pairs(), width, dtype);
  const Tensor u = empty(routing.num_pairs(), width, dtype);
  const std::vector<int32_t> row_of_position = routing.rows_of_positions(x, "x");
  for_dtype(dtype, [&, I = I](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const std::vector<C> scales = to_compute<C>(scaling);
    const PairWeights<C> pair_weights(weights, routing, compute_dtype(dtype));
    Shrink<S, C> shrink{.routing = routing,
                        .blocks = blocks,
                        .scaling = scales.data(),
                        .weights = pair_weights,
                        .mask = mask,
                        .x = {x.const_data_ptr<S>(), I, row_of_position.data()},
                        .I = I,
                        .lora_a = {},
                        .width = width,
                        .h = h.mutable_data_ptr<S>(),
                        .u = u.mutable_data_ptr<S>()};
    for (const Tensor& a : lora_a) shrink.lora_a.push_back(a.const_data_ptr<S>());
    const std::vector<Tile> tiles = split_into_tiles(routing, TILE_FORWARD);
    torch::stable::parallel_for(
        0, int64_t(tiles.size()), grain(TILE_FORWARD * width * I), [&](int64_t begin, int64_t end) {
          std::vector<C> buffer(TILE_FORWARD * width + (width + 3) * COLUMNS_FORWARD);
          std::vector<S> dropped_x(mask.active() ? 3 * COLUMNS_FORWARD : 0);
          C* widened_a = buffer.data() + TILE_FORWARD * width;
          vectorised([&](auto level) {
            for (int64_t n = begin; n < end; ++n) {
              shrink.template run<decltype(level)>(tiles[n], buffer.data(), widened_a,
                                                   widened_a + width * COLUMNS_FORWARD,
                                                   dropped_x.data());
            }
          });
        });
    clear_rows<S>(h, routing.num_routed());
    clear_rows<S>(u, routing.num_routed());
  });
  return {h, u};
}

namespace {

// The backward of one tile.
template <class S, class C>
struct ShrinkBackward {
  const Routing& routing;
  const Blocks& blocks;
  const C* scaling;
  const PairWeights<C>& weights;
  std::vector<Rows<S>> dy;
  std::vector<Rows<S>> lora_b;  // n x [O, R]
  std::vector<int64_t> O;
  int64_t width;  // the largest rank
  const S* h;
  S* dh;
  S* u;
  C* dweights;  // [pairs], or null if there are no weights

  // Computes dh, u and dweights of one tile. Scratch space: sums [TILE_BACKWARD, w], b_units
  // [COLUMNS_BACKWARD, w] and dy_units [TILE_BACKWARD, COLUMNS_BACKWARD], w the padded rank.
  template <class Level, class Unit>
  MOELORA_INLINE void run(const Tile& tile, C* sums, Unit* b_units, Unit* dy_units) const {
    using P = Operand<S, Level::bf16_pairs>;
    const int64_t E = blocks.num_experts();
    const int64_t i = tile.expert / E;
    const int64_t e = tile.expert % E;
    const int64_t rank = blocks.ranks[e];
    const int64_t w = padded(rank);
    const int64_t count = tile.end - tile.begin;

    // sums = dy B, one block of out_features after the other.
    std::fill_n(sums, TILE_BACKWARD * w, C{0});
    for (int64_t first = 0; first < O[i]; first += COLUMNS_BACKWARD) {
      const int64_t steps = std::min(COLUMNS_BACKWARD, O[i] - first);
      for (int64_t o = 0; o < steps; o += P::PER_UNIT) {
        const S* b_row = lora_b[i].row(first + o) + blocks.begin[e];
        P::interleave(b_row, o + 1 < steps ? b_row + lora_b[i].stride : nullptr, rank,
                      b_units + o / P::PER_UNIT * w);
      }
      for (int64_t t = 0; t < count; ++t) {
        const S* dy_row = dy[i].row(dy[i].row_of_position[tile.begin + t]) + first;
        // Fetch the next block of the row while this one is multiplied.
        const int64_t ahead = std::min(steps, O[i] - first - steps);
        for (int64_t o = 0; o < ahead; o += 64 / int64_t(sizeof(S))) {
          __builtin_prefetch(dy_row + steps + o);
        }
        P::pack_row(dy_row, steps, dy_units + t * COLUMNS_BACKWARD);
      }
      panel<Level{}()>(padded(count), w, Factors<Unit>{dy_units, COLUMNS_BACKWARD, 1}, b_units, w,
                       P::units(steps), sums, w);
    }

    // Gate the sums, and multiply them with h.
    for (int64_t t = 0; t < count; ++t) {
      const int64_t position = tile.begin + t;
      const int64_t pair = routing.pair(position);
      const C scale = scaling[e] * weights[pair];
      const C* product = sums + t * w;
      const S* h_row = h + position * width;
      S* dh_row = dh + position * width;
      S* u_row = u + position * width;
      std::fill_n(dh_row, width, S(0.0f));
      std::fill_n(u_row, width, S(0.0f));
      C inner = 0;  // <du, h>
#pragma omp simd reduction(+ : inner)
      for (int64_t j = 0; j < rank; ++j) {
        const C h_j = C(widen(h_row[j]));
        dh_row[j] = narrow<S>(scale == 0 ? C{0} : scale * product[j]);
        u_row[j] = narrow<S>(scale == 0 ? C{0} : scale * h_j);
        inner += product[j] * h_j;
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
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  const ScalarType dtype = h.scalar_type();
  const ScalarType sum_dtype = compute_dtype(dtype);
  const Routing routing(order, offsets, siblings * blocks.num_experts());
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  h = row_major(h);
  const auto [pairs, h_columns] = shape<2>(h, "h");
  check_size(pairs, routing.num_pairs(), "h, pairs");
  check_size(h_columns, width, "h, ranks");
  std::vector<int64_t> O;
  const std::vector<int32_t> row_of_position = routing.rows_of_positions(dy[0], "dy");
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
  const Tensor dweights =
      weights ? empty(weights->size(0), weights->size(1), sum_dtype) : absent(sum_dtype);
  for_dtype(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    const std::vector<C> scales = to_compute<C>(scaling);
    const PairWeights<C> pair_weights(weights, routing, sum_dtype);
    ShrinkBackward<S, C> shrink{.routing = routing,
                                .blocks = blocks,
                                .scaling = scales.data(),
                                .weights = pair_weights,
                                .dy = {},
                                .lora_b = {},
                                .O = O,
                                .width = width,
                                .h = h.const_data_ptr<S>(),
                                .dh = dh.mutable_data_ptr<S>(),
                                .u = u.mutable_data_ptr<S>(),
                                .dweights = weights ? dweights.mutable_data_ptr<C>() : nullptr};
    for (int64_t i = 0; i < siblings; ++i) {
      shrink.dy.push_back({dy[i].const_data_ptr<S>(), dy[i].stride(0), row_of_position.data()});
      shrink.lora_b.push_back({lora_b[i].const_data_ptr<S>(), lora_b[i].stride(0), nullptr});
    }
    const std::vector<Tile> tiles = split_into_tiles(routing, TILE_BACKWARD);
    const int64_t w = padded(width);
    torch::stable::parallel_for(
        0, int64_t(tiles.size()), grain(TILE_BACKWARD * width * O[0]),
        [&](int64_t begin, int64_t end) {
          std::vector<C> buffer((TILE_BACKWARD + COLUMNS_BACKWARD) * w +
                                TILE_BACKWARD * COLUMNS_BACKWARD);
          vectorised([&](auto level) {
            using Unit = typename Operand<S, decltype(level)::bf16_pairs>::Unit;
            auto* b_units = reinterpret_cast<Unit*>(buffer.data() + TILE_BACKWARD * w);
            for (int64_t n = begin; n < end; ++n) {
              shrink.template run<decltype(level)>(tiles[n], buffer.data(), b_units,
                                                   b_units + COLUMNS_BACKWARD * w);
            }
          });
        });
    clear_rows<S>(dh, routing.num_routed());
    clear_rows<S>(u, routing.num_routed());
    if (weights) {
      C* dweights_data = dweights.mutable_data_ptr<C>();
      for (int64_t position = routing.num_routed(); position < pairs; ++position) {
        dweights_data[routing.pair(position)] = C{0};
      }
    }
  });
  return {dh, u, dweights};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_shrink", TORCH_BOX(&moelora::grouped_shrink));
  m.impl("grouped_shrink_backward", TORCH_BOX(&moelora::grouped_shrink_backward));
}
