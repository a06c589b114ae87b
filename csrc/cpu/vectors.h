// Vectors and memory: numbers of a storage dtype, and blocks that are transposed in registers.
#pragma once

#include <type_traits>
#include <utility>

#include "panel.h"

namespace moelora {

// Loads numbers as a vector of the compute dtype C.
template <class S, class C, int BYTES>
MOELORA_INLINE typename Vector<C, BYTES>::type load_widened(const S* source) {
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  if constexpr (std::is_same_v<S, C>) {
    return load<C, BYTES>(source);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    using U = typename Vector<uint32_t, BYTES>::type;
    const auto words = load<uint16_t, BYTES / 2>(source);
#if MOELORA_X86
    if constexpr (BYTES == 64) {
      // The compiler would convert the halves of the vector.
      U wide;
      asm("vpmovzxwd %1, %0" : "=v"(wide) : "v"(words));
      return (typename Vector<C, BYTES>::type)(wide << 16);
    }
#endif
    return (typename Vector<C, BYTES>::type)(__builtin_convertvector(words, U) << 16);
  } else {
    alignas(64) C widened[LANES];
    widen_row(source, LANES, widened);
    return load<C, BYTES>(widened);
  }
}

// Stores a vector of float as bfloat16, rounded to nearest even, or as it is.
template <class V, class C, int BYTES>
MOELORA_INLINE void store_rounded(V* target, const typename Vector<C, BYTES>::type& vector) {
  if constexpr (std::is_same_v<V, C>) {
    store<C, BYTES>(target, vector);
  } else {
#if MOELORA_X86
    static_assert(std::is_same_v<V, BFloat16> && BYTES == 64);
    typename Vector<uint16_t, BYTES / 2>::type rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(vector));
    store<uint16_t, BYTES / 2>(target, rounded);
#endif
  }
}

// Transposes a block of PANEL x PANEL numbers.
template <int BYTES, class Unit>
MOELORA_INLINE void transpose_block(Unit* block) {
  if constexpr (BYTES == 64 && sizeof(Unit) == 4) {
    using V = typename Vector<Unit, 64>::type;
    using U = typename Vector<uint32_t, 64>::type;
    V rows[PANEL];
    for (int64_t row = 0; row < PANEL; ++row) rows[row] = load<Unit, 64>(block + row * PANEL);
    // In a step, blocks of size x size that mirror each other at a diagonal change places.
    const auto step = [&](auto block_size) MOELORA_INLINE_LAMBDA {
      constexpr uint32_t size = block_size();
      U upper{}, lower{};
      for (uint32_t lane = 0; lane < PANEL; ++lane) {
        upper[lane] = lane & size ? PANEL + (lane ^ size) : lane;
        lower[lane] = lane & size ? PANEL + lane : lane ^ size;
      }
      for (uint32_t row = 0; row < PANEL; ++row) {
        if (row & size) continue;
        const V first = rows[row], second = rows[row | size];
        rows[row] = __builtin_shuffle(first, second, upper);
        rows[row | size] = __builtin_shuffle(first, second, lower);
      }
    };
    step(std::integral_constant<uint32_t, 1>{});
    step(std::integral_constant<uint32_t, 2>{});
    step(std::integral_constant<uint32_t, 4>{});
    step(std::integral_constant<uint32_t, 8>{});
    for (int64_t row = 0; row < PANEL; ++row) store<Unit, 64>(block + row * PANEL, rows[row]);
  } else {
    for (int64_t row = 0; row < PANEL; ++row) {
      for (int64_t column = 0; column < row; ++column) {
        std::swap(block[row * PANEL + column], block[column * PANEL + row]);
      }
    }
  }
}

}  // namespace moelora
