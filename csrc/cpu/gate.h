// The gate of one token and sibling, and the softmax and top-k that make it.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "aten.h"
#include "simd.h"

namespace moelora {

// An int32 or int64 tensor read as int64, or nothing. 2^40 must not wrap into a valid expert.
class Index {
 public:
  Index() = default;

  Index(const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return;
    storage_ = row_major(*tensor);
    const ScalarType dtype = storage_->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name,
                    ": expected int32 or int64");
    if (dtype == ScalarType::Int) {
      narrow_ = storage_->const_data_ptr<int32_t>();
    } else {
      wide_ = storage_->const_data_ptr<int64_t>();
    }
  }

  bool given() const { return storage_.has_value(); }
  int64_t numel() const { return storage_->numel(); }
  MOELORA_INLINE int64_t operator[](int64_t n) const { return wide_ ? wide_[n] : narrow_[n]; }

 private:
  std::optional<Tensor> storage_;
  const int32_t* narrow_ = nullptr;
  const int64_t* wide_ = nullptr;
};

// Dense gates [G, n E] with rows [T] or without (G == T or one row for all), or sparse weights
// [T, n K] with indices [T, n K]. See dense_gate in reference.py.
template <class C>
class Gate {
 public:
  Gate(const Tensor& gates, const std::optional<Tensor>& indices, const std::optional<Tensor>& rows,
       int64_t T, int64_t siblings, int64_t experts)
      : storage_(row_major(cast(gates, compute_dtype_of<C>()))),
        values_(storage_.const_data_ptr<C>()),
        indices_(indices, "experts"),
        rows_(rows, "rows"),
        siblings_(siblings),
        experts_(experts) {
    const auto [G, width] = shape<2>(storage_, "gates");
    gate_rows_ = G;
    if (indices_.given()) {
      check_size(G, T, "gates, tokens");
      check_size(indices_.numel(), G * width, "experts");
      STD_TORCH_CHECK(width % siblings == 0, "gates: ", width, " columns for ", siblings,
                      " siblings");
      slots_ = width / siblings;
      return;
    }
    check_size(width, siblings * experts, "gates, columns");
    if (rows_.given()) {
      check_size(rows_.numel(), T, "rows");
    } else if (G != 1) {
      check_size(G, T, "gates, rows");
    }
  }

  bool sparse() const { return indices_.given(); }
  bool by_row() const { return rows_.given(); }
  int64_t gate_rows() const { return gate_rows_; }
  int64_t slots() const { return slots_; }
  const C* values() const { return values_; }
  MOELORA_INLINE int64_t expert_of(int64_t slot) const { return indices_[slot]; }

  // The gate row of token t; -1 for none.
  MOELORA_INLINE int64_t row_of(int64_t t) const {
    if (!rows_.given()) return gate_rows_ == 1 ? 0 : t;
    const int64_t row = rows_[t];
    return row >= 0 && row < gate_rows_ ? row : -1;
  }

  // gate[e] = scaling[e] * gate of expert e, for sibling i of token t.
  MOELORA_INLINE void load_scaled(int64_t t, int64_t i, const C* scaling, C* gate) const {
    const int64_t E = experts_;
    if (indices_.given()) {
      std::fill_n(gate, E, C{0});
      const int64_t first = (t * siblings_ + i) * slots_;
      for (int64_t slot = first; slot < first + slots_; ++slot) {
        const int64_t expert = indices_[slot];
        if (expert >= 0 && expert < E) gate[expert] += values_[slot];
      }
    } else {
      const int64_t row = row_of(t);
      if (row < 0) {
        std::fill_n(gate, E, C{0});
        return;
      }
      std::copy_n(values_ + (row * siblings_ + i) * E, E, gate);
    }
    for (int64_t e = 0; e < E; ++e) gate[e] *= scaling[e];
  }

 private:
  template <class Number>
  static ScalarType compute_dtype_of() {
    return std::is_same_v<Number, double> ? ScalarType::Double : ScalarType::Float;
  }

  Tensor storage_;
  const C* values_;
  Index indices_;
  Index rows_;
  int64_t gate_rows_ = 0;
  int64_t siblings_;
  int64_t experts_;
  int64_t slots_ = 0;
};

// The blocks of rank space: expert e owns `ranks[e]` columns from `begin[e]` on.
struct Blocks {
  std::vector<int64_t> ranks;
  std::vector<int64_t> begin;
  int64_t total = 0;

  explicit Blocks(std::vector<int64_t> of_experts) : ranks(std::move(of_experts)) {
    STD_TORCH_CHECK(!ranks.empty(), "ranks: expected one per expert");
    for (int64_t rank : ranks) {
      STD_TORCH_CHECK(rank >= 0, "ranks: expected numbers from 0, got ", rank);
      begin.push_back(total);
      total += rank;
    }
  }

  int64_t experts() const { return int64_t(ranks.size()); }

  // With one A for all experts every expert reads the same columns of h.
  void check_shared() const {
    for (int64_t rank : ranks) check_size(rank, ranks[0], "ranks with share_a");
  }
};

template <class C>
std::vector<C> to_compute(const std::vector<double>& numbers) {
  return std::vector<C>(numbers.begin(), numbers.end());
}

// NaN counts as the largest number, as in torch.sort.
template <class C>
MOELORA_INLINE bool before(C left, C right) {
  return left > right || (left != left && right == right);
}

