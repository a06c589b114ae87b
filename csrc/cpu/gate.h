// The gate of one token and sibling, and the softmax and top-k that make it from logits. Also: the
// blocks of rank space.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "aten.h"
#include "simd.h"

namespace moelora {

// An int32 or int64 tensor whose elements are read as int64, or no tensor. An id such as 2^40 must
// not be cut to 32 bits: it could become a valid expert.
class IntegerTensor {
 public:
  IntegerTensor() = default;

  IntegerTensor(const std::optional<Tensor>& tensor, const char* name) {
    if (!tensor) return;
    storage_ = row_major(*tensor);
    const ScalarType dtype = storage_->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name,
                    ": expected int32 or int64, got ", dtype);
    if (dtype == ScalarType::Int) {
      int32_data_ = storage_->const_data_ptr<int32_t>();
    } else {
      int64_data_ = storage_->const_data_ptr<int64_t>();
    }
  }

  bool has_value() const { return storage_.has_value(); }
  int64_t numel() const { return storage_->numel(); }
  MOELORA_INLINE int64_t operator[](int64_t n) const {
    return int64_data_ ? int64_data_[n] : int32_data_[n];
  }

 private:
  std::optional<Tensor> storage_;
  const int32_t* int32_data_ = nullptr;
  const int64_t* int64_data_ = nullptr;
};

// The gate of n siblings (Gate in moelora_kernels/types.py), in the compute dtype C.
//
//     dense     weights [G, n E]; rows [T], or G is T or 1 without `rows`
//     sparse    weights [T, n K] and experts [T, n K]
template <class C>
class Gate {
 public:
  Gate(const Tensor& weights, const std::optional<Tensor>& experts,
       const std::optional<Tensor>& rows, int64_t T, int64_t siblings, int64_t num_experts)
      : storage_(row_major(cast(weights, DTYPE))),
        weights_(storage_.const_data_ptr<C>()),
        experts_(experts, "experts"),
        rows_(rows, "rows"),
        siblings_(siblings),
        num_experts_(num_experts) {
    const auto [G, width] = shape<2>(storage_, "gate_weights");
    gate_rows_ = G;
    if (experts_.has_value()) {
      check_size(G, T, "gate_weights, tokens");
      check_size(experts_.numel(), G * width, "experts");
      STD_TORCH_CHECK(width % siblings == 0,
                      "gate_weights: expected the same number of columns for each of ", siblings,
                      " siblings, got ", width, " columns");
      slots_ = width / siblings;
      return;
    }
    check_size(width, siblings * num_experts, "gate_weights, columns");
    if (rows_.has_value()) {
      check_size(rows_.numel(), T, "rows");
    } else if (G != 1) {
      check_size(G, T, "gate_weights, rows");
    }
  }

  bool is_sparse() const { return experts_.has_value(); }
  bool has_rows() const { return rows_.has_value(); }
  int64_t gate_rows() const { return gate_rows_; }
  // K of a sparse gate.
  int64_t slots() const { return slots_; }
  const C* weights() const { return weights_; }
  // The expert of a pair t n K + k of a sparse gate.
  MOELORA_INLINE int64_t expert(int64_t pair) const { return experts_[pair]; }

  // Returns the gate row of token t; -1 if the token has no gate row.
  MOELORA_INLINE int64_t row_of_token(int64_t t) const {
    if (!rows_.has_value()) return gate_rows_ == 1 ? 0 : t;
    const int64_t row = rows_[t];
    return row >= 0 && row < gate_rows_ ? row : -1;
  }

  // Fills scaled_gate [E] with scale * gate of every expert, for sibling i of token t.
  MOELORA_INLINE void load_scaled(int64_t t, int64_t i, const C* scaling, C* scaled_gate) const {
    const int64_t E = num_experts_;
    if (experts_.has_value()) {
      std::fill_n(scaled_gate, E, C{0});
      const int64_t first = (t * siblings_ + i) * slots_;
      for (int64_t pair = first; pair < first + slots_; ++pair) {
        const int64_t expert = experts_[pair];
        if (expert >= 0 && expert < E) scaled_gate[expert] += weights_[pair];
      }
    } else {
      const int64_t row = row_of_token(t);
      if (row < 0) {
        std::fill_n(scaled_gate, E, C{0});
        return;
      }
      std::copy_n(weights_ + (row * siblings_ + i) * E, E, scaled_gate);
    }
    for (int64_t e = 0; e < E; ++e) scaled_gate[e] *= scaling[e];
  }

 private:
  static constexpr ScalarType DTYPE =
      std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;

  Tensor storage_;
  const C* weights_;
  IntegerTensor experts_;
  IntegerTensor rows_;
  int64_t gate_rows_ = 0;
  int64_t siblings_;
  int64_t num_experts_;
  int64_t slots_ = 0;
};

