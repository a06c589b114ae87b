// The op `route` on a GPU: checks the arguments, allocates the arrays and launches the kernel of
// route.cuh.
#include "route.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device.h"
#include "routing.h"

namespace moelora {
namespace {

// Launches one block per slot and two more. The counters are in shared memory if they fit.
template <class Id>
void launch(const RouteArguments& arguments, const Tensor& experts) {
  const Device device(experts);
  const auto [warps, shared] = route_plan(arguments.P, arguments.N, arguments.E);
  const auto blocks = static_cast<unsigned>(arguments.S + 2);
  const Id* ids = experts.const_data_ptr<Id>();
  if (shared > 0) {
    route_kernel<Id, true>
        <<<blocks, warps * WARP, shared, device.stream()>>>(arguments, ids, nullptr);
  } else {
    const int64_t counters = route_counters(arguments.N, arguments.E, warps);
    const Tensor scratch = empty_on(experts, {blocks * counters}, ScalarType::Int);
    route_kernel<Id, false><<<blocks, warps * WARP, 0, device.stream()>>>(
        arguments, ids, scratch.mutable_data_ptr<int>());
  }
  check_launch("route");
}

// Returns order, offsets, tiles and chunks: see Routing in types.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor experts, int64_t num_experts,
                                                 int64_t siblings, int64_t tile, int64_t chunk) {
  const RoutingSizes sizes(experts, num_experts, siblings, tile, chunk);
  const auto [T, S, E, n, P, N] = sizes;
  const ScalarType dtype = experts.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                  "experts: expected int32 or int64, got ", dtype);
  const int64_t num_tiles = count_tiles(P, N, tile);
  const int64_t num_chunks = count_tiles(P, N, chunk);
  Tensor order = empty_on(experts, {P}, ScalarType::Int);
  Tensor offsets = empty_on(experts, {N + 1}, ScalarType::Int);
  Tensor tiles = empty_on(experts, {num_tiles, 2}, ScalarType::Int);
  Tensor chunks = empty_on(experts, {num_chunks, 2}, ScalarType::Int);
  const RouteArguments arguments{
      // Without pairs there is no slot, so no block sorts.
      .T = P > 0 ? T : 0,
      .S = P > 0 ? S : 0,
      .K = S / n,
      .E = static_cast<int>(E),
      .N = static_cast<int>(N),
      .P = P,
      .stride_token = experts.stride(0),
      .stride_slot = experts.stride(1),
      .tile = tile,
      .chunk = chunk,
      .num_tiles = num_tiles,
      .num_chunks = num_chunks,
      .order = order.mutable_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int32_t>(),
      .tiles = tiles.mutable_data_ptr<int32_t>(),
      .chunks = chunks.mutable_data_ptr<int32_t>(),
  };
  if (dtype == ScalarType::Int) {
    launch<int32_t>(arguments, experts);
  } else {
    launch<int64_t>(arguments, experts);
  }
  return {order, offsets, tiles, chunks};
}

}  // namespace

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CUDA, m) { m.impl("route", TORCH_BOX(&moelora::route)); }
