// exp of a power of at most 0, in loops that the compiler vectorises.
#pragma once

#include <cmath>

#include "simd.h"

namespace moelora {

// Returns exp(power) for a power of at most 0, with an error of at most 2 units in the last place.
// It has no calls and no branches, so that the compiler vectorises loops over it.
MOELORA_INLINE float exponential(float power) {
  // Below this power the result is not a normal number, and counts as zero. NaN compares false, so
  // it stays NaN.
  constexpr float SMALLEST = -87.0f;
  const float clamped = power < SMALLEST ? SMALLEST : power;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const float shifted = clamped * 0x1.715476p0f + 0x1.8p23f;
  const float twos = shifted - 0x1.8p23f;
  const float rest = (clamped - twos * 0x1.62e400p-1f) - twos * 0x1.7f7d1cp-20f;
  // The Taylor series of exp(rest), from 1 / 6! on; |rest| is at most ln 2 / 2.
  float sum = 0x1.6c16c2p-10f;
  sum = sum * rest + 0x1.111112p-7f;
  sum = sum * rest + 0x1.555556p-5f;
  sum = sum * rest + 0x1.555556p-3f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const uint32_t scale = (bits<uint32_t>(shifted) << 23) + 0x3F800000;
  return power < SMALLEST ? 0.0f : sum * bits<float>(scale);
}

MOELORA_INLINE double exponential(double power) { return std::exp(power); }

}  // namespace moelora