// The blocks of rank space: expert e has the ranks[e] columns from begin[e] on. `total` is R.
struct Blocks {
  std::vector<int64_t> ranks;
  std::vector<int64_t> begin;
  int64_t total = 0;

  explicit Blocks(std::vector<int64_t> expert_ranks) : ranks(std::move(expert_ranks)) {
    STD_TORCH_CHECK(!ranks.empty(), "ranks: expected a rank for each expert, got none");
    for (int64_t rank : ranks) {
      STD_TORCH_CHECK(rank >= 0, "ranks: expected ranks of at least 0, got ", rank);
      begin.push_back(total);
      total += rank;
    }
  }

  int64_t num_experts() const { return int64_t(ranks.size()); }

  // Checks that all ranks are equal: experts that share A read the same columns of h.
  void check_shared() const {
    for (int64_t rank : ranks) check_size(rank, ranks[0], "ranks, with share_a");
  }
};

// Returns numbers in the compute dtype C.
template <class C>
std::vector<C> to_compute(const std::vector<double>& numbers) {
  return std::vector<C>(numbers.begin(), numbers.end());
}

// Returns whether `left` comes before `right` by falling score. NaN counts as the largest number,
// like in torch.sort.
template <class C>
MOELORA_INLINE bool before(C left, C right) {
  return left > right || (left != left && right == right);
}

// Fills experts [K] with the K experts of the largest scores [E], by falling score. Of equal scores
// the lower expert comes first. keys [E] is scratch space.
MOELORA_INLINE void top_k(const float* score, int64_t E, int64_t K, int64_t* keys,
                          int32_t* experts) {
  // A key is one integer that orders (score, expert). K maxima of the keys need no branch on data.
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
    experts[k] = int32_t(expert);
    keys[expert] = INT64_MIN;
  }
}

MOELORA_INLINE void top_k(const double* score, int64_t E, int64_t K, int64_t*, int32_t* experts) {
  // Insert every expert into the sorted list of the best experts so far.
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (count == K && !before(score[e], score[experts[K - 1]])) continue;
    int64_t k = count < K ? count++ : K - 1;
    for (; k > 0 && before(score[e], score[experts[k - 1]]); --k) experts[k] = experts[k - 1];
    experts[k] = int32_t(e);
  }
}

// Returns exp(power) for a power of at most 0, with an error of at most 2 units in the last place.
// It has no calls and no branches, so that the compiler vectorises loops over it.
MOELORA_INLINE float exponential(float power) {
  // Below this power the result is not a normal number, and counts as zero. NaN compares false, so
  // it stays NaN.
  constexpr float SMALLEST = -87.0f;
  const float clamped = power < SMALLEST ? SMALLEST : power;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const float shifted = clamped * 0x1.715476p0f + 0x1.8p23f;
  const float twos = shifted - 0x1.8p23f;
  const float rest = (clamped - twos * 0x1.62e400p-1f) - twos * 0x1.7f7d1cp-20f;
  // The Taylor series of exp(rest), from 1 / 6! on; |rest| is at most ln 2 / 2.
  float sum = 0x1.6c16c2p-10f;
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

// Fills powers [count] with exp(score - largest score), and returns their sum.
template <class C>
MOELORA_INLINE C exponentials(const C* score, int64_t count, C* powers) {
  C largest = score[0];
  for (int64_t e = 1; e < count; ++e) largest = std::max(largest, score[e]);
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) {
    powers[e] = exponential(score[e] - largest);
    sum += powers[e];
  }
  return sum;
}

struct TopkOptions {
  int64_t K;
  bool renormalize;
  double temperature;
};

// Scratch space of one thread, for all its rows.
template <class C>
struct TopkScratch {
  explicit TopkScratch(int64_t E) : score(E), powers(E), keys(E) {}
  std::vector<C> score;
  std::vector<C> powers;
  std::vector<int64_t> keys;
};

// Computes the gate of one row of logits [E].
//
//     p = softmax(logits / temperature)
//     weights_k = p[experts_k]     or, with renormalize, p[experts_k] / sum_j p[experts_j]
//
// experts [K] are the K largest p. With K = E they are 0 to E - 1.
template <class C>
MOELORA_INLINE void topk_softmax(const C* logits, int64_t E, const TopkOptions& options,
                                 TopkScratch<C>& scratch, C* weights, int32_t* experts) {
  const int64_t K = options.K;
  C* score = scratch.score.data();
  C* powers = scratch.powers.data();
  for (int64_t e = 0; e < E; ++e) score[e] = logits[e] / C(options.temperature);
  if (K == E) {
    for (int64_t k = 0; k < K; ++k) experts[k] = int32_t(k);
  } else {
    top_k(score, E, K, scratch.keys.data(), experts);
  }
  if (options.renormalize) {
    // The softmax over the K scores alone. `powers` holds these scores.
    for (int64_t k = 0; k < K; ++k) powers[k] = score[experts[k]];
    const C sum = exponentials(powers, K, weights);
    for (int64_t k = 0; k < K; ++k) weights[k] /= sum;
  } else {
    const C sum = exponentials(score, E, powers);
    for (int64_t k = 0; k < K; ++k) weights[k] = powers[experts[k]] / sum;
  }
}

