// Dropout of x [T, I]: x[t, i] is 0 if it is dropped, else x[t, i] / keep_probability. It is
// dropped if lane i % 8 of Philox-4x32-7 with counter t ceil(I / 8) + i / 8 is below a threshold.
// Lanes 2 j and 2 j + 1 are the low and the high 16 bits of word j. The seed is the key, and a
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

// Random numbers of 16 bits in the four words of one counter.
constexpr int64_t LANES = 8;

// A random number. Philox writes words of 32 bits, in which lane 2 j is the low half of word j.
using Lane [[gnu::may_alias]] = uint16_t;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half of a word comes first");

// Returns the random numbers of Philox-4x32-7 for the counters from `first` on: number 8 c + lane
// is lane `lane` of counter first + c. They lie in `random` [4 COUNTERS], which this function
// fills.
template <int64_t COUNTERS>
MOELORA_INLINE const Lane* philox(Philox state, int64_t first, uint32_t* random) {
  constexpr int ROUNDS = 7;
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
    for (int word = 0; word < 4; ++word) random[4 * c + word] = words[word][c];
  }
  return reinterpret_cast<const Lane*>(random);
}

// The masks of one seed, applied to values in the compute dtype.
struct Mask {
  Philox state{};
  // An element is dropped if its random number is below this; 0 without dropout.
  uint16_t threshold = 0;
  double keep_probability = 1.0;
  bool per_expert = false;

  Mask() = default;
  Mask(double p, bool mask_per_expert, const std::optional<Tensor>& seed);

  bool active() const { return threshold > 0; }

  // Scales or drops values [count]: the elements of row t of a matrix [T, I] from column i on.
  // `expert` names the stream if every expert has a mask.
  template <class C>
  MOELORA_INLINE void apply(C* values, int64_t t, int64_t i, int64_t I, int64_t count,
                            int64_t expert) const {
    // The random numbers of a strip of 256 columns.
    constexpr int64_t COUNTERS = 32;
    alignas(64) uint32_t random[4 * COUNTERS];
    Philox stream_state = state;
    stream_state.stream = per_expert ? uint32_t(expert) : 0;
    const int64_t row_counter = t * ((I + LANES - 1) / LANES);
    const C divisor = C(keep_probability);
    for (int64_t first = i - i % LANES; first < i + count; first += LANES * COUNTERS) {
      const Lane* lanes = philox<COUNTERS>(stream_state, row_counter + first / LANES, random);
      const int64_t begin = std::max(first, i);
      const int64_t end = std::min(first + LANES * COUNTERS, i + count);
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) {
        values[j - i] = lanes[j - first] < threshold ? C{0} : values[j - i] / divisor;
      }
    }
  }
};

// Returns `count` elements of row t of a matrix [T, I] after the dropout that an expert sees: `row`
// without dropout, else `out`. `row` points at column i. `scratch` has `count` numbers.
template <class S>
MOELORA_INLINE const S* drop_row(const Mask& mask, const S* row, int64_t t, int64_t i, int64_t I,
                                 int64_t count, int64_t expert, Compute<S>* scratch, S* out) {
  if (!mask.active()) return row;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) scratch[j] = widen(row[j]);
  mask.apply(scratch, t, i, I, count, expert);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = narrow<S>(scratch[j]);
  return out;
}

// Returns dropout(x) of x [T, I] in x's dtype, with the mask of one stream.
Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream);

}  // namespace moelora
