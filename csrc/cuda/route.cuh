// Computes the routing arrays (Routing in types.py) in one launch of S + 2 blocks. Block s < S
// gives every pair of slot s its sorted position. Block S fills offsets and tiles, block S + 1
// chunks.
//
// Blocks do not communicate: each one counts all pairs itself. That costs less than a second
// launch, and needs no memory between launches. Atomics add integers only, so their order does not
// change the result.
//
// This file uses no header of torch, so that the tests can compile it alone. They execute its PTX
// on a CPU (tests/kernels/test_executed_route.py).
#pragma once

#include <cstdint>

namespace moelora {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
// Expert ids that a thread loads before it uses the first one: they come from the L2 cache, and the
// loads overlap.
constexpr int BATCH = 4;

// The sizes are those of RoutingSizes in routing.h. Strides are those of the expert ids [T, S], in
// elements.
struct RouteArguments {
  int64_t T;
  int64_t S;
  int64_t K;  // slots of a sibling
  int E;
  int N;
  int64_t P;
  int64_t stride_token;
  int64_t stride_slot;
  int64_t tile;
  int64_t chunk;
  int64_t num_tiles;
  int64_t num_chunks;
  int32_t* order;
  int32_t* offsets;
  int32_t* tiles;
  int32_t* chunks;
};

// Returns how many ints a block counts with: the pairs of every expert [2, N + 1], the pairs of one
// slot by warp [warps, E + 1], and one number per warp.
__host__ __device__ inline int64_t route_counters(int64_t N, int64_t E, int64_t warps) {
  return 2 * (N + 1) + warps * (E + 1) + warps;
}

struct RoutePlan {
  int warps;
  // Bytes of shared memory. 0 if there are too many experts for it: the counters are in global
  // memory then.
  int64_t shared;
};

// Chooses as many warps as there is work for and as shared memory allows.
inline RoutePlan route_plan(int64_t P, int64_t N, int64_t E) {
  // Every device grants this much by default: 32 warps up to E = 359, one warp up to E = 4094.
  constexpr int64_t SHARED_BYTES = 48 << 10;
  constexpr int64_t BYTES = sizeof(int);
  int max_warps = MAX_WARPS;
  while (max_warps > 1 && max_warps / 2 * int64_t{WARP} >= P) max_warps /= 2;
  for (int warps = max_warps; warps > 0; warps /= 2) {
    const int64_t bytes = route_counters(N, E, warps) * BYTES;
    if (bytes <= SHARED_BYTES) return {warps, bytes};
  }
  return {max_warps, 0};
}

// The expert ids of one slot, as labels: 0 to E - 1 for an expert, E for "not routed".
template <class Id>
struct Column {
  const Id* __restrict__ ids;
  int64_t stride;
  int E;

  // Loads the labels of the tokens first, first + step, ...; the label is -1 from token `end` on.
  __device__ void load(int64_t first, int64_t step, int64_t end, int (&labels)[BATCH]) const {
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const int64_t t = first + j * step;
      labels[j] = -1;
      if (t < end) {
        const int64_t id = ids[t * stride];
        labels[j] = id >= 0 && id < E ? static_cast<int>(id) : E;
      }
    }
  }
};

template <class Id>
__device__ Column<Id> column_of(const RouteArguments& a, const Id* ids, int64_t slot) {
  return {ids + slot * a.stride_slot, a.stride_token, a.E};
}

// Counts the labels that one thread reads. A run of equal labels costs one atomic addition:
// otherwise every thread would wait for the same counter if one expert gets all tokens.
struct Counter {
  int* routed;      // [E]
  int* not_routed;  // [1]
  int E;
  int label = -1;
  int run = 0;

  __device__ void flush() {
    if (run > 0) atomicAdd(label < E ? routed + label : not_routed, run);
  }

  __device__ void add(int next) {
    if (next < 0) return;
    if (next != label) {
      flush();
      label = next;
      run = 0;
    }
    ++run;
  }
};

