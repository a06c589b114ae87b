// How `ffn_inner` and its backward cut F into strips and ranges, and the pairs into blocks of
// tokens and chunks. ffn_inner.h describes what threads and steps do with them.
#pragma once

#include <vector>

#include "grouped.h"

namespace moelora {
namespace {

// Columns of a strip, and pairs of a chunk: a buffer of a step has 16 KiB in float32.
constexpr int64_t STRIP = 128;
constexpr int64_t CHUNK = 32;
// Units of a partial sum: a longer sum would lose bits.
constexpr int64_t SEGMENT = 32;
// Ranges of strips. More ranges are more work for threads, and more memory for the sums over F.
constexpr int64_t MAX_RANGES = 16;

// Returns `count`, rounded up to a multiple of 4: the rows of a panel.
constexpr int64_t panel_height(int64_t count) { return (count + 3) / 4 * 4; }

// The pairs [begin, end) of `TokenBlocks::positions`. They have one expert.
struct Chunk {
  int64_t expert;
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// The routed pairs, sorted by block of tokens, then by expert.
class TokenBlocks {
 public:
  TokenBlocks(const Routing& routing, int64_t tokens, int64_t slots) : tokens_(tokens) {
    // An expert should have CHUNK pairs of a block, if the routing is uniform.
    const int64_t E = routing.num_experts();
    const int64_t full = CHUNK * E / std::max<int64_t>(slots, 1);
    size_ = std::clamp<int64_t>((full + 63) / 64 * 64, 128, 512);
    const int64_t blocks = (tokens + size_ - 1) / size_;

    // Sort by counting.
    const auto for_positions = [&](const auto& function) {
      for (int64_t e = 0; e < E; ++e) {
        for (int64_t position = routing.begin(e); position < routing.end(e); ++position) {
          const int64_t token = routing.pair(position) / slots;
          function(token / size_ * E + e, position);
        }
      }
    };
    std::vector<int32_t> next(blocks * E + 1);
    for_positions([&](int64_t key, int64_t) { ++next[key + 1]; });
    for (int64_t key = 0; key < blocks * E; ++key) next[key + 1] += next[key];
    first_chunk_.push_back(0);
    for (int64_t key = 0; key < blocks * E; ++key) {
      for (int64_t begin = next[key]; begin < next[key + 1]; begin += CHUNK) {
        chunks_.push_back({key % E, begin, std::min<int64_t>(begin + CHUNK, next[key + 1])});
      }
      if (key % E == E - 1) first_chunk_.push_back(int64_t(chunks_.size()));
    }
    positions_.resize(routing.num_routed());
    for_positions(
        [&](int64_t key, int64_t position) { positions_[next[key]++] = int32_t(position); });
  }

  // Returns how many blocks there are, and how many tokens a block has at most.
  int64_t count() const { return int64_t(first_chunk_.size()) - 1; }
  int64_t size() const { return size_; }
  int64_t first_token(int64_t block) const { return block * size_; }
  int64_t end_token(int64_t block) const { return std::min(tokens_, (block + 1) * size_); }

  const std::vector<Chunk>& chunks() const { return chunks_; }
  int64_t first_chunk(int64_t block) const { return first_chunk_[block]; }
  // Returns the sorted position of a pair.
  MOELORA_INLINE int64_t position(int64_t index) const { return positions_[index]; }
  int64_t num_routed() const { return int64_t(positions_.size()); }

 private:
  int64_t tokens_;
  int64_t size_;
  std::vector<int32_t> positions_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> first_chunk_;  // [blocks + 1]
};

// The ranges of strips that threads split.
struct Ranges {
  int64_t strips;
  int64_t count;

  // The sums of all ranges, [count, P, width], have at most as many numbers as a matrix [P, F].
  Ranges(int64_t F, int64_t width)
      : strips((F + STRIP - 1) / STRIP),
        count(std::clamp<int64_t>(std::min(strips, F / width), 1, MAX_RANGES)) {}
  int64_t first_strip(int64_t range) const { return range * strips / count; }
  // Returns how many strips a range has at most.
  int64_t size() const { return (strips + count - 1) / count; }
};

}  // namespace
}  // namespace moelora
