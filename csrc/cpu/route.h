// From the experts of every token to the tokens of every expert; types.py explains the arrays.
#pragma once

#include <tuple>

#include "gate.h"
#include "routing.h"

namespace moelora {

// order [P] and offsets [N + 1] of indices [T, S], by a stable counting sort. Columns i K to
// (i + 1) K belong to sibling i; an index outside [0, E) is not routed.
void sort_pairs(const Index& indices, const RoutingSizes& sizes, int32_t* order, int32_t* offsets);

// The expert and the first place of every tile of `size` places, [count_tiles(P, N, size), 2].
void fill_tiles(const int32_t* offsets, int64_t P, int64_t N, int64_t size, int32_t* tiles);

// order, offsets, tiles and chunks; see reference.route.
std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor indices, int64_t num_experts,
                                                 int64_t siblings, int64_t tile, int64_t chunk);

}  // namespace moelora
