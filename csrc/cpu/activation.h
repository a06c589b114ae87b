// The activations of a feed-forward network and their slopes, for vectors of float or double.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "simd.h"

namespace moelora {

enum class Activation { silu, gelu, gelu_tanh, relu };

inline Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "relu", "activation: expected silu, gelu, gelu_tanh or relu, got ", name);
  return Activation::relu;
}

// The type of the numbers of a vector.
template <class V>
using Number = std::decay_t<decltype(V{}[0])>;

// Returns a vector of one number.
template <class V>
MOELORA_INLINE V repeated(double number) {
  return V{} + Number<V>(number);
}

// Returns function(number) of each number of a vector.
template <class V, class Function>
MOELORA_INLINE V each(const V& vector, const Function& function) {
  V result;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(Number<V>); ++lane) {
    result[lane] = function(vector[lane]);
  }
  return result;
}

// Returns exp(power) for powers of at most 0. The float version has an error of at most 2 units in
// the last place, and returns 0 for a power below -87.
template <class V>
MOELORA_INLINE V exponential_of_negative(const V& power) {
  if constexpr (std::is_same_v<Number<V>, double>) {
    return each(power, [](double number) { return std::exp(number); });
  } else {
    using U = typename Vector<uint32_t, sizeof(V)>::type;
    const V smallest = repeated<V>(-87.0);
    // NaN compares false, so it stays NaN.
    const V clamped = power < smallest ? smallest : power;
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const V shifted = clamped * 0x1.715476p0f + 0x1.8p23f;
    const V twos = shifted - 0x1.8p23f;
    const V rest = (clamped - twos * 0x1.62e400p-1f) - twos * 0x1.7f7d1cp-20f;
    // The Taylor series of exp(rest), from 1 / 6! on; |rest| is at most ln 2 / 2.
    V sum = repeated<V>(0x1.6c16c2p-10);
    sum = sum * rest + 0x1.111112p-7f;
    sum = sum * rest + 0x1.555556p-5f;
    sum = sum * rest + 0x1.555556p-3f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    const V result = sum * (V)(((U)shifted << 23) + 0x3F800000u);
    return power < smallest ? V{} : result;
  }
}

// Returns -|z|: z with its sign bit set.
template <class V>
MOELORA_INLINE V negative_magnitude(const V& z) {
  using U = typename Vector<std::conditional_t<sizeof(Number<V>) == 8, uint64_t, uint32_t>,
                            sizeof(V)>::type;
  return (V)((U)z | (U)(-V{}));
}

// Returns 1 / (1 + exp(-z)).
template <class V>
MOELORA_INLINE V sigmoid(const V& z) {
  const V power = exponential_of_negative(negative_magnitude(z));
  const V one = repeated<V>(1);
  return (z < V{} ? power : one) / (one + power);
}

// Returns the error function. The float version has an error of at most 2 units in the last place.
template <class V>
MOELORA_INLINE V error_function(const V& x) {
  if constexpr (std::is_same_v<Number<V>, double>) {
    return each(x, [](double number) { return std::erf(number); });
  } else {
    const V size = -negative_magnitude(x);
    const V square = x * x;
    // From 0.927734375 on: 1 - exp(p(|x|)).
    V high = size * -1.72853470e-5f + 3.83197126e-4f;
    const V middle = size * -3.88396438e-3f + 2.42546219e-2f;
    high = high * square + middle;
    high = high * size - 1.06777877e-1f;
    high = high * size - 6.34846687e-1f;
    high = high * size - 1.28717512e-1f;
    high = high * size - size;
    high = 1.0f - exponential_of_negative(high);
    high = x < V{} ? -high : high;
    V low = square * -5.96761703e-4f + 4.99119423e-3f;
    low = low * square - 2.67681349e-2f;
    low = low * square + 1.12819925e-1f;
    low = low * square - 3.76125336e-1f;
    low = low * square + 1.28379166e-1f;
    low = low * x + x;
    return size > repeated<V>(0.927734375) ? high : low;
  }
}

// act(z), and its derivative at z.
template <class V>
struct Activated {
  V value;
  V slope;
};

template <Activation A, class V>
MOELORA_INLINE Activated<V> activate(const V& z) {
  using C = Number<V>;
  const V zero{}, one = repeated<V>(1);
  if constexpr (A == Activation::relu) {
    return {z < zero ? zero : z, z > zero ? one : zero};
  } else if constexpr (A == Activation::silu) {
    const V share = sigmoid(z);
    const V value = z * share;
    return {value, share + value * (one - share)};
  } else if constexpr (A == Activation::gelu) {
    constexpr C SQRT_HALF = C(0.70710678118654752440);
    constexpr C DENSITY = C(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const V probability = C(0.5) * (one + error_function(V(z * SQRT_HALF)));
    const V density = DENSITY * exponential_of_negative(V(C(-0.5) * z * z));
    return {z * probability, probability + z * density};
  } else {
    // z sigmoid(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3).
    constexpr C ROOT = C(1.5957691216057307117);  // 2 sqrt(2 / pi)
    const V square = z * z;
    const V share = sigmoid(V(ROOT * z * (one + C(0.044715) * square)));
    const V value = z * share;
    return {value, share + value * (one - share) * (ROOT * (one + C(0.134145) * square))};
  }
}

// Calls function(std::integral_constant<Activation, A>{}).
template <class Function>
MOELORA_INLINE void for_activation(Activation activation, const Function& function) {
  using enum Activation;
  switch (activation) {
    case silu:
      return function(std::integral_constant<Activation, silu>{});
    case gelu:
      return function(std::integral_constant<Activation, gelu>{});
    case gelu_tanh:
      return function(std::integral_constant<Activation, gelu_tanh>{});
    case relu:
      return function(std::integral_constant<Activation, relu>{});
  }
}

}  // namespace moelora