// Counts the pairs of every expert, and of "not routed", into counts [2, N + 1]. Row 1 counts slots
// before `block_slot`, row 0 the others.
template <class Id>
__device__ void count_pairs(const RouteArguments& a, const Id* ids, int64_t block_slot,
                            int* counts) {
  const int thread = threadIdx.x, threads = blockDim.x;
  // Neighbouring threads read neighbouring slots, and a thread stays in its slot.
  const int across = a.S < threads ? static_cast<int>(a.S) : threads;
  const int along = threads / across;
  if (thread >= across * along) return;
  for (int64_t slot = thread % across; slot < a.S; slot += across) {
    const Column<Id> column = column_of(a, ids, slot);
    int* first = counts + (slot < block_slot ? a.N + 1 : 0);
    Counter counter{first + slot / a.K * a.E, first + a.N, a.E};
    for (int64_t t = thread / across; t < a.T; t += BATCH * along) {
      int labels[BATCH];
      column.load(t, along, a.T, labels);
#pragma unroll
      for (int j = 0; j < BATCH; ++j) counter.add(labels[j]);
    }
    counter.flush();
  }
}

// Replaces every value by the sum of the values before it, and returns the sum of all. `sums` has
// one int per warp. Every thread of the block calls this function, and may read all of `values`
// when it returns.
__device__ inline int exclusive_sum(int* values, int count, int* sums) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int share = (count + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * share;
  const int64_t end = begin + share < count ? begin + share : count;
  // Sum of this thread's share, then of the shares up to it within the warp.
  int thread_sum = 0;
  for (int64_t n = begin; n < end; ++n) thread_sum += values[n];
  int up_to = thread_sum;
  for (int distance = 1; distance < WARP; distance *= 2) {
    const int lower = __shfl_up_sync(ALL_LANES, up_to, distance);
    if (lane >= distance) up_to += lower;
  }
  if (lane == WARP - 1) sums[warp] = up_to;
  __syncthreads();
  // Add the sums of the warps before this one.
  int before = up_to - thread_sum, total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  for (int64_t n = begin; n < end; ++n) {
    const int value = values[n];
    values[n] = before;
    before += value;
  }
  __syncthreads();
  return total;
}

// The tokens that one warp sorts: a multiple of WARP tokens, except for the last warp.
struct Share {
  int64_t begin;
  int64_t end;

  __device__ explicit Share(int64_t T) {
    const int64_t warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    const int64_t tokens = ((T + WARP - 1) / WARP + warps - 1) / warps * WARP;
    begin = warp * tokens;
    end = begin + tokens < T ? begin + tokens : T;
  }
};

// Writes the pairs of slot `block_slot` to `order`. starts [N + 1]: first sorted position of every
// expert. earlier [N + 1]: its pairs in slots before block_slot. next [warps, E + 1]: zeros.
template <class Id>
__device__ void sort_slot(const RouteArguments& a, const Id* ids, int64_t block_slot,
                          const int* starts, const int* earlier, int* next) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int labels_of_slot = a.E + 1;
  const Column<Id> column = column_of(a, ids, block_slot);
  const Share share(a.T);
  int* next_of_warp = next + static_cast<int64_t>(warp) * labels_of_slot;
  int labels[BATCH];

  // Count the pairs of every label in the warp's share.
  Counter counter{next_of_warp, next_of_warp + a.E, a.E};
  for (int64_t t = share.begin + lane; t < share.end; t += BATCH * WARP) {
    column.load(t, WARP, share.end, labels);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) counter.add(labels[j]);
  }
  counter.flush();
  __syncthreads();

  // Replace the number of pairs of a warp by the position of its first pair.
  for (int label = threadIdx.x; label < labels_of_slot; label += blockDim.x) {
    const int64_t expert = label < a.E ? block_slot / a.K * a.E + label : a.N;
    int position = starts[expert] + earlier[expert];
    for (int w = 0; w < warps; ++w) {
      int* entry = next + static_cast<int64_t>(w) * labels_of_slot + label;
      const int count = *entry;
      *entry = position;
      position += count;
    }
  }
  __syncthreads();

  // Write the pairs, 32 tokens at a time. Pairs of one label keep the order of their tokens.
  int bits = 0;
  while (a.E >> bits) ++bits;
  const unsigned lower_lanes = (1u << lane) - 1;
  // The loop bounds are those of the warp, not of a lane, because all lanes vote.
  for (int64_t first = share.begin; first < share.end; first += BATCH * WARP) {
    column.load(first + lane, WARP, share.end, labels);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const bool valid = labels[j] >= 0;
      // The lanes with this label: a vote per bit is faster than __match_any_sync on many labels.
      unsigned peers = __ballot_sync(ALL_LANES, valid);
      for (int bit = 0; bit < bits; ++bit) {
        const bool set = labels[j] >> bit & 1;
        const unsigned vote = __ballot_sync(ALL_LANES, set);
        peers &= set ? vote : ~vote;
      }
      if (valid) {
        const int64_t pair = (first + j * WARP + lane) * a.S + block_slot;
        a.order[next_of_warp[labels[j]] + __popc(peers & lower_lanes)] = static_cast<int>(pair);
      }
      __syncwarp();
      if (valid && (peers & lower_lanes) == 0) next_of_warp[labels[j]] += __popc(peers);
      __syncwarp();
    }
  }
}

