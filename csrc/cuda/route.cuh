// The routing arrays on the device, in one launch of S + 2 blocks that need nothing of each other:
// block s < S gives every pair of slot s its place, block S fills offsets and tiles, the last one
// chunks. Each block counts all pairs by itself, which costs less than a second launch and needs no
// memory of its own. Sums of integers only: the order of atomics does not show.
//
// Free of torch's headers, and of CUDA's but for its built-in functions, so that the tests can run
// it on the host (tests/kernels/emulation).
#pragma once

#include <cstdint>

namespace moelora {

constexpr int WARP = 32;
constexpr int MOST_WARPS = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
// Indices that a thread asks for before it looks at the first: they come from the L2 cache.
constexpr int BATCH = 4;

// See routing.h for the sizes; strides in elements.
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

// The ints that a block counts with: [2, N + 1] pairs of every expert, [warps, E + 1] pairs of one
// slot, and one number per warp.
__host__ __device__ inline int64_t route_counters(int64_t N, int64_t E, int64_t warps) {
  return 2 * (N + 1) + warps * (E + 1) + warps;
}

struct RoutePlan {
  int warps;
  // Bytes of shared memory; 0: there are too many experts, the counters are in global memory.
  int64_t shared;
};

// As many warps as there is work for, and as shared memory allows.
inline RoutePlan route_plan(int64_t P, int64_t N, int64_t E) {
  // What every device grants without being asked: 32 warps up to E = 350, one up to E = 4090.
  constexpr int64_t SHARED_BYTES = 48 << 10;
  constexpr int64_t BYTES = sizeof(int);
  int most = MOST_WARPS;
  while (most > 1 && most / 2 * int64_t{WARP} >= P) most /= 2;
  for (int warps = most; warps > 0; warps /= 2) {
    const int64_t bytes = route_counters(N, E, warps) * BYTES;
    if (bytes <= SHARED_BYTES) return {warps, bytes};
  }
  return {most, 0};
}

// The experts of one slot: 0 to E - 1, and E for "not routed".
template <class Id>
struct Column {
  const Id* __restrict__ ids;
  int64_t stride;
  int E;

  // The labels of BATCH tokens from `first`, `step` apart; -1 from `end` on.
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

// Counts labels that one thread sees; a run of equal ones costs one atomic addition, or every
// thread would queue for the same counter where one expert takes all.
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

// counts[0] gets the pairs of every expert, N + 1 of them with "not routed"; counts[1] only those
// of slots before `own`.
template <class Id>
__device__ void count_pairs(const RouteArguments& a, const Id* ids, int64_t own, int* counts) {
  const int thread = threadIdx.x, threads = blockDim.x;
  // Neighbours read neighbouring slots, and a thread stays in its slot.
  const int across = a.S < threads ? static_cast<int>(a.S) : threads;
  const int along = threads / across;
  if (thread >= across * along) return;
  for (int64_t slot = thread % across; slot < a.S; slot += across) {
    const Column<Id> column = column_of(a, ids, slot);
    int* first = counts + (slot < own ? a.N + 1 : 0);
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

// values[n] becomes the sum of the values before it; the sum of all is returned. `sums` [warps].
// Every thread of the block calls it, and may read all of `values` when it returns.
__device__ inline int exclusive_sum(int* values, int count, int* sums) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int share = (count + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * share;
  const int64_t end = begin + share < count ? begin + share : count;
  int own = 0;
  for (int64_t n = begin; n < end; ++n) own += values[n];
  int up_to = own;
  for (int distance = 1; distance < WARP; distance *= 2) {
    const int lower = __shfl_up_sync(ALL_LANES, up_to, distance);
    if (lane >= distance) up_to += lower;
  }
  if (lane == WARP - 1) sums[warp] = up_to;
  __syncthreads();
  int before = up_to - own, total = 0;
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

// The tokens that one warp places, a multiple of a warp of them but for the last.
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

// order of the pairs of slot `own`. starts [N + 1]: first place of every expert; earlier [N + 1]:
// its pairs in slots before; next [warps, E + 1], zeros.
template <class Id>
__device__ void place_slot(const RouteArguments& a, const Id* ids, int64_t own, const int* starts,
                           const int* earlier, int* next) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int labels_of_slot = a.E + 1;
  const Column<Id> column = column_of(a, ids, own);
  const Share share(a.T);
  int* next_of_warp = next + static_cast<int64_t>(warp) * labels_of_slot;
  int labels[BATCH];

  Counter counter{next_of_warp, next_of_warp + a.E, a.E};
  for (int64_t t = share.begin + lane; t < share.end; t += BATCH * WARP) {
    column.load(t, WARP, share.end, labels);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) counter.add(labels[j]);
  }
  counter.flush();
  __syncthreads();

  // From how many pairs a warp has to the place of its first.
  for (int label = threadIdx.x; label < labels_of_slot; label += blockDim.x) {
    const int64_t expert = label < a.E ? own / a.K * a.E + label : a.N;
    int place = starts[expert] + earlier[expert];
    for (int w = 0; w < warps; ++w) {
      int* of_warp = next + static_cast<int64_t>(w) * labels_of_slot + label;
      const int count = *of_warp;
      *of_warp = place;
      place += count;
    }
  }
  __syncthreads();

  int bits = 0;
  while (a.E >> bits) ++bits;
  const unsigned lower_lanes = (1u << lane) - 1;
  // Bounds are those of the warp, not of the lane: all of them vote.
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
        const int64_t pair = (first + j * WARP + lane) * a.S + own;
        a.order[next_of_warp[labels[j]] + __popc(peers & lower_lanes)] = static_cast<int>(pair);
      }
      __syncwarp();
      if (valid && (peers & lower_lanes) == 0) next_of_warp[labels[j]] += __popc(peers);
      __syncwarp();
    }
  }
}

