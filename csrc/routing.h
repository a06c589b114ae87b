// The sizes of the routing arrays, for the op `route` on CPU and CUDA. The structure Routing in
// moelora_kernels/types.py describes the arrays.
#pragma once

#include <algorithm>

#include "check.h"

namespace moelora {

// Returns how many tiles of `size` sorted positions hold P pairs of N experts, however they are
// routed. Each expert, and the pairs that are not routed, can leave one tile that is not full.
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

  // Checks all arguments of `route` except the dtype of `experts` [T, S].
  RoutingSizes(const Tensor& experts, int64_t num_experts, int64_t num_siblings, int64_t tile,
               int64_t chunk)
      : E(num_experts), siblings(num_siblings) {
    constexpr int64_t LIMIT = INT32_MAX;
    const auto [tokens, slots] = shape<2>(experts, "experts");
    T = tokens;
    S = slots;
    STD_TORCH_CHECK(E >= 1, "num_experts: expected at least 1, got ", E);
    STD_TORCH_CHECK(siblings >= 1, "siblings: expected at least 1, got ", siblings);
    STD_TORCH_CHECK(S % siblings == 0, "experts: expected the same number of columns for each of ",
                    siblings, " siblings, got ", S, " columns");
    STD_TORCH_CHECK(tile >= 1, "tile: expected at least 1, got ", tile);
    STD_TORCH_CHECK(chunk >= 1, "chunk: expected at least 1, got ", chunk);
    STD_TORCH_CHECK(E < LIMIT / siblings,
                    "num_experts: expected less than 2^31 experts of all siblings, got ", siblings,
                    " x ", E);
    STD_TORCH_CHECK(S == 0 || T <= LIMIT / S, "experts: expected less than 2^31 pairs, got ", T,
                    " x ", S);
    P = T * S;
    N = siblings * E;
  }
};

}  // namespace moelora
