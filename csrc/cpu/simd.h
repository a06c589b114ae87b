// Vector levels: a kernel is compiled once for each level, and the highest level that the processor
// has runs. Also: vectors, and the conversion of storage dtypes.
//
// A kernel is a template over the width of a vector in bytes. It is called like this:
//     vectorised([&](auto width) { kernel<width()>(...); });
// Every function that a kernel calls must be MOELORA_INLINE. A function that is not inlined is
// compiled for the portable level only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "check.h"

#define MOELORA_INLINE inline __attribute__((always_inline))
// The same for a lambda; it stands after the parameters.
#define MOELORA_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#define MOELORA_X86 1
#define MOELORA_AVX2 \
  __attribute__((target("avx2,fma,bmi,bmi2,prefer-vector-width=256"), flatten, noinline))
#define MOELORA_AVX512_BF16                                                                \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2," \
                        "prefer-vector-width=512"),                                        \
                 flatten, noinline))
#define MOELORA_AVX512                                                          \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2," \
                        "prefer-vector-width=512"),                             \
                 flatten, noinline))
#else
#define MOELORA_X86 0
#define MOELORA_AVX2
#define MOELORA_AVX512
#define MOELORA_AVX512_BF16
#endif

namespace moelora {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

enum class Level : int { portable, avx2, avx512, avx512bf16 };

// Returns the level of this process: the highest level of the processor, or MOELORA_SIMD if that is
// lower.
Level simd_level();
const char* simd_level_name(Level level);

// The width of a vector. BF16_PAIRS: the level has an instruction that multiplies pairs of bfloat16
// and adds both products to a float32.
template <int BYTES, bool BF16_PAIRS = false>
struct Width {
  static constexpr bool bf16_pairs = BF16_PAIRS;
  constexpr int operator()() const { return BYTES; }
};

template <class Function>
MOELORA_AVX512_BF16 void on_avx512bf16(const Function& function) {
  function(Width<64, true>{});
}

template <class Function>
MOELORA_AVX512 void on_avx512(const Function& function) {
  function(Width<64>{});
}

template <class Function>
MOELORA_AVX2 void on_avx2(const Function& function) {
  function(Width<32>{});
}

// Calls function(Width{}) for the level of this process, compiled for that level.
template <class Function>
void vectorised(const Function& function) {
#if MOELORA_X86
  switch (simd_level()) {
    case Level::avx512bf16:
      return on_avx512bf16(function);
    case Level::avx512:
      return on_avx512(function);
    case Level::avx2:
      return on_avx2(function);
    case Level::portable:
      break;
  }
#endif
  function(Width<16>{});
}

// Calls function(Width{}) for the level of this process, compiled for the portable level. The
// function calls `vectorised` itself.
template <class Function>
void vectorised_level(const Function& function) {
#if MOELORA_X86
  switch (simd_level()) {
    case Level::avx512bf16:
      return function(Width<64, true>{});
    case Level::avx512:
      return function(Width<64>{});
    case Level::avx2:
      return function(Width<32>{});
    case Level::portable:
      break;
  }
#endif
  function(Width<16>{});
}

// A vector of LANES numbers of type C, in the vector type of the compiler.
template <class C, int BYTES>
struct Vector {
  typedef C type __attribute__((vector_size(BYTES)));
  // The same at any address; the memory may hold another type.
  typedef C unaligned __attribute__((vector_size(BYTES), aligned(1), may_alias));
  static constexpr int64_t LANES = BYTES / sizeof(C);
};

// Loads BYTES from memory as a vector of C. It returns a value, because a vector that memcpy fills
// stays on the stack.
template <class C, int BYTES>
MOELORA_INLINE typename Vector<C, BYTES>::type load(const void* source) {
  return *static_cast<const typename Vector<C, BYTES>::unaligned*>(source);
}

template <class C, int BYTES>
MOELORA_INLINE void store(void* target, const typename Vector<C, BYTES>::type& vector) {
  *static_cast<typename Vector<C, BYTES>::unaligned*>(target) = vector;
}

// Returns the bits of a number as another type of the same size.
template <class To, class From>
MOELORA_INLINE To bits(From number) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &number, sizeof(To));
  return result;
}

// `widen` converts from the storage dtype to the compute dtype, `narrow` converts back. Both are
// free of branches, so that the compiler vectorises loops over them.
MOELORA_INLINE float widen(float value) { return value; }
MOELORA_INLINE double widen(double value) { return value; }

MOELORA_INLINE float widen(BFloat16 value) { return bits<float>(uint32_t{value.x} << 16); }

MOELORA_INLINE float widen(Half value) {
  const uint32_t magnitude = uint32_t(value.x & 0x7FFF) << 13;
  const uint32_t sign = uint32_t(value.x & 0x8000) << 16;
  // 2^112 moves the exponent bias from 15 to 127, for subnormal numbers too.
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7F800000;
  return bits<float>(sign | (magnitude >= 0x0F800000 ? special : finite));
}

template <class S, class C>
MOELORA_INLINE S narrow(C value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t word = bits<uint32_t>(float(value));
    const uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    return BFloat16((word & 0x7FFFFFFF) > 0x7F800000 ? uint16_t{0x7FC0} : uint16_t(rounded),
                    BFloat16::from_bits());
  } else if constexpr (std::is_same_v<S, Half>) {
    // Round to nearest even: add a power of two that shifts the extra bits out.
    const uint32_t word = bits<uint32_t>(float(value));
    const uint32_t doubled = word + word;
    const float scaled = (bits<float>(word & 0x7FFFFFFF) * 0x1p112f) * 0x1p-110f;
    const uint32_t exponent = doubled & 0xFF000000;
    const uint32_t bias = exponent < 0x71000000 ? 0x71000000 : exponent;
    const uint32_t sum = bits<uint32_t>(bits<float>((bias >> 1) + 0x07800000) + scaled);
    const uint32_t finite = ((sum >> 13) & 0x7C00) + (sum & 0xFFF);
    return Half(uint16_t(((word >> 16) & 0x8000) | (doubled > 0xFF000000 ? 0x7E00 : finite)),
                Half::from_bits());
  } else {
    return S(value);
  }
}

// The C++ type of the compute dtype of S.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
struct Type {
  using type = S;
};

// Calls function(Type<S>{}) with the C++ type of a floating dtype.
template <class Function>
void for_dtype(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(Type<float>{});
    case ScalarType::Double:
      return function(Type<double>{});
    case ScalarType::BFloat16:
      return function(Type<BFloat16>{});
    case ScalarType::Half:
      return function(Type<Half>{});
    default:
      STD_TORCH_CHECK(false, "dtype: expected float16, bfloat16, float32 or float64, got ", dtype);
  }
}

}  // namespace moelora