// tiles [count, 2] of `size` places. starts [N + 1]; first_tile [N + 1] is written over.
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
    int64_t place = a.P;
    if (m < used) {
      // The last expert whose first tile is not beyond m: those without tiles come before it.
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
      place = starts[expert] + (m - first_tile[expert]) * size;
    }
    tiles[2 * m] = expert;
    tiles[2 * m + 1] = static_cast<int>(place);
  }
}

// All that a block does; `counters` [route_counters] are its own, with any content.
template <class Id>
__device__ void route_block(const RouteArguments& a, const Id* ids, int* counters) {
  const int warps = blockDim.x / WARP;
  const int64_t experts = a.N + 1;
  const int64_t own = blockIdx.x;
  int* counts = counters;
  int* others = counts + experts;
  int* next = others + experts;
  int* sums = next + static_cast<int64_t>(warps) * (a.E + 1);

  for (int64_t n = threadIdx.x; n < sums - counters; n += blockDim.x) counters[n] = 0;
  __syncthreads();
  if (a.S > 0) count_pairs(a, ids, own, counts);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) counts[e] += others[e];
  __syncthreads();
  exclusive_sum(counts, static_cast<int>(experts), sums);

  if (own < a.S) {
    place_slot(a, ids, own, counts, others, next);
  } else if (own == a.S) {
    for (int64_t e = threadIdx.x; e < experts; e += blockDim.x) a.offsets[e] = counts[e];
    fill_tiles(a, counts, others, sums, a.tile, a.num_tiles, a.tiles);
  } else {
    fill_tiles(a, counts, others, sums, a.chunk, a.num_chunks, a.chunks);
  }
}

#if defined(__CUDACC__)
template <class Id, bool SHARED>
__global__ __launch_bounds__(MOST_WARPS* WARP) void route_kernel(RouteArguments arguments,
                                                                 const Id* ids, int* scratch) {
  extern __shared__ int shared[];
  if constexpr (SHARED) {
    route_block(arguments, ids, shared);
  } else {
    const int64_t each = route_counters(arguments.N, arguments.E, blockDim.x / WARP);
    route_block(arguments, ids, scratch + blockIdx.x * each);
  }
}
#endif

}  // namespace moelora
