// The activations of a feed-forward network and their slopes. All are free of branches, so that the
// compiler vectorises loops over them.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "exponential.h"
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

// Returns 1 / (1 + exp(-z)).
template <class C>
MOELORA_INLINE C sigmoid(C z) {
  const C power = exponential(z < 0 ? z : -z);
  const C quotient = 1 / (1 + power);
  return z < 0 ? power * quotient : quotient;
}

// Returns the error function. The float version has an error of at most 2 units in the last place.
MOELORA_INLINE double error_function(double x) { return std::erf(x); }

MOELORA_INLINE float error_function(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float square = x * x;
  // From 0.927734375 on: 1 - e^p(|x|).
  float high = -1.72853470e-5f * magnitude + 3.83197126e-4f;
  const float middle = -3.88396438e-3f * magnitude + 2.42546219e-2f;
  high = high * square + middle;
  high = high * magnitude - 1.06777877e-1f;
  high = high * magnitude - 6.34846687e-1f;
  high = high * magnitude - 1.28717512e-1f;
  high = high * magnitude - magnitude;
  high = 1.0f - exponential(high);
  high = x < 0 ? -high : high;
  float low = -5.96761703e-4f;
  low = low * square + 4.99119423e-3f;
  low = low * square - 2.67681349e-2f;
  low = low * square + 1.12819925e-1f;
  low = low * square - 3.76125336e-1f;
  low = low * square + 1.28379166e-1f;
  low = low * x + x;
  return magnitude > 0.927734375f ? high : low;
}

// act(z), and its derivative at z.
template <class C>
struct Activated {
  C value;
  C slope;
};

template <Activation A, class C>
MOELORA_INLINE Activated<C> activate(C z) {
  if constexpr (A == Activation::relu) {
    return {z < 0 ? C{0} : z, z > 0 ? C{1} : C{0}};
  } else if constexpr (A == Activation::silu) {
    const C share = sigmoid(z);
    const C value = z * share;
    return {value, share + value * (1 - share)};
  } else if constexpr (A == Activation::gelu) {
    constexpr C SQRT_HALF = C(0.70710678118654752440);
    constexpr C DENSITY = C(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const C probability = C(0.5) * (1 + error_function(z * SQRT_HALF));
    return {z * probability, probability + z * (DENSITY * exponential(C(-0.5) * z * z))};
  } else {
    // z sigmoid(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3).
    constexpr C ROOT = C(1.5957691216057307117);  // 2 sqrt(2 / pi)
    const C square = z * z;
    const C share = sigmoid(ROOT * z * (1 + C(0.044715) * square));
    const C value = z * share;
    return {value, share + value * (1 - share) * (ROOT * (1 + C(0.134145) * square))};
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
