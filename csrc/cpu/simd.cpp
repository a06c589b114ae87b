// Chooses the vector level of this process: the highest level of the processor, or MOELORA_SIMD if
// that is lower. simd.h describes the levels.
#include "simd.h"

#include <algorithm>
#include <cstdlib>

namespace moelora {
namespace {

// Returns the highest level of the processor.
Level processor_level() {
#if MOELORA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Level::avx512bf16;
  return avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::portable;
#else
  return Level::portable;
#endif
}

// Returns the level that MOELORA_SIMD names; the highest level if it is not set or unknown.
Level requested_level() {
  const char* name = std::getenv("MOELORA_SIMD");
  if (name == nullptr) return Level::avx512bf16;
  for (Level level : {Level::portable, Level::avx2, Level::avx512, Level::avx512bf16}) {
    if (std::strcmp(name, simd_level_name(level)) == 0) return level;
  }
  return Level::avx512bf16;
}

}  // namespace

Level simd_level() {
  static const Level level = std::min(processor_level(), requested_level());
  return level;
}

const char* simd_level_name(Level level) {
  switch (level) {
    case Level::avx512bf16:
      return "avx512bf16";
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace moelora
