#include "dropout.h"

#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "simd.h"

namespace moelora {
namespace {

// Counters per step: 64 give every vector width whole vectors and stay in registers and L1.
constexpr int64_t COUNTERS = 64;

// Elements [begin, end) of x, those with a random number up to `last_dropped` set to zero.
template <class S>
MOELORA_INLINE void drop(const S* x, S* out, int64_t begin, int64_t end, Philox state,
                         uint32_t last_dropped, Compute<S> kept) {
  using C = Compute<S>;
  constexpr int64_t STEP = 4 * COUNTERS;
  alignas(64) uint32_t random[STEP];
  for (int64_t n = begin; n < end; n += STEP) {
    philox<COUNTERS>(state, n / 4, random);
    const int64_t count = std::min(STEP, end - n);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const C scaled = widen(x[n + j]) / kept;
      out[n + j] = narrow<S>(random[j] <= last_dropped ? C{0} : scaled);
    }
  }
}

Philox philox_of(const Tensor& seed, int64_t stream) {
  check_size(seed.numel(), 1, "seed");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed: expected int64");
  const auto key = uint64_t(*seed.const_data_ptr<int64_t>());
  return {.key = {uint32_t(key), uint32_t(key >> 32)}, .stream = uint32_t(stream)};
}

}  // namespace

Mask::Mask(double p, bool of_each_expert, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: expected a probability in [0, 1), got ", p);
  threshold = uint64_t(std::nearbyint(p * 0x1p32));
  if (threshold == 0) return;
  STD_TORCH_CHECK(seed.has_value(), "seed: needed for dropout");
  state = philox_of(*seed, 0);
  kept = 1.0 - p;
  per_expert = of_each_expert;
}

Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream) {
  check_floating(x, "x");
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "p: expected a probability, got ", p);
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream: expected 32 bits, got ", stream);
  const Philox state = philox_of(seed, stream);
  x = row_major(x);
  const auto threshold = uint64_t(std::nearbyint(p * 0x1p32));
  if (threshold == 0) return torch::stable::clone(x);
  Tensor out = torch::stable::empty_like(x);

  const auto last_dropped = uint32_t(threshold - 1);
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const S* from = x.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    const int64_t numel = x.numel();
    const int64_t block = 4 * COUNTERS;
    const int64_t num_blocks = (numel + block - 1) / block;
    const auto kept = Compute<S>(1.0 - p);
    torch::stable::parallel_for(0, num_blocks, grain(10 * block), [&](int64_t first, int64_t last) {
      vectorised([&](auto) {
        drop<S>(from, to, first * block, std::min(last * block, numel), state, last_dropped, kept);
      });
    });
  });
  return out;
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("dropout", TORCH_BOX(&moelora::dropout)); }
