// What `ffn_inner` and its backward share. ffn_inner.cpp and ffn_inner_backward.cpp are the only
// files that include this header. In an anonymous namespace, the compiler inlines functions that
// are called once.
//
// F is cut into strips of columns, the tokens into blocks, and the pairs of a block into chunks of
// one expert. A step works on one chunk and one strip, in the cache. Threads split ranges of
// strips, so the columns of a range belong to one thread. It takes one block after the other, and
// in a block one strip after the other, because neighbours in a row of [T, F] share a page of
// memory. A sum over F is stored for each range, and the ranges are added in their order: the
// result does not depend on the number of threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "activation.h"
#include "dropout.h"
#include "ffn_blocks.h"
#include "vectors.h"

namespace moelora {
namespace {

// `panel` with STRIP columns and rows of STRIP units on the right.
template <int BYTES, class Unit, class C>
MOELORA_INLINE void strip_panel(int64_t rows, const Factors<Unit>& left, const Unit* right,
                                int64_t steps, C* out) {
  constexpr int VECTORS = BYTES == 64 ? 4 : 2;
  constexpr int64_t COLUMNS = VECTORS * Vector<C, BYTES>::LANES;
  static_assert(STRIP % COLUMNS == 0);
  for (int64_t column = 0; column < STRIP; column += COLUMNS) {
    panel_rows<BYTES, VECTORS>(rows, left, right + column, STRIP, steps, out + column, STRIP);
  }
}

// Returns scratch space that is not initialised.
template <class C>
std::unique_ptr<C[]> uninitialised(int64_t size) {
  return std::make_unique_for_overwrite<C[]>(size);
}

// The arguments of both ops, checked and in one dtype.
struct InnerTensors {
  Tensor gate_out, up_out;  // [T, F], dense rows
  Tensor u_gate, u_up;      // [P, width]
  Tensor gate_b, up_b;      // [F, R]
  Tensor down_a;            // [R, F]
  Tensor weights;           // [T, K]
  ScalarType dtype;
  int64_t T, F, K, R;
  int64_t width;  // the largest rank

  InnerTensors(const Tensor& gate, const Tensor& up, const Tensor& rank_gate, const Tensor& rank_up,
               const Tensor& b_gate, const Tensor& b_up, const Tensor& a_down,
               const Tensor& gate_weights, const Blocks& blocks)
      : weights(gate_weights), dtype(gate.scalar_type()), R(blocks.total) {
    check_floating(gate, "gate_out");
    const auto [tokens, features] = shape<2>(gate, "gate_out");
    const auto [weight_rows, slots] = shape<2>(weights, "weights");
    T = tokens;
    F = features;
    K = slots;
    width = *std::max_element(blocks.ranks.begin(), blocks.ranks.end());
    check_size(weight_rows, T, "weights, tokens");
    gate_out = dense_rows(gate, dtype);
    up_out = dense_matrix(up, T, F, "up_out");
    u_gate = matrix(rank_gate, T * K, width, "u_gate");
    u_up = matrix(rank_up, T * K, width, "u_up");
    gate_b = matrix(b_gate, F, R, "gate_b");
    up_b = matrix(b_up, F, R, "up_b");
    down_a = matrix(a_down, R, F, "down_a");
  }

  // Returns a matrix of a size in the dtype of gate_out: contiguous, or with dense rows.
  Tensor matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) const {
    return row_major(dense_matrix(tensor, rows, columns, name));
  }

  Tensor dense_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) const {
    const auto [num_rows, num_columns] = shape<2>(tensor, name);
    check_size(num_rows, rows, name);
    check_size(num_columns, columns, name);
    return dense_rows(tensor, dtype);
  }
};

