// The routing arrays by counting: twice through the pairs, and once through the counters between.
#include "route.h"

#include <torch/csrc/stable/library.h>

#include <utility>

namespace moelora {
namespace {

// Pairs of one part of the tokens: some 100 us, enough to wake a thread and to count for it alone.
constexpr int64_t PAIRS_PER_PART = 1 << 16;

}  // namespace

void sort_pairs(const Index& indices, const RoutingSizes& sizes, int32_t* order, int32_t* offsets) {
  const auto [T, S, E, siblings, P, N] = sizes;
  const int64_t slots = S / siblings;
  // The experts of one sibling, then "not routed".
  const int64_t labels = E + 1;
  const int64_t parts = std::clamp<int64_t>(P / PAIRS_PER_PART, 1, 64);
  const int64_t tokens = (T + parts - 1) / parts;
  // [parts, S, labels]: how many pairs of this kind, later the place of the next.
  std::vector<int32_t> counters(parts * S * labels, 0);

  const auto for_pairs = [&, T = T, S = S, E = E](const auto& function) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t last = std::min(T, (part + 1) * tokens);
        for (int64_t t = part * tokens; t < last; ++t) {
          int32_t* row = counters.data() + part * S * labels;
          for (int64_t pair = t * S; pair < (t + 1) * S; ++pair, row += labels) {
            const int64_t expert = indices[pair];
            function(int32_t(pair), row[expert >= 0 && expert < E ? expert : E]);
          }
        }
      }
    });
  };

  for_pairs([](int32_t, int32_t& counter) { ++counter; });
  int32_t place = 0;
  const auto give_places = [&, S = S](int64_t begin, int64_t end, int64_t label) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t part = 0; part < parts; ++part) {
        place += std::exchange(counters[(part * S + s) * labels + label], place);
      }
    }
  };
  for (int64_t i = 0; i < siblings; ++i) {
    for (int64_t e = 0; e < E; ++e) {
      *offsets++ = place;
      give_places(i * slots, (i + 1) * slots, e);
    }
  }
  *offsets = place;
  give_places(0, S, E);
  for_pairs([&](int32_t pair, int32_t& counter) { order[counter++] = pair; });
}

void fill_tiles(const int32_t* offsets, int64_t P, int64_t N, int64_t size, int32_t* tiles) {
  const int32_t* end_of_tiles = tiles + 2 * count_tiles(P, N, size);
  for (int64_t e = 0; e <= N; ++e) {
    const int64_t end = e < N ? offsets[e + 1] : P;
    for (int64_t place = offsets[e]; place < end; place += size) {
      *tiles++ = int32_t(e);
      *tiles++ = int32_t(place);
    }
  }
  while (tiles < end_of_tiles) {
    *tiles++ = int32_t(N);
    *tiles++ = int32_t(P);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor indices, int64_t num_experts,
                                                 int64_t siblings, int64_t tile, int64_t chunk) {
  const RoutingSizes sizes(indices, num_experts, siblings, tile, chunk);
  const auto [P, N] = std::pair(sizes.P, sizes.N);
  const Index experts(indices, "experts");
  Tensor order = empty_vector(P, ScalarType::Int);
  Tensor offsets = empty_vector(N + 1, ScalarType::Int);
  Tensor tiles = empty(count_tiles(P, N, tile), 2, ScalarType::Int);
  Tensor chunks = empty(count_tiles(P, N, chunk), 2, ScalarType::Int);

  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  sort_pairs(experts, sizes, order.mutable_data_ptr<int32_t>(), offsets_data);
  fill_tiles(offsets_data, P, N, tile, tiles.mutable_data_ptr<int32_t>());
  fill_tiles(offsets_data, P, N, chunk, chunks.mutable_data_ptr<int32_t>());
  return {order, offsets, tiles, chunks};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("route", TORCH_BOX(&moelora::route)); }