// Fills tiles [count, 2] of `size` sorted positions. starts [N + 1]: first position of every
// expert. first_tile [N + 1] is scratch space.
__device__ inline void fill_tiles(const RouteArguments& a, const int* starts, int* first_tile,
                                  int* sums, int64_t size, int64_t count, int32_t* tiles) {
  for (int e = threadIdx.x; e <= a.N; e += blockDim.x) {
    const int64_t end = e < a.N ? starts[e + 1] : a.P;
    first_tile[e] = static_cast<int>((end - starts[e] + size - 1) / size);
  }
  __syncthreads();
  const int used = exclusive_sum(first_tile, a.N + 1, sums);
  for (int64_t m = threadIdx.x; m < count; m += blockDim.x) {
    int expert = a.N;
    int64_t position = a.P;
    if (m < used) {
      // Search the last expert whose first tile is not beyond m. Experts without tiles share their
      // first tile with the next expert, so the last one is the expert that owns tile m.
      int low = 0, high = a.N;
      while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (first_tile[middle] <= m) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      expert = low;
      position = starts[expert] + (m - first_tile[expert]) * size;
    }
    tiles[2 * m] = expert;
    tiles[2 * m + 1] = static_cast<int>(position);
  }
}

// Does the work of one block. `counters` [route_counters] belong to this block, with any content.
template <class Id>
__device__ void route_block(const RouteArguments& a, const Id* ids, int* counters) {
  const int warps = blockDim.x / WARP;
  const int64_t experts = a.N + 1;
  const int64_t block_slot = blockIdx.x;
  int* counts = counters;
  int* earlier = counts + experts;
  int* next = earlier + experts;
  int* sums = next + static_cast<int64_t>(warps) * (a.E + 1);

  for (int64_t n = threadIdx.x; n < sums - counters; n += blockDim.x) counters[n] = 0;
  __syncthreads();
  if (a.S > 0) count_pairs(a, ids, block_slot, counts);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) counts[e] += earlier[e];
  __syncthreads();
  exclusive_sum(counts, static_cast<int>(experts), sums);

  // counts[e] is the first position of expert e from here on.
  if (block_slot < a.S) {
    sort_slot(a, ids, block_slot, counts, earlier, next);
  } else if (block_slot == a.S) {
    for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) a.offsets[e] = counts[e];
    fill_tiles(a, counts, earlier, sums, a.tile, a.num_tiles, a.tiles);
  } else {
    fill_tiles(a, counts, earlier, sums, a.chunk, a.num_chunks, a.chunks);
  }
}

// SHARED: the counters are in shared memory; otherwise in `scratch` [blocks, route_counters].
template <class Id, bool SHARED>
__global__ __launch_bounds__(MAX_WARPS* WARP) void route_kernel(RouteArguments arguments,
                                                                const Id* ids, int* scratch) {
  extern __shared__ int shared[];
  if constexpr (SHARED) {
    route_block(arguments, ids, shared);
  } else {
    const int64_t counters = route_counters(arguments.N, arguments.E, blockDim.x / WARP);
    route_block(arguments, ids, scratch + blockIdx.x * counters);
  }
}

}  // namespace moelora