// The data that both ops read, for a storage dtype S and its compute dtype C.
template <class S, class C>
struct Inner {
  const InnerTensors& tensors;
  const Routing& routing;
  const TokenBlocks& token_blocks;
  const Blocks& blocks;
  const PairWeights<C>& weights;
  const Mask& mask;
  Activation activation;
  // The ranks of each expert begin at a multiple of PANEL.
  std::vector<int64_t> begin;
  int64_t ranks = 0;  // of all experts, with the padding

  Inner(const InnerTensors& inner_tensors, const Routing& pair_routing,
        const TokenBlocks& blocks_of_tokens, const Blocks& rank_blocks,
        const PairWeights<C>& pair_weights, const Mask& dropout_mask, Activation act)
      : tensors(inner_tensors),
        routing(pair_routing),
        token_blocks(blocks_of_tokens),
        blocks(rank_blocks),
        weights(pair_weights),
        mask(dropout_mask),
        activation(act) {
    for (int64_t rank : blocks.ranks) {
      begin.push_back(ranks);
      ranks += padded(rank);
    }
  }

  bool has_pairs(int64_t e) const { return routing.begin(e) < routing.end(e); }
  int64_t columns(int64_t strip) const { return std::min(STRIP, tensors.F - strip * STRIP); }
  MOELORA_INLINE int64_t pair(int64_t index) const {
    return routing.pair(token_blocks.position(index));
  }

  // Returns the columns of a strip, of row t of a matrix [T, F]. If the strip is not full, they are
  // copied to `copy` [STRIP], with zeros at the end.
  MOELORA_INLINE const S* row(const Tensor& matrix, int64_t t, int64_t strip, S* copy) const {
    const S* data = matrix.const_data_ptr<S>() + t * matrix.stride(0) + strip * STRIP;
    const int64_t count = columns(strip);
    if (count == STRIP) return data;
    std::copy_n(data, count, copy);
    std::fill(copy + count, copy + STRIP, S(0.0f));
    return copy;
  }

  // How the values of a step enter a product: bfloat16 in pairs, else as they are.
  template <class P>
  using Value = std::conditional_t<P::bf16_pairs, S, C>;

  template <class P>
  static MOELORA_INLINE const typename P::Unit* units_of(const Value<P>* values) {
    return reinterpret_cast<const typename P::Unit*>(values);
  }

  // Packs rows that are summed over: rows [count, columns] become packed [units, width].
  template <class P>
  MOELORA_INLINE void pack_rows(const S* rows, int64_t stride, int64_t count, int64_t columns,
                                int64_t packed_width, typename P::Unit* packed) const {
    for (int64_t n = 0; n < count; n += P::PER_UNIT) {
      typename P::Unit* unit_row = packed + n / P::PER_UNIT * packed_width;
      const S* row = rows + n * stride;
      P::interleave(row, n + 1 < count ? row + stride : nullptr, columns, unit_row);
      std::fill(unit_row + columns, unit_row + packed_width, 0);
    }
  }

  // Packs PANEL rows of COUNT numbers to the rows of a block [PANEL, PANEL].
  template <class P, int64_t COUNT>
  MOELORA_INLINE void load_block(const S* rows, int64_t stride, typename P::Unit* block) const {
    for (int64_t k = 0; k < PANEL; ++k) P::pack_row(rows + k * stride, COUNT, block + k * PANEL);
  }

