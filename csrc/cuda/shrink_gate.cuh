// h = x At, logits = x Wrt + br, the top-k gate, and u = scale * gate (.) h, in one launch, on
// sm_90a and in bfloat16. This is `shrink_gate` for one linear with a router.
//
// A block computes the rows of 64 tokens. The blocks of a cluster read the same tiles of A and Wr:
// each copies a share of them, which reaches all blocks (multicast). So A is read once for 256
// tokens.
//
// A stage of shared memory holds the tiles of one step of 64 features. Its barrier `full` counts
// bytes: a block waits for it before its products. Its barrier `empty` counts the warps of all
// blocks of the cluster whose products are done: a block waits for it before it copies again,
// because its copies reach all blocks.
//
// This file uses no header of torch, so that the tests can compile it alone. They execute its PTX
// on a CPU (tests/kernels/test_executed_shrink.py).
#pragma once

#include <cuda_bf16.h>

#include "hopper.cuh"

namespace moelora {

constexpr int SHRINK_TOKENS = 64;
constexpr int SHRINK_STEP = 64;
constexpr int SHRINK_CLUSTER = 4;
constexpr int SHRINK_THREADS = 128;
constexpr int SHRINK_WARPS = SHRINK_THREADS / 32;
constexpr int SHRINK_EXPERTS = 16;

struct ShrinkArguments {
  int64_t T;
  int steps;  // I / SHRINK_STEP, rounded up
  int E;
  int K;
  int renormalize;
  float temperature;
  float scaling[SHRINK_EXPERTS];
  int end[SHRINK_EXPERTS];  // of the columns of every expert
  const float* bias;        // [E], or null
  __nv_bfloat16* h;         // [T, R]
  __nv_bfloat16* u;         // [T, R]
  float* weights;           // [T, K]
  int* experts;             // [T, K], or null if K = E
  float* logits;            // [T, E]
};

// The shared memory of a block. R: columns of rank space. E8: experts, rounded up to 8 or 16.
template <int R, int E8>
struct ShrinkMemory {
  static constexpr int X = SHRINK_TOKENS * TILE_ROW, A = R * TILE_ROW, ROUTER = E8 * TILE_ROW;
  static constexpr int STAGE = X + A + ROUTER;
  static constexpr int STAGES = 6;
  static constexpr int BARRIERS = STAGES * STAGE;
  static constexpr int GATES = BARRIERS + 2 * STAGES * 8;
  static constexpr int COLUMN_EXPERTS = GATES + SHRINK_TOKENS * E8 * 4;
  static constexpr int BYTES = COLUMN_EXPERTS + R * 4;
};

// The gate of one token: stores its logits, weights and experts, and replaces its logits by
// scale * gate. Like `topk_gate` of kernels/common/gates.py, which explains the rules.
template <int E8>
__device__ void gate_token(const ShrinkArguments& a, int64_t token, float* row) {
  float scaled[E8];
  int slot[E8];
#pragma unroll
  for (int e = 0; e < E8; ++e) {
    slot[e] = a.K == a.E && e < a.E ? e : a.K;
    scaled[e] = -INFINITY;
    if (e < a.E) {
      a.logits[token * a.E + e] = row[e];
      scaled[e] = __fdiv_rn(row[e], a.temperature);
    }
  }
  for (int k = 0; k < (a.K == a.E ? 0 : a.K); ++k) {
    int best = -1;
    float best_key = 0.0f;
#pragma unroll
    for (int e = 0; e < E8; ++e) {
      // A NaN counts as the largest.
      const float key = scaled[e] == scaled[e] ? scaled[e] : INFINITY;
      const bool is_free = e < a.E && slot[e] == a.K;
      if (is_free && (best < 0 || key > best_key)) {
        best = e;
        best_key = key;
      }
    }
#pragma unroll
    for (int e = 0; e < E8; ++e) slot[e] = e == best ? k : slot[e];
  }

  // Softmax: over the selected experts if `renormalize`, else over all.
  float largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int e = 0; e < E8; ++e) {
    const bool counts = e < a.E && (!a.renormalize || slot[e] < a.K);
    if (counts) largest = fmaxf(largest, scaled[e]);
  }
#pragma unroll
  for (int e = 0; e < E8; ++e) {
    const bool counts = e < a.E && (!a.renormalize || slot[e] < a.K);
    scaled[e] = counts ? __expf(scaled[e] - largest) : 0.0f;
    sum += scaled[e];
  }
#pragma unroll
  for (int e = 0; e < E8; ++e) {
    const bool selected = slot[e] < a.K;
    const float gate = selected ? scaled[e] / sum : 0.0f;
    if (selected) {
      a.weights[token * a.K + slot[e]] = gate;
      if (a.experts != nullptr) a.experts[token * a.K + slot[e]] = e;
    }
    row[e] = e < a.E ? gate * a.scaling[e] : 0.0f;
  }
}

// Returns gate * h, and 0 if the gate is 0 and h is NaN or infinite.
__device__ __forceinline__ float apply_gate(float gate, float h) {
  const float product = gate * h;
  return (gate == 0.0f) & !(fabsf(h) < INFINITY) ? 0.0f : product;
}

// __CUDA_ARCH_FEAT_SM90_ALL is defined for sm_90a. Other architectures have no code of the kernel.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOELORA_CLUSTER __cluster_dims__(SHRINK_CLUSTER, 1, 1)
#else
#define MOELORA_CLUSTER
#endif

