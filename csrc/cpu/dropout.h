// Dropout whose mask is a pure function of (seed, stream, position), as in the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "check.h"
#include "simd.h"

namespace moelora {

struct Philox {
  uint32_t key[2];
  uint32_t stream;
};

// Philox-4x32-10: random[4 c + lane] of COUNTERS counters from `first` on.
template <int64_t COUNTERS>
MOELORA_INLINE void philox(Philox state, int64_t first, uint32_t* random) {
  constexpr int ROUNDS = 10;
  constexpr uint32_t MULTIPLIERS[2] = {0xD2511F53, 0xCD9E8D57};
  constexpr uint32_t KEY_STEPS[2] = {0x9E3779B9, 0xBB67AE85};
  uint32_t words[4][COUNTERS];
#pragma omp simd
  for (int64_t c = 0; c < COUNTERS; ++c) {
    words[0][c] = uint32_t(uint64_t(first + c));
    words[1][c] = uint32_t(uint64_t(first + c) >> 32);
    words[2][c] = state.stream;
    words[3][c] = 0;
  }
  for (int round = 0; round < ROUNDS; ++round) {
#pragma omp simd
    for (int64_t c = 0; c < COUNTERS; ++c) {
      const uint64_t product0 = uint64_t{MULTIPLIERS[0]} * words[0][c];
      const uint64_t product1 = uint64_t{MULTIPLIERS[1]} * words[2][c];
      words[0][c] = uint32_t(product1 >> 32) ^ words[1][c] ^ state.key[0];
      words[1][c] = uint32_t(product1);
      words[2][c] = uint32_t(product0 >> 32) ^ words[3][c] ^ state.key[1];
      words[3][c] = uint32_t(product0);
    }
    state.key[0] += KEY_STEPS[0];
    state.key[1] += KEY_STEPS[1];
  }
  for (int64_t c = 0; c < COUNTERS; ++c) {
    for (int lane = 0; lane < 4; ++lane) random[4 * c + lane] = words[lane][c];
  }
}

// The mask of one seed, for values that are widened already.
struct Mask {
  Philox state{};
  // Random numbers below it drop; 2^32 p does not fit 32 bits for p near 1.
  uint64_t threshold = 0;
  double kept = 1.0;
  bool per_expert = false;

  Mask() = default;
  Mask(double p, bool of_each_expert, const std::optional<Tensor>& seed);

  bool active() const { return threshold > 0; }

  // values[j] of element n + j: scaled, or dropped; `expert` picks the stream where it matters.
  template <class C>
  MOELORA_INLINE void apply(C* values, int64_t n, int64_t count, int64_t expert) const {
    constexpr int64_t COUNTERS = 16;
    alignas(64) uint32_t random[4 * COUNTERS];
    Philox own = state;
    own.stream = per_expert ? uint32_t(expert) : 0;
    const auto last_dropped = uint32_t(threshold - 1);
    const C divisor = C(kept);
    for (int64_t first = n - n % 4; first < n + count; first += 4 * COUNTERS) {
      philox<COUNTERS>(own, first / 4, random);
      const int64_t begin = std::max(first, n);
      const int64_t end = std::min(first + 4 * COUNTERS, n + count);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        values[j - n] = random[j - first] <= last_dropped ? C{0} : values[j - n] / divisor;
      }
    }
  }
};

// What of a row an expert sees: `from` itself, or a copy in `to` with elements n + j dropped.
template <class S>
MOELORA_INLINE const S* dropped(const Mask& mask, const S* from, int64_t n, int64_t count,
                                int64_t expert, Compute<S>* scratch, S* to) {
  if (!mask.active()) return from;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) scratch[j] = widen(from[j]);
  mask.apply(scratch, n, count, expert);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = narrow<S>(scratch[j]);
  return to;
}

Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream);

}  // namespace moelora
