// The op `dropout`: out = x (.) mask / keep_probability. dropout.h describes the mask. Threads
// split the elements of x.
#include "dropout.h"

#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "simd.h"

namespace moelora {
namespace {

// Counters of a step. 64 counters fill whole vectors of every width, and stay in registers and L1.
constexpr int64_t COUNTERS = 64;
// Elements of a step.
constexpr int64_t BLOCK = LANES * COUNTERS;

// Computes `count` elements, at most BLOCK, from x on. The first one has lane 0 of counter
// `counter`. An element is dropped if its random number is below `threshold`.
template <class S>
MOELORA_INLINE void drop(const S* x, S* out, int64_t count, int64_t counter, Philox state,
                         uint16_t threshold, Compute<S> keep_probability) {
  using C = Compute<S>;
  alignas(64) uint32_t random[4 * COUNTERS];
  const Lane* lanes = philox<COUNTERS>(state, counter, random);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const C scaled = widen(x[j]) / keep_probability;
    out[j] = narrow<S>(lanes[j] < threshold ? C{0} : scaled);
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

// Returns how many of the 2^16 random numbers drop an element: p 2^16, rounded. If p is not 0, the
// result is at least 1 and at most 2^16 - 1.
uint16_t dropout_threshold(double p) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout: expected a probability in [0, 1), got ", p);
  return p == 0.0 ? 0 : uint16_t(std::clamp(std::nearbyint(p * 0x1p16), 1.0, 0x1p16 - 1));
}

}  // namespace

Mask::Mask(double p, bool mask_per_expert, const std::optional<Tensor>& seed) {
  threshold = dropout_threshold(p);
  if (threshold == 0) return;
  STD_TORCH_CHECK(seed.has_value(), "seed: expected a seed if dropout is above 0, got none");
  state = philox_state(*seed, 0);
  keep_probability = 1.0 - threshold * 0x1p-16;
  per_expert = mask_per_expert;
}

Tensor dropout(Tensor x, double p, Tensor seed, int64_t stream) {
  check_floating(x, "x");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream: expected a number of 32 bits, got ",
                  stream);
  Mask mask(p, false, seed);
  mask.state.stream = uint32_t(stream);
  auto [rows, columns] = shape<2>(x, "x");
  x = row_major(x);
  if (!mask.active()) return torch::stable::clone(x);
  Tensor out = torch::stable::empty_like(x);

  // Rows whose width is a multiple of LANES follow each other without a gap between their counters,
  // like one long row.
  if (columns % LANES == 0) {
    columns *= rows;
    rows = 1;
  }
  const int64_t counters_of_row = (columns + LANES - 1) / LANES;
  const int64_t blocks_of_row = (columns + BLOCK - 1) / BLOCK;
  for_dtype(x.scalar_type(), [&](auto type) {
    using S = typename decltype(type)::type;
    const S* x_data = x.const_data_ptr<S>();
    S* out_data = out.mutable_data_ptr<S>();
    const auto keep_probability = Compute<S>(mask.keep_probability);
    const int64_t num_blocks = rows * blocks_of_row;
    torch::stable::parallel_for(0, num_blocks, grain(10 * BLOCK), [&](int64_t begin, int64_t end) {
      vectorised([&](auto) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t row = block / blocks_of_row;
          const int64_t first = block % blocks_of_row * BLOCK;
          const int64_t n = row * columns + first;
          drop<S>(x_data + n, out_data + n, std::min(BLOCK, columns - first),
                  row * counters_of_row + first / LANES, mask.state, mask.threshold,
                  keep_probability);
        }
      });
    });
  });
  return out;
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("dropout", TORCH_BOX(&moelora::dropout)); }
