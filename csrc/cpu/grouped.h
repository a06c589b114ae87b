// The routing arrays as the grouped ops read them; see moelora_kernels/types.py.
#pragma once

#include <vector>

#include "gate.h"
#include "panel.h"

namespace moelora {

// A matrix and the row of it that belongs to each place.
template <class S>
struct Rows {
  const S* data;
  int64_t stride;
  const int32_t* of_place;

  MOELORA_INLINE const S* row(int64_t index) const { return data + index * stride; }
};

// order and offsets: the places of expert e are [first(e), last(e)), those of nobody follow.
class Places {
 public:
  Places(const Tensor& order, const Tensor& offsets, int64_t experts)
      : order_(check(order, "order")), offsets_(check(offsets, "offsets")), experts_(experts) {
    check_size(offsets_.numel(), experts + 1, "offsets");
    order_data_ = order_.const_data_ptr<int32_t>();
    offsets_data_ = offsets_.const_data_ptr<int32_t>();
    STD_TORCH_CHECK(offsets_data_[0] == 0 && routed() <= pairs(), "offsets: not those of order");
  }

  int64_t pairs() const { return order_.numel(); }
  int64_t experts() const { return experts_; }
  int64_t routed() const { return offsets_data_[experts_]; }
  int64_t first(int64_t e) const { return offsets_data_[e]; }
  int64_t last(int64_t e) const { return offsets_data_[e + 1]; }
  MOELORA_INLINE int64_t pair(int64_t place) const { return order_data_[place]; }

  // Pairs per row of a matrix with so many rows: the slots of a token, or 1.
  int64_t fan(int64_t rows, const char* name) const {
    if (pairs() == 0) return 1;
    STD_TORCH_CHECK(rows > 0 && pairs() % rows == 0, name, ": ", rows, " rows for ", pairs(),
                    " pairs");
    return pairs() / rows;
  }

  // The row of every routed place in a matrix with so many rows. A division for each place is slow
  // where it is repeated for each strip of columns.
  std::vector<int32_t> rows_of(const Tensor& matrix, const char* name) const {
    const auto divisor = int32_t(fan(matrix.size(0), name));
    std::vector<int32_t> rows(routed());
    for (int64_t place = 0; place < routed(); ++place) rows[place] = order_data_[place] / divisor;
    return rows;
  }

 private:
  static Tensor check(const Tensor& array, const char* name) {
    STD_TORCH_CHECK(array.scalar_type() == ScalarType::Int, name, ": expected int32");
    return row_major(array);
  }

  Tensor order_;
  Tensor offsets_;
  const int32_t* order_data_;
  const int32_t* offsets_data_;
  int64_t experts_;
};

// Some places of one expert.
struct Tile {
  int64_t expert;
  int64_t first;
  int64_t last;
};

inline std::vector<Tile> tiles_of(const Places& places, int64_t size) {
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < places.experts(); ++e) {
    for (int64_t first = places.first(e); first < places.last(e); first += size) {
      tiles.push_back({e, first, std::min(first + size, places.last(e))});
    }
  }
  return tiles;
}

// The weight of every pair: [T, S] in the compute dtype, or 1 where there is none.
template <class C>
class PairWeights {
 public:
  PairWeights(const std::optional<Tensor>& weights, const Places& places, ScalarType dtype) {
    if (!weights) return;
    check_size(weights->numel(), places.pairs(), "weights");
    storage_ = row_major(cast(*weights, dtype));
    data_ = storage_->template const_data_ptr<C>();
  }

  MOELORA_INLINE C operator[](int64_t pair) const { return data_ ? data_[pair] : C{1}; }

 private:
  std::optional<Tensor> storage_;
  const C* data_ = nullptr;
};

// Zeros in the rows from `first` on of a matrix that was allocated without any.
template <class S>
void clear_rows(const Tensor& matrix, int64_t first) {
  const int64_t columns = matrix.size(1);
  std::fill(matrix.mutable_data_ptr<S>() + first * columns,
            matrix.mutable_data_ptr<S>() + matrix.size(0) * columns, S(0.0f));
}

}  // namespace moelora