  // Packs rows whose columns are summed over: rows [count, columns] become packed [units, width].
  template <class P, int BYTES>
  MOELORA_INLINE void pack_columns(const S* rows, int64_t stride, int64_t count, int64_t columns,
                                   int64_t packed_width, typename P::Unit* packed) const {
    using Unit = typename P::Unit;
    const int64_t units = P::units(columns);
    for (int64_t n = 0; n < units; ++n) {
      std::fill(packed + n * packed_width + count, packed + (n + 1) * packed_width, 0);
    }
    // PANEL rows and PANEL units at a time.
    alignas(64) Unit block[PANEL * PANEL];
    for (int64_t first = 0; first < count; first += PANEL) {
      const int64_t height = std::min(PANEL, count - first);
      for (int64_t n = 0; n < units; n += PANEL) {
        const int64_t column = n * P::PER_UNIT;
        const int64_t block_columns = std::min(PANEL * P::PER_UNIT, columns - column);
        const S* corner = rows + first * stride + column;
        // A size that the compiler knows, for a block that is full or has half of its columns.
        if (height == PANEL && block_columns == PANEL * P::PER_UNIT) {
          load_block<P, PANEL * P::PER_UNIT>(corner, stride, block);
        } else if (height == PANEL && block_columns == PANEL) {
          load_block<P, PANEL>(corner, stride, block);
        } else {
          for (int64_t k = 0; k < height; ++k) {
            P::pack_row(corner + k * stride, block_columns, block + k * PANEL);
          }
        }
        transpose_block<BYTES>(block);
        for (int64_t m = 0; m < P::units(block_columns); ++m) {
          Unit* unit_row = packed + (n + m) * packed_width + first;
          if (height == PANEL) {
            std::copy_n(block + m * PANEL, PANEL, unit_row);
          } else {
            std::copy_n(block + m * PANEL, height, unit_row);
          }
        }
      }
    }
  }

  // Packs B [F, R] of gate or up for u Bt: packed [units of the ranks, STRIP] of each expert.
  template <class P, int BYTES>
  MOELORA_INLINE void pack_expand(const Tensor& b, int64_t strip, typename P::Unit* packed) const {
    const S* data = b.const_data_ptr<S>() + strip * STRIP * tensors.R;
    for (int64_t e = 0; e < blocks.num_experts(); ++e) {
      if (!has_pairs(e)) continue;
      pack_columns<P, BYTES>(data + blocks.begin[e], tensors.R, columns(strip), blocks.ranks[e],
                             STRIP, packed + begin[e] * STRIP);
    }
  }