// Grid: one block for each 64 tokens, rounded up to whole clusters. x_map has boxes of 64 rows of x
// [T, I], a_map of R / 4 rows of A [R, I], router_map of E8 rows of Wr [E, I], each of 64 columns.
template <int R, int E8>
__global__ void MOELORA_CLUSTER __launch_bounds__(SHRINK_THREADS)
    shrink_gate_kernel(const __grid_constant__ CUtensorMap x_map,
                       const __grid_constant__ CUtensorMap a_map,
                       const __grid_constant__ CUtensorMap router_map,
                       const __grid_constant__ ShrinkArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Memory = ShrinkMemory<R, E8>;
  constexpr int STAGES = Memory::STAGES;
  // A stage is filled again two steps after its products were issued: they end, and the arrivals of
  // the other blocks come, while the next two steps are computed.
  constexpr int LAG = 2;
  constexpr int SHARE = R / SHRINK_CLUSTER;
  constexpr uint16_t ALL_RANKS = (1 << SHRINK_CLUSTER) - 1;
  extern __shared__ __align__(1024) unsigned char memory[];

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_token = blockIdx.x * SHRINK_TOKENS;
  const int steps = arguments.steps;
  const uint32_t base = shared_address(memory), rank = cluster_rank();
  const uint32_t full = base + Memory::BARRIERS, empty = full + STAGES * 8;

  // The expert of every column of rank space.
  int* const column_experts = reinterpret_cast<int*>(memory + Memory::COLUMN_EXPERTS);
  if (thread < R) {
    int expert = 0;
#pragma unroll
    for (int e = 0; e < E8 - 1; ++e) expert += e < arguments.E && thread >= arguments.end[e];
    column_experts[thread] = expert;
  }
  if (thread == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + stage * 8, 1);
      init_barrier(empty + stage * 8, SHRINK_CLUSTER * SHRINK_WARPS);
    }
    fence_barriers();
  }
  synchronise_cluster();

  // Copies the tiles of a step. One thread calls it.
  const auto fill = [&](int step) {
    const int stage = step % STAGES, column = step * SHRINK_STEP;
    const uint32_t x = base + stage * Memory::STAGE, a = x + Memory::X, router = a + Memory::A;
    const uint32_t barrier = full + stage * 8;
    expect_bytes(barrier, Memory::STAGE);
    copy_tile(x, x_map, column, first_token, barrier);
    const int row = static_cast<int>(rank) * SHARE;
    share_tile(a + row * TILE_ROW, a_map, column, row, barrier, ALL_RANKS);
    if (rank == 0) share_tile(router, router_map, column, 0, barrier, ALL_RANKS);
  };
  if (thread == 0) {
    for (int step = 0; step < STAGES && step < steps; ++step) fill(step);
  }
  __syncwarp();

  float h[R / 2] = {}, logits[E8 / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % STAGES;
    wait_for(full + stage * 8, step / STAGES % 2);
    const uint32_t x = base + stage * Memory::STAGE;
    const uint64_t left = describe_tile(x), right = describe_tile(x + Memory::X);
    const uint64_t router = describe_tile(x + Memory::X + Memory::A);
    begin_products();
#pragma unroll
    for (int k = 0; k < SHRINK_STEP / 16; ++k) {
      Product<R>::add(h, left + k * NEXT_COLUMNS, right + k * NEXT_COLUMNS);
      Product<E8>::add(logits, left + k * NEXT_COLUMNS, router + k * NEXT_COLUMNS);
    }
    commit_products();

    // The products of the step before have ended: tell all blocks, lane r the block of rank r.
    wait_for_products<1>();
    const int ended = step - 1;
    if (ended >= 0 && ended + STAGES < steps && lane < SHRINK_CLUSTER) {
      arrive_at(empty + ended % STAGES * 8, lane);
    }
    const int refilled = step - LAG;
    if (thread == 0 && refilled >= 0 && refilled + STAGES < steps) {
      wait_for(empty + refilled % STAGES * 8, refilled / STAGES % 2);
      fill(refilled + STAGES);
    }
    __syncwarp();
  }
  wait_for_products<0>();
  read_behind(h);
  read_behind(logits);
  // Other blocks copy to this one, and arrive at its barriers.
  synchronise_cluster();

  // Gates. A warp has the logits of 16 tokens, and exchanges them through shared memory.
  float* const gates = reinterpret_cast<float*>(memory + Memory::GATES);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < E8 / 2; ++i) {
    const int row = 16 * warp + g + i % 4 / 2 * 8, e = i / 4 * 8 + 2 * t + i % 2;
    const float bias = arguments.bias != nullptr && e < arguments.E ? arguments.bias[e] : 0.0f;
    gates[row * E8 + e] = logits[i] + bias;
  }
  __syncwarp();
  const int64_t token = first_token + 16 * warp + lane;
  if (lane < 16 && token < arguments.T) {
    gate_token<E8>(arguments, token, gates + (16 * warp + lane) * E8);
  }
  __syncwarp();

  // h and u. u follows from the rounded h, because backward has only the rounded h.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + g + 8 * half;
    const float* const gate = gates + row * E8;
    const int64_t offset = (int64_t{first_token} + row) * R + 2 * t;
    const bool in_bounds = first_token + row < arguments.T;
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
      const int2 experts = *reinterpret_cast<const int2*>(column_experts + 8 * j + 2 * t);
      const __nv_bfloat162 rounded =
          __floats2bfloat162_rn(h[4 * j + 2 * half], h[4 * j + 2 * half + 1]);
      const float2 values = __bfloat1622float2(rounded);
      const float u0 = apply_gate(gate[experts.x], values.x);
      const float u1 = apply_gate(gate[experts.y], values.y);
      if (in_bounds) {
        *reinterpret_cast<__nv_bfloat162*>(arguments.h + offset + 8 * j) = rounded;
        *reinterpret_cast<__nv_bfloat162*>(arguments.u + offset + 8 * j) =
            __floats2bfloat162_rn(u0, u1);
      }
    }
  }
#endif
}

}  // namespace moelora
