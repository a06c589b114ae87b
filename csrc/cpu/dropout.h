// Dropout: element n (row-major) is 0 if it is dropped, else x[n] / (1 - p). It is dropped if lane
// n % 4 of Philox-4x32-10 with counter n / 4 is below p 2^32, rounded. The seed is the key, and a
// stream number tells several masks of one seed apart. No mask is stored: each thread computes the
// part that it applies.
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

// Fills random [4 COUNTERS] with the numbers of Philox-4x32-10 for the counters from `first` on:
// lane `lane` of counter first + c is random[4 c + lane].
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

// The masks of one seed, applied to values in the compute dtype.
struct Mask {
  Philox state{};
  // An element is dropped if its random number is below this. It has 64 bits because 2^32 p does
  // not fit 32 bits if p is near 1.
  uint64_t threshold = 0;
  double keep_probability = 1.0;
  bool per_expert = false;

  Mask() = default;
  Mask(double p, bool mask_per_expert, const std::optional<Tensor>& seed);

  bool active() const { return threshold > 0; }

  // Scales or drops values [count], which are the elements n to n + count. `expert` names the
  // stream if every expert has a mask.
  template <class C>
  MOELORA_INLINE void apply(C* values, int64_t n, int64_t count, int64_t expert) const {
    constexpr int64_t COUNTERS = 16;
    alignas(64) uint32_t random[4 * COUNTERS];
    Philox stream_state = state;
    stream_state.stream = per_expert ? uint32_t(expert) : 0;
    const auto last_dropped = uint32_t(threshold - 1);
    const C divisor = C(keep_probability);
    for (int64_t first = n - n % 4; first < n + count; first += 4 * COUNTERS) {
      philox<COUNTERS>(stream_state, first / 4, random);
      const int64_t begin = std::max(first, n);
      const int64_t end = std::min(first + 4 * COUNTERS, n + count);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        values[j - n] = random[j - first] <= last_dropped ? C{0} : values[j - n] / divisor;
      }
    }
  }
};

// Returns a row [count] after the dropout that an expert sees: `row` without dropout, else `out`.
// The row starts at element n of the matrix. `scratch` has `count` numbers.
template <class S>
MOELORA_INLINE const S* drop_row(const Mask& mask, const S* row, int64_t n, int64_t count,
                                 int64_t expert, Compute<S>* scratch, S* out) {
  if (!mask.active()) return row;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) scratch[j] = widen(row[j]);
  mask.apply(scratch, n, count, expert);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = narrow<S>(scratch[j]);
  return out;
}

// Returns dropout(x) in x's dtype: the mask of one stream, over all elements of x (row-major).
Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream);

}  // namespace moelora
