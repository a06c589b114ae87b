// The routing arrays for the grouped ops on a CPU: which pairs each expert works on. The structure
// Routing in moelora_kernels/types.py describes the arrays.
#pragma once

#include <vector>

#include "gate.h"
#include "panel.h"

namespace moelora {

// A matrix, and the row of it that belongs to each sorted position.
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
  const int32_t* row_of_position;

  MOELORA_INLINE const S* row(int64_t index) const { return data + index * stride; }
};

// `order` [P] and `offsets` [N + 1]. The positions of expert e are [begin(e), end(e)); those of the
// pairs that are not routed come after num_routed().
class Routing {
 public:
  Routing(const Tensor& order, const Tensor& offsets, int64_t num_experts)
      : order_(int32_array(order, "order")),
        offsets_(int32_array(offsets, "offsets")),
        num_experts_(num_experts) {
    check_size(offsets_.numel(), num_experts + 1, "offsets");
    order_data_ = order_.const_data_ptr<int32_t>();
    offsets_data_ = offsets_.const_data_ptr<int32_t>();
    STD_TORCH_CHECK(offsets_data_[0] == 0 && num_routed() <= num_pairs(),
                    "offsets: expected numbers from 0 to at most ", num_pairs(),
                    ", the size of order, got ", offsets_data_[0], " to ", num_routed());
  }

  int64_t num_pairs() const { return order_.numel(); }
  int64_t num_experts() const { return num_experts_; }
  int64_t num_routed() const { return offsets_data_[num_experts_]; }
  int64_t begin(int64_t e) const { return offsets_data_[e]; }
  int64_t end(int64_t e) const { return offsets_data_[e + 1]; }
  MOELORA_INLINE int64_t pair(int64_t position) const { return order_data_[position]; }

  // Returns how many pairs read one row of a matrix with `rows` rows: S for a row per token, 1 for
  // a row per pair.
  int64_t pairs_per_row(int64_t rows, const char* name) const {
    if (num_pairs() == 0) return 1;
    STD_TORCH_CHECK(rows > 0 && num_pairs() % rows == 0, name,
                    ": expected a row for each token or each of ", num_pairs(), " pairs, got ",
                    rows, " rows");
    return num_pairs() / rows;
  }

  // Returns the row of every routed position in a matrix with a row per token or per pair. It is
  // computed once, because a division for each position and each strip of columns is slow.
  std::vector<int32_t> rows_of_positions(const Tensor& matrix, const char* name) const {
    const auto divisor = int32_t(pairs_per_row(matrix.size(0), name));
    std::vector<int32_t> rows(num_routed());
    for (int64_t position = 0; position < num_routed(); ++position) {
      rows[position] = order_data_[position] / divisor;
    }
    return rows;
  }

 private:
  static Tensor int32_array(const Tensor& array, const char* name) {
    STD_TORCH_CHECK(array.scalar_type() == ScalarType::Int, name, ": expected int32, got ",
                    array.scalar_type());
    return row_major(array);
  }

  Tensor order_;
  Tensor offsets_;
  const int32_t* order_data_;
  const int32_t* offsets_data_;
  int64_t num_experts_;
};

// The sorted positions [begin, end) of one expert.
struct Tile {
  int64_t expert;
  int64_t begin;
  int64_t end;
};

// Returns the tiles of `size` positions that hold all routed pairs.
inline std::vector<Tile> split_into_tiles(const Routing& routing, int64_t size) {
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < routing.num_experts(); ++e) {
    for (int64_t begin = routing.begin(e); begin < routing.end(e); begin += size) {
      tiles.push_back({e, begin, std::min(begin + size, routing.end(e))});
    }
  }
  return tiles;
}

// The routing weight of every pair: weights [T, S] in the compute dtype, or 1 without weights.
template <class C>
class PairWeights {
 public:
  PairWeights(const std::optional<Tensor>& weights, const Routing& routing, ScalarType dtype) {
    if (!weights) return;
    check_size(weights->numel(), routing.num_pairs(), "weights");
    storage_ = row_major(cast(*weights, dtype));
    data_ = storage_->template const_data_ptr<C>();
  }

  MOELORA_INLINE C operator[](int64_t pair) const { return data_ ? data_[pair] : C{1}; }

 private:
  std::optional<Tensor> storage_;
  const C* data_ = nullptr;
};

// Writes zeros to the rows from `first` on.
template <class S>
void clear_rows(const Tensor& matrix, int64_t first) {
  const int64_t columns = matrix.size(1);
  std::fill(matrix.mutable_data_ptr<S>() + first * columns,
            matrix.mutable_data_ptr<S>() + matrix.size(0) * columns, S(0.0f));
}

}  // namespace moelora