// Computes the gate of the rows [begin, end) of logits [rows, E]: weights and experts [rows, K].
// `experts` is null if they are not returned.
template <class C>
MOELORA_INLINE void topk_rows(const C* logits, int64_t begin, int64_t end, int64_t E,
                              const TopkOptions& options, C* weights, int32_t* experts) {
  const int64_t K = options.K;
  TopkScratch<C> scratch(E);
  std::vector<int32_t> unused_experts(experts ? 0 : K);
  for (int64_t row = begin; row < end; ++row) {
    topk_softmax(logits + row * E, E, options, scratch, weights + row * K,
                 experts ? experts + row * K : unused_experts.data());
  }
}

// The gate of the linear routers of n siblings, as ops return it. Without routers its tensors are
// empty; experts are also empty if K = E, because they are 0 to E - 1.
struct RouterGate {
  Tensor weights;  // [T, n K]
  Tensor experts;  // [T, n K]
  Tensor logits;   // [T, n E]

  // Checks the routers and allocates the tensors. `dtype` is that of x.
  RouterGate(const std::vector<Tensor>& router_weight, const std::vector<Tensor>& router_bias,
             ScalarType dtype, int64_t T, int64_t siblings, int64_t E, int64_t K)
      : weights(absent(compute_dtype(dtype))),
        experts(absent(ScalarType::Int)),
        logits(absent(compute_dtype(dtype))) {
    if (router_weight.empty()) return;
    check_size(int64_t(router_weight.size()), siblings, "router_weight, siblings");
    check_count(router_bias, siblings, "router_bias");
    for (const Tensor& weight : router_weight) {
      check_size(weight.size(0), E, "router_weight, experts");
    }
    STD_TORCH_CHECK(1 <= K && K <= E, "top_k: expected 1 to ", E, ", got ", K);
    weights = empty(T, siblings * K, compute_dtype(dtype));
    if (K < E) experts = empty(T, siblings * K, ScalarType::Int);
    logits = empty(T, siblings * E, compute_dtype(dtype));
  }

  // Returns where the experts are stored; null if they are not.
  int32_t* experts_data() const {
    return experts.numel() > 0 ? experts.mutable_data_ptr<int32_t>() : nullptr;
  }
};

// Checks the arguments of a shrink of x [T, I] by the A of n siblings. Returns the rows of one A.
inline int64_t check_shrink(const Tensor& x, const std::vector<Tensor>& lora_a,
                            const Blocks& blocks, const std::vector<double>& scaling,
                            bool share_a) {
  check_floating(x, "x");
  const auto [T, I] = shape<2>(x, "x");
  STD_TORCH_CHECK(!lora_a.empty(), "lora_a: expected a tensor for each sibling, got none");
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  if (share_a) blocks.check_shared();
  const int64_t width = share_a ? blocks.ranks[0] : blocks.total;
  for (const Tensor& a : lora_a) {
    const auto [rank, in_features] = shape<2>(a, "lora_a");
    check_size(rank, width, "lora_a, ranks");
    check_size(in_features, I, "lora_a, in_features");
  }
  return width;
}

// Computes dlogits [E] of one row from dweights [K].
//
//     mean = sum_k weights_k dweights_k
//     dlogits[e] = p_e (dp_e - mean) / temperature                     without renormalize
//     dlogits[experts_k] = weights_k (dweights_k - mean) / temperature    with renormalize
//
// dp[experts_k] is dweights_k. All other entries of dp, and of dlogits with renormalize, are 0.
// expert_of_slot(k) returns the expert of slot k. `logits` is read only without renormalize.
template <class C, class ExpertOfSlot>
MOELORA_INLINE void topk_softmax_backward(const C* dweights, const C* weights,
                                          const ExpertOfSlot& expert_of_slot, const C* logits,
                                          int64_t E, const TopkOptions& options,
                                          TopkScratch<C>& scratch, C* dlogits) {
  const int64_t K = options.K;
  const C temperature = C(options.temperature);
  C mean = 0;
  for (int64_t k = 0; k < K; ++k) mean += weights[k] * dweights[k];
  std::fill_n(dlogits, E, C{0});
  if (options.renormalize) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = expert_of_slot(k);
      if (expert >= 0 && expert < E) {
        dlogits[expert] = weights[k] * (dweights[k] - mean) / temperature;
      }
    }
    return;
  }

  // dlogits holds dp until the last loop, which needs p again.
  for (int64_t k = 0; k < K; ++k) {
    const int64_t expert = expert_of_slot(k);
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
