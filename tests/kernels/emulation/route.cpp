// csrc/cuda/route.cuh on the host, for tests/kernels/test_route_emulated.py.
#include "cuda.h"

#include "cuda/route.cuh"

namespace {

constexpr int GUARD = 64;
constexpr int GARBAGE = 0x5A5A5A5A;

}  // namespace

extern "C" {

void plan(int64_t P, int64_t N, int64_t E, int64_t* warps, int64_t* shared) {
  const moelora::RoutePlan plan = moelora::route_plan(P, N, E);
  *warps = plan.warps;
  *shared = plan.shared;
}

// Null, or what went wrong. `sizes`: T, S, E, siblings, tile, chunk, num_tiles, num_chunks.
const char* route(const void* ids, int64_t id_bytes, const int64_t* strides, const int64_t* sizes,
                  int32_t* order, int32_t* offsets, int32_t* tiles, int32_t* chunks, int64_t warps,
                  int64_t schedule) {
  const int64_t T = sizes[0], S = sizes[1], E = sizes[2], siblings = sizes[3];
  const moelora::RouteArguments arguments{
      .T = T,
      .S = S,
      .K = S / siblings,
      .E = static_cast<int>(E),
      .N = static_cast<int>(siblings * E),
      .P = T * S,
      .stride_token = strides[0],
      .stride_slot = strides[1],
      .tile = sizes[4],
      .chunk = sizes[5],
      .num_tiles = sizes[6],
      .num_chunks = sizes[7],
      .order = order,
      .offsets = offsets,
      .tiles = tiles,
      .chunks = chunks,
  };
  const int64_t used = moelora::route_counters(siblings * E, E, warps);
  for (int64_t block = 0; block < S + 2; ++block) {
    std::vector<int> counters(used + GUARD, GARBAGE);
    const bool finished = emulation::run_block(block, warps * emulation::LANES, schedule, [&] {
      if (id_bytes == 8) {
        moelora::route_block(arguments, static_cast<const int64_t*>(ids), counters.data());
      } else {
        moelora::route_block(arguments, static_cast<const int32_t*>(ids), counters.data());
      }
    });
    if (!finished) return "stuck: a barrier that not all threads reach";
    const auto is_garbage = [](int value) { return value == GARBAGE; };
    if (!std::all_of(counters.begin() + used, counters.end(), is_garbage)) {
      return "written beyond the counters";
    }
  }
  return nullptr;
}
}