// The first K experts by falling score, the lower expert first among equals; `keys` holds E
// numbers.
MOELORA_INLINE void top_k(const float* score, int64_t E, int64_t K, int64_t* keys,
                          int32_t* indices) {
  // One integer orders (score, expert): K maxima without a branch on data.
  constexpr int32_t NAN_KEY = 0x7FC00000;
#pragma omp simd
  for (int64_t e = 0; e < E; ++e) {
    const int32_t word = bits<int32_t>(score[e] + 0.0f);
    const int32_t ordered = word ^ ((word >> 31) & 0x7FFFFFFF);
    const int32_t key = (word & 0x7FFFFFFF) > 0x7F800000 ? NAN_KEY : ordered;
    keys[e] = (int64_t{key} << 32) | (0x7FFFFFFF - e);
  }
  for (int64_t k = 0; k < K; ++k) {
    int64_t largest = INT64_MIN;
#pragma omp simd reduction(max : largest)
    for (int64_t e = 0; e < E; ++e) largest = std::max(largest, keys[e]);
    const int64_t expert = 0x7FFFFFFF - (largest & 0xFFFFFFFF);
    indices[k] = int32_t(expert);
    keys[expert] = INT64_MIN;
  }
}

MOELORA_INLINE void top_k(const double* score, int64_t E, int64_t K, int64_t*, int32_t* indices) {
  int64_t found = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (found == K && !before(score[e], score[indices[K - 1]])) continue;
    int64_t at = found < K ? found++ : K - 1;
    for (; at > 0 && before(score[e], score[indices[at - 1]]); --at) indices[at] = indices[at - 1];
    indices[at] = int32_t(e);
  }
}

// exp of a number that is not positive, to 2 units in the last place; free of calls and branches.
MOELORA_INLINE float exponential(float power) {
  // Below this exp leaves the normal numbers and counts as zero. NaN compares false and stays.
  constexpr float SMALLEST = -87.0f;
  const float clamped = power < SMALLEST ? SMALLEST : power;
  // Adding and subtracting 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  const float shifted = clamped * 0x1.715476p0f + 0x1.8p23f;
  const float twos = shifted - 0x1.8p23f;
  const float rest = (clamped - twos * 0x1.62e400p-1f) - twos * 0x1.7f7d1cp-20f;
  float sum = 0x1.6c16c2p-10f;  // 1 / 6!, then Taylor downwards: |rest| <= ln 2 / 2
  sum = sum * rest + 0x1.111112p-7f;
  sum = sum * rest + 0x1.555556p-5f;
  sum = sum * rest + 0x1.555556p-3f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const uint32_t scale = (bits<uint32_t>(shifted) << 23) + 0x3F800000;
  return power < SMALLEST ? 0.0f : sum * bits<float>(scale);
}

MOELORA_INLINE double exponential(double power) { return std::exp(power); }

// exp(score - largest) into `out`; returns their sum.
template <class C>
MOELORA_INLINE C exponentials(const C* score, int64_t count, C* out) {
  C largest = score[0];
  for (int64_t e = 1; e < count; ++e) largest = std::max(largest, score[e]);
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    out[e] = exponential(score[e] - largest);
    sum += out[e];
  }
  return sum;
}

struct TopkOptions {
  int64_t K;
  bool renormalize;
  double temperature;
};

// What the rows of one thread need between them.
template <class C>
struct TopkScratch {
  explicit TopkScratch(int64_t E) : score(E), powers(E), keys(E) {}
  std::vector<C> score;
  std::vector<C> powers;
  std::vector<int64_t> keys;
};

// Weights [K] and indices [K] of one row of logits [E].
template <class C>
MOELORA_INLINE void topk_softmax(const C* logits, int64_t E, const TopkOptions& options,
                                 TopkScratch<C>& scratch, C* weights, int32_t* indices) {
  const int64_t K = options.K;
  C* score = scratch.score.data();
  C* chosen = scratch.powers.data();
  for (int64_t e = 0; e < E; ++e) score[e] = logits[e] / C(options.temperature);
  if (K == E) {
    for (int64_t k = 0; k < K; ++k) indices[k] = int32_t(k);
  } else {
    top_k(score, E, K, scratch.keys.data(), indices);
  }
  if (options.renormalize) {
    for (int64_t k = 0; k < K; ++k) chosen[k] = score[indices[k]];
    const C sum = exponentials(chosen, K, weights);
    for (int64_t k = 0; k < K; ++k) weights[k] /= sum;
  } else {
    const C sum = exponentials(score, E, chosen);
    for (int64_t k = 0; k < K; ++k) weights[k] = chosen[indices[k]] / sum;
  }
}

// dlogits [E] of one row from dweights [K]; indices null: K == E in the experts' own order.
// `logits` is read only without renormalize.
template <class C, class IndexOf>
MOELORA_INLINE void topk_softmax_backward(const C* dweights, const C* weights,
                                          const IndexOf& index_of, const C* logits, int64_t E,
                                          const TopkOptions& options, TopkScratch<C>& scratch,
                                          C* dlogits) {
  const int64_t K = options.K;
  const C temperature = C(options.temperature);
  C mean = 0;
  for (int64_t k = 0; k < K; ++k) mean += weights[k] * dweights[k];
  std::fill_n(dlogits, E, C{0});
  if (options.renormalize) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = index_of(k);
      if (expert >= 0 && expert < E) {
        dlogits[expert] = weights[k] * (dweights[k] - mean) / temperature;
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    const int64_t expert = index_of(k);
    if (expert >= 0 && expert < E) dlogits[expert] = dweights[k];
  }
  C* score = scratch.score.data();
  C* powers = scratch.powers.data();
  for (int64_t e = 0; e < E; ++e) score[e] = logits[e] / temperature;
  const C sum = exponentials(score, E, powers);
  for (int64_t e = 0; e < E; ++e) {
    dlogits[e] = powers[e] / sum * (dlogits[e] - mean) / temperature;
  }
}

}  // namespace moelora
