// The op `route`: the routing arrays (Routing in types.py) by a counting sort. One pass over the
// pairs counts them by expert, one pass over the counters turns counts into sorted positions, and
// a second pass over the pairs writes them. Threads split the passes over the pairs by tokens.
#include "route.h"

#include <torch/csrc/stable/library.h>

#include <utility>

namespace moelora {
namespace {

// Pairs of one share of the tokens. They cost about 100 us, which pays for waking a thread and for
// the counters of the share.
constexpr int64_t PAIRS_PER_SHARE = 1 << 16;

}  // namespace

void sort_pairs(const IntegerTensor& experts, const RoutingSizes& sizes, int32_t* order,
                int32_t* offsets) {
  const auto [T, S, E, siblings, P, N] = sizes;
  const int64_t K = S / siblings;
  // A label is an expert of one sibling, or E for "not routed".
  const int64_t labels = E + 1;
  const int64_t num_shares = std::clamp<int64_t>(P / PAIRS_PER_SHARE, 1, 64);
  const int64_t tokens_per_share = (T + num_shares - 1) / num_shares;
  // [num_shares, S, labels]: first the number of pairs, then the position of the next pair.
  std::vector<int32_t> counters(num_shares * S * labels, 0);

  // Calls function(pair, its counter) for every pair, in the order of pairs within a share.
  const auto for_pairs = [&, T = T, S = S, E = E](const auto& function) {
    torch::stable::parallel_for(0, num_shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        const int64_t last = std::min(T, (share + 1) * tokens_per_share);
        for (int64_t t = share * tokens_per_share; t < last; ++t) {
          int32_t* row = counters.data() + share * S * labels;
          for (int64_t pair = t * S; pair < (t + 1) * S; ++pair, row += labels) {
            const int64_t expert = experts[pair];
            function(int32_t(pair), row[expert >= 0 && expert < E ? expert : E]);
          }
        }
      }
    });
  };

  // Count the pairs of every share, slot and label.
  for_pairs([](int32_t, int32_t& counter) { ++counter; });

  // Replace every count by the position of its first pair: by expert, then slot, then token.
  int32_t position = 0;
  const auto assign_positions = [&, S = S](int64_t begin, int64_t end, int64_t label) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t share = 0; share < num_shares; ++share) {
        position += std::exchange(counters[(share * S + slot) * labels + label], position);
      }
    }
  };
  for (int64_t i = 0; i < siblings; ++i) {
    for (int64_t e = 0; e < E; ++e) {
      *offsets++ = position;
      assign_positions(i * K, (i + 1) * K, e);
    }
  }
  *offsets = position;
  assign_positions(0, S, E);

  // Write every pair to its position.
  for_pairs([&](int32_t pair, int32_t& counter) { order[counter++] = pair; });
}

void fill_tiles(const int32_t* offsets, int64_t P, int64_t N, int64_t size, int32_t* tiles) {
  const int32_t* end_of_tiles = tiles + 2 * count_tiles(P, N, size);
  // Expert N stands for the pairs that are not routed.
  for (int64_t e = 0; e <= N; ++e) {
    const int64_t end = e < N ? offsets[e + 1] : P;
    for (int64_t position = offsets[e]; position < end; position += size) {
      *tiles++ = int32_t(e);
      *tiles++ = int32_t(position);
    }
  }
  while (tiles < end_of_tiles) {
    *tiles++ = int32_t(N);
    *tiles++ = int32_t(P);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor experts, int64_t num_experts,
                                                 int64_t siblings, int64_t tile, int64_t chunk) {
  const RoutingSizes sizes(experts, num_experts, siblings, tile, chunk);
  const auto [P, N] = std::pair(sizes.P, sizes.N);
  const IntegerTensor expert_ids(experts, "experts");
  Tensor order = empty_vector(P, ScalarType::Int);
  Tensor offsets = empty_vector(N + 1, ScalarType::Int);
  Tensor tiles = empty(count_tiles(P, N, tile), 2, ScalarType::Int);
  Tensor chunks = empty(count_tiles(P, N, chunk), 2, ScalarType::Int);

  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  sort_pairs(expert_ids, sizes, order.mutable_data_ptr<int32_t>(), offsets_data);
  fill_tiles(offsets_data, P, N, tile, tiles.mutable_data_ptr<int32_t>());
  fill_tiles(offsets_data, P, N, chunk, chunks.mutable_data_ptr<int32_t>());
  return {order, offsets, tiles, chunks};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("route", TORCH_BOX(&moelora::route)); }
