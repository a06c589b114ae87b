// Runs device code on the host: the threads of a block are coroutines that give way where they wait
// for others, in an order that the caller chooses. A barrier that is missing then shows as a wrong
// result in one order or another, and one that not all threads reach as `stuck`.
//
// Only what the sources under test use is here; warps have 32 lanes that all take part.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__

namespace emulation {

constexpr int LANES = 32;

struct Index {
  unsigned x = 0;
};

// Threads that wait for one another: a warp, or all warps of a block.
struct Group {
  int size = 0;
  int arrived = 0;
  uint64_t round = 0;
  int values[2][LANES] = {};
};

struct Thread {
  Index index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Group* waits_for = nullptr;
  uint64_t round = 0;
  bool finished = false;
};

inline Index block_index, block_size;
inline Thread* running = nullptr;
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Group> warps;
inline Group block;
inline const std::function<void()>* body = nullptr;

// Returns the round of which `values` are then complete.
inline uint64_t wait_for(Group& group) {
  Thread* self = running;
  const uint64_t round = group.round;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.round;
  }
  self->waits_for = &group;
  self->round = round;
  swapcontext(&self->context, &scheduler);
  return round;
}

inline Group& warp() { return warps[running->index.x / LANES]; }

inline const int* exchange(int value) {
  Group& group = warp();
  group.values[group.round % 2][running->index.x % LANES] = value;
  return group.values[wait_for(group) % 2];
}

inline void enter() {
  (*body)();
  running->finished = true;
  swapcontext(&running->context, &scheduler);
}

// Runs one block to its end; false where threads wait for some that do not come. schedule 0: always
// the lowest thread that need not wait, 1: the highest, others: all of them in turn, in an order
// drawn anew every time.
inline bool run_block(unsigned index, unsigned size, unsigned schedule,
                      const std::function<void()>& function) {
  constexpr size_t STACK = 64 << 10;
  block_index.x = index;
  block_size.x = size;
  body = &function;
  block = Group{.size = static_cast<int>(size)};
  warps.assign(size / LANES, Group{.size = LANES});
  threads = std::vector<Thread>(size);
  std::vector<Thread*> order;
  for (unsigned n = 0; n < size; ++n) {
    Thread& thread = threads[n];
    thread.index.x = n;
    thread.stack = std::make_unique<char[]>(STACK);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    order.push_back(&thread);
  }
  if (schedule == 1) std::reverse(order.begin(), order.end());
  const bool in_turn = schedule > 1;
  std::mt19937 random(schedule);
  for (bool moved = true; moved;) {
    moved = false;
    if (in_turn) std::shuffle(order.begin(), order.end(), random);
    for (Thread* thread : order) {
      if (thread->finished) continue;
      if (thread->waits_for && thread->waits_for->round == thread->round) continue;
      thread->waits_for = nullptr;
      moved = true;
      running = thread;
      swapcontext(&scheduler, &thread->context);
      if (!in_turn) break;
    }
  }
  return std::all_of(order.begin(), order.end(), [](Thread* thread) { return thread->finished; });
}

}  // namespace emulation

#define threadIdx (emulation::running->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::wait_for(emulation::block); }
inline void __syncwarp() { emulation::wait_for(emulation::warp()); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const int* votes = emulation::exchange(vote);
  unsigned bits = 0;
  for (int lane = 0; lane < emulation::LANES; ++lane) bits |= unsigned(votes[lane]) << lane;
  return bits;
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int lane = threadIdx.x % emulation::LANES;
  const int* values = emulation::exchange(value);
  return values[lane >= distance ? lane - distance : lane];
}