  // Fills z [size of the chunk, STRIP] with the product of the chunk's rows of u [P, width] and
  // packed [units of the ranks, STRIP] of its expert. Scratch space: u_units [CHUNK, width], and
  // partial [CHUNK, STRIP].
  template <class Level, class Unit>
  MOELORA_INLINE void expand(const Chunk& chunk, const Tensor& u, const Unit* packed, C* z,
                             Unit* u_units, C* partial) const {
    using P = Operand<S, Level::bf16_pairs>;
    const int64_t width = tensors.width, rank = blocks.ranks[chunk.expert];
    const int64_t units = P::units(rank), size = panel_height(chunk.size()) * STRIP;
    const S* u_data = u.const_data_ptr<S>();
    for (int64_t n = 0; n < chunk.size(); ++n) {
      P::pack_row(u_data + token_blocks.position(chunk.begin + n) * width, rank,
                  u_units + n * width);
    }
    std::fill_n(z, size, C{0});
    for (int64_t first = 0; first < units; first += SEGMENT) {
      C* sums = first == 0 ? z : partial;
      if (first > 0) std::fill_n(partial, size, C{0});
      strip_panel<Level{}()>(panel_height(chunk.size()), Factors<Unit>{u_units + first, width, 1},
                             packed + begin[chunk.expert] * STRIP + first * STRIP,
                             std::min(SEGMENT, units - first), sums);
      if (first == 0) continue;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) z[j] += partial[j];
    }
  }

  // sums [num_routed, padded(width)] of this range: the rows of the chunk += values [CHUNK, STRIP]
  // times packed [units of the strip, padded rank]; without the old sums in the first strip.
  // product [CHUNK, padded(width)] is scratch space.
  template <class Level, class V, class Unit>
  MOELORA_INLINE void shrink(const Chunk& chunk, int64_t strip, bool is_first, const V* values,
                             const Unit* packed, C* product, C* sums) const {
    using P = Operand<S, Level::bf16_pairs>;
    const int64_t w = padded(blocks.ranks[chunk.expert]), row = padded(tensors.width);
    const int64_t units = P::units(columns(strip)), rows = panel_height(chunk.size());
    const Unit* value_units = units_of<P>(values);
    for (int64_t first = 0; first < units; first += SEGMENT) {
      std::fill_n(product, rows * w, C{0});
      panel<Level{}()>(rows, w, Factors<Unit>{value_units + first, STRIP / P::PER_UNIT, 1},
                       packed + begin[chunk.expert] * STRIP + first * w, w,
                       std::min(SEGMENT, units - first), product, w);
      for (int64_t n = 0; n < chunk.size(); ++n) {
        C* sum = sums + (chunk.begin + n) * row;
        const bool has_sum = !is_first || first > 0;
        for (int64_t j = 0; j < w; j += PANEL) {
#pragma omp simd
          for (int64_t k = j; k < j + PANEL; ++k) {
            sum[k] = (has_sum ? sum[k] : C{0}) + product[n * w + k];
          }
        }
      }
    }
  }

  // Fetches the columns of a strip, for the tokens of a block.
  MOELORA_INLINE void prefetch(const Tensor& matrix, int64_t block, int64_t strip) const {
    const S* data = matrix.const_data_ptr<S>() + strip * STRIP;
    const int64_t stride = matrix.stride(0), count = columns(strip);
    for (int64_t t = token_blocks.first_token(block); t < token_blocks.end_token(block); ++t) {
      for (int64_t j = 0; j < count; j += 64 / int64_t(sizeof(S))) {
        __builtin_prefetch(data + t * stride + j);
      }
    }
  }

  // Writes the sums [tokens of the block, STRIP] to their strip of `out` [T, F].
  template <class Level>
  MOELORA_INLINE void write_block(const C* sums, int64_t block, int64_t strip,
                                  const Tensor& out) const {
    constexpr int BYTES = Level{}();
    constexpr int64_t LANES = Vector<C, BYTES>::LANES;
    const int64_t first = token_blocks.first_token(block), count = columns(strip);
    S* data = out.mutable_data_ptr<S>();
    for (int64_t t = first; t < token_blocks.end_token(block); ++t) {
      S* row = data + t * tensors.F + strip * STRIP;
      const C* sum = sums + (t - first) * STRIP;
      int64_t j = 0;
      if constexpr (Operand<S, Level::bf16_pairs>::bf16_pairs) {
        for (; j + LANES <= count; j += LANES) {
          store_rounded<S, C, BYTES>(row + j, load<C, BYTES>(sum + j));
        }
      }
#pragma omp simd
      for (int64_t k = j; k < count; ++k) row[k] = narrow<S>(sum[k]);
    }
  }

  // Calls function(chunk, position, row) for every routed pair, on several threads. `row`
  // [padded(width)] is the sum of its rows of partial [ranges, num_routed, padded(width)].
  template <class Function>
  void add_ranges(const Tensor& partial, int64_t ranges, const Function& function) const {
    const int64_t w = padded(tensors.width), rows = token_blocks.num_routed();
    const C* data = partial.const_data_ptr<C>();
    const std::vector<Chunk>& chunks = token_blocks.chunks();
    torch::stable::parallel_for(
        0, int64_t(chunks.size()), grain(CHUNK * ranges * w), [&](int64_t begin, int64_t end) {
          std::vector<C> sum(w);
          for (int64_t c = begin; c < end; ++c) {
            for (int64_t n = chunks[c].begin; n < chunks[c].end; ++n) {
              std::copy_n(data + n * w, w, sum.data());
              for (int64_t range = 1; range < ranges; ++range) {
                const C* term = data + (range * rows + n) * w;
#pragma omp simd
                for (int64_t j = 0; j < w; ++j) sum[j] += term[j];
              }
              function(chunks[c].expert, token_blocks.position(n), sum.data());
            }
          }
        });
  }
};

}  // namespace
}  // namespace moelora
