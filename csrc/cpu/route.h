// The op `route` as functions: it sorts the pairs of tokens and slots by expert. The structure
// Routing in moelora_kernels/types.py describes the arrays.
#pragma once

#include <tuple>

#include "gate.h"
#include "routing.h"

namespace moelora {

// Fills order [P] and offsets [N + 1] for experts [T, S], by a stable counting sort. Columns i K to
// (i + 1) K of `experts` belong to sibling i. A pair with an expert outside [0, E) is not routed.
void sort_pairs(const IntegerTensor& experts, const RoutingSizes& sizes, int32_t* order,
                int32_t* offsets);

// Fills tiles [count_tiles(P, N, size), 2]: the expert and the first sorted position of every tile
// of `size` positions.
void fill_tiles(const int32_t* offsets, int64_t P, int64_t N, int64_t size, int32_t* tiles);

// Returns order, offsets, tiles and chunks.
std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor experts, int64_t num_experts,
                                                 int64_t siblings, int64_t tile, int64_t chunk);

}  // namespace moelora
