// The sizes of the routing arrays, on any device; types.py explains the arrays.
#pragma once

#include <algorithm>

#include "check.h"

namespace moelora {

// How many tiles of `size` places hold P pairs of N experts, however they are routed.
inline int64_t count_tiles(int64_t P, int64_t N, int64_t size) {
  return P / size + std::min(N + 1, P);
}

struct RoutingSizes {
  int64_t T;  // tokens
  int64_t S;  // slots of a token, of all siblings
  int64_t E;  // experts of a sibling
  int64_t siblings;
  int64_t P;  // pairs
  int64_t N;  // experts of all siblings

  // Checks everything that `route` is asked for except the dtype of `indices`.
  RoutingSizes(const Tensor& indices, int64_t num_experts, int64_t num_siblings, int64_t tile,
               int64_t chunk)
      : E(num_experts), siblings(num_siblings) {
    constexpr int64_t LIMIT = INT32_MAX;
    const auto [tokens, slots] = shape<2>(indices, "experts");
    T = tokens;
    S = slots;
    STD_TORCH_CHECK(E >= 1, "num_experts: expected at least 1, got ", E);
    STD_TORCH_CHECK(siblings >= 1, "siblings: expected at least 1, got ", siblings);
    STD_TORCH_CHECK(S % siblings == 0, "experts: ", S, " columns for ", siblings, " siblings");
    STD_TORCH_CHECK(tile >= 1, "tile: expected at least 1, got ", tile);
    STD_TORCH_CHECK(chunk >= 1, "chunk: expected at least 1, got ", chunk);
    STD_TORCH_CHECK(E < LIMIT / siblings, "num_experts: expected ", siblings,
                    " siblings to have less than 2^31 experts, got ", E, " each");
    STD_TORCH_CHECK(S == 0 || T <= LIMIT / S, "experts: expected less than 2^31 pairs, got ", T,
                    " x ", S);
    P = T * S;
    N = siblings * E;
  }
};

}  // namespace moelora
