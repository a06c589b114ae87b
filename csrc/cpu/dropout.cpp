// The op `dropout`: out = x (.) mask / (1 - p). dropout.h describes the mask. Threads split the
// elements of x.
#include "dropout.h"

#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "simd.h"

namespace moelora {
namespace {

// Counters of a step. 64 counters fill whole vectors of every width, and stay in registers and L1.
constexpr int64_t COUNTERS = 64;

// Computes elements [begin, end). An element is dropped if its random number is at most
// `last_dropped`.
template <class S>
MOELORA_INLINE void drop(const S* x, S* out, int64_t begin, int64_t end, Philox state,
                         uint32_t last_dropped, Compute<S> keep_probability) {
  using C = Compute<S>;
  constexpr int64_t STEP = 4 * COUNTERS;
  alignas(64) uint32_t random[STEP];
  for (int64_t n = begin; n < end; n += STEP) {
    philox<COUNTERS>(state, n / 4, random);
    const int64_t count = std::min(STEP, end - n);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const C scaled = widen(x[n + j]) / keep_probability;
      out[n + j] = narrow<S>(random[j] <= last_dropped ? C{0} : scaled);
    }
  }
}

// Returns the state of one stream of a seed.
Philox philox_state(const Tensor& seed, int64_t stream) {
  check_size(seed.numel(), 1, "seed");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed: expected int64, got ",
                  seed.scalar_type());
  const auto key = uint64_t(*seed.const_data_ptr<int64_t>());
  return {.key = {uint32_t(key), uint32_t(key >> 32)}, .stream = uint32_t(stream)};
}

}  // namespace

Mask::Mask(double p, bool mask_per_expert, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: expected a probability in [0, 1), got ", p);
  threshold = uint64_t(std::nearbyint(p * 0x1p32));
  if (threshold == 0) return;
  STD_TORCH_CHECK(seed.has_value(), "seed: expected a seed if dropout is above 0, got none");
  state = philox_state(*seed, 0);
  keep_probability = 1.0 - p;
  per_expert = mask_per_expert;
}

Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream) {
  check_floating(x, "x");
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, "p: expected a probability in [0, 1], got ", p);
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream: expected a number of 32 bits, got ",
                  stream);
  const Philox state = philox_state(seed, stream);
  x = row_major(x);
  const auto threshold = uint64_t(std::nearbyint(p * 0x1p32));
  if (threshold == 0) return torch::stable::clone(x);
  Tensor out = torch::stable::empty_like(x);

  const auto last_dropped = uint32_t(threshold - 1);
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const S* x_data = x.const_data_ptr<S>();
    S* out_data = out.mutable_data_ptr<S>();
    const int64_t numel = x.numel();
    const int64_t block = 4 * COUNTERS;
    const int64_t num_blocks = (numel + block - 1) / block;
    const auto keep_probability = Compute<S>(1.0 - p);
    torch::stable::parallel_for(0, num_blocks, grain(10 * block), [&](int64_t first, int64_t last) {
      vectorised([&](auto) {
        drop<S>(x_data, out_data, first * block, std::min(last * block, numel), state, last_dropped,
                keep_probability);
      });
    });
  });
  return out;
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("dropout", TORCH_BOX(&moelora::dropout)); }
