// From the rank space of every expert to features. A strip of columns of all matrices stays in L2,
// so each token picks its experts there, adds its slots in registers, and is written and rounded
// once: no order of experts is needed, and none of the sums leaves the registers.
#include <torch/csrc/stable/library.h>

#include "dropout.h"
#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Columns of a strip, fewer where the matrices have many ranks.
constexpr int64_t STRIP = 64;
constexpr int64_t STRIP_BYTES = 512 << 10;
// Rows of a task, unless there are too few.
constexpr int64_t ROWS = 4096;
// Terms of one running sum.
constexpr int64_t LONGEST = 64;

// What a pair adds to its row of y: units of u, and as many of its expert's matrix from `first` on.
struct Term {
  int32_t first;
  // 0 where the pair is not routed.
  int32_t steps;
  int32_t expert;
};

template <class S, class C>
struct Expand {
  const Places& places;
  int64_t first_expert;
  const Blocks& blocks;
  const Mask& mask;
  const S* u;
  int64_t width;
  std::vector<const S*> matrices;
  // Strides of the matrices: from one feature, and from one rank, to the next.
  int64_t feature;
  int64_t rank;
  // Pairs of a row.
  int64_t fan;
  int64_t O;
  // One more rank of every expert, not dropped: the coefficient of a pair [pairs] times the row
  // [., O] of its expert.
  const S* coefficients = nullptr;
  const S* expert_rows = nullptr;

  // Units of all matrices in one column.
  template <class P>
  int64_t all_units() const {
    int64_t units = 0;
    for (int64_t rank_of_expert : blocks.ranks) units += P::units(rank_of_expert) + more();
    return int64_t(matrices.size()) * units;
  }

  // Units of a pair in of_u.
  int64_t stride() const { return width + more(); }

  // The columns [strip, strip + columns) of all matrices, a row of units for each PER ranks:
  // packed [units, width of the strip].
  template <class P>
  MOELORA_INLINE void pack(int64_t strip, int64_t columns, int64_t strip_width,
                           typename P::Unit* packed) const {
    const S* expert_row = expert_rows;
    for (const S* matrix : matrices) {
      for (int64_t e = 0; e < blocks.experts(); ++e) {
        pack_expert<P>(matrix + blocks.begin[e] * rank, blocks.ranks[e], strip, columns,
                       strip_width, packed);
        packed += P::units(blocks.ranks[e]) * strip_width;
        if (!more()) continue;
        P::across(expert_row + strip, nullptr, columns, packed);
        packed += strip_width;
        expert_row += O;
      }
    }
  }

  // The terms of all pairs, and their rows of u as units: of_u [pairs, stride].
  template <class P>
  std::vector<Term> terms(typename P::Unit* of_u) const {
    std::vector<Term> found(places.pairs());
    int64_t expert = first_expert;
    int64_t first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      for (int64_t e = 0; e < blocks.experts(); ++e, ++expert) {
        const int64_t steps = P::units(blocks.ranks[e]);
        for (int64_t n = places.first(expert); n < places.last(expert); ++n) {
          const int64_t pair = places.pair(n);
          found[pair] = {int32_t(first), int32_t(steps), int32_t(e)};
          typename P::Unit* to = of_u + pair * stride();
          P::along(u + n * width, blocks.ranks[e], to);
          if (more()) P::along(coefficients + pair, 1, to + steps);
        }
        first += steps + more();
      }
    }
    return found;
  }

  // sums [strip width] of one row: its terms in the order of slots; term [strip width] is scratch.
  template <class Level, int VECTORS, class Unit>
  MOELORA_INLINE void row(int64_t index, int64_t strip, int64_t columns, const Unit* packed,
                          const Term* terms, const Unit* of_u, C* term, C* sums) const {
    using V = typename Vector<C, Level{}()>::type;
    constexpr int64_t LANES = Vector<C, Level{}()>::LANES;
    constexpr int64_t WIDTH = VECTORS * LANES;
    V sum[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sum[v] = V{};
    for (int64_t pair = index * fan; pair < (index + 1) * fan; ++pair) {
      const int64_t steps = terms[pair].steps;
      const Unit* left = of_u + pair * stride();
      const Unit* right = packed + terms[pair].first * WIDTH;
      if (more() && steps > 0) add<Level, VECTORS>(left + steps, right + steps * WIDTH, 1, sum);
      if (!mask.active()) {
        add<Level, VECTORS>(left, right, steps, sum);
        continue;
      }
      V own[VECTORS];
      for (int v = 0; v < VECTORS; ++v) own[v] = V{};
      add<Level, VECTORS>(left, right, steps, own);
      for (int v = 0; v < VECTORS; ++v) store<C, Level{}()>(term + v * LANES, own[v]);
      mask.apply(term, index * O + strip, columns, terms[pair].expert);
      for (int v = 0; v < VECTORS; ++v) {
        sum[v] += load<C, Level{}()>(term + v * LANES);
      }
    }
    for (int v = 0; v < VECTORS; ++v) store<C, Level{}()>(sums + v * LANES, sum[v]);
  }

 private:
  // Units that the rows of the experts add to each.
  int64_t more() const { return expert_rows == nullptr ? 0 : 1; }

  template <class Level, int VECTORS, class Unit, class V>
  MOELORA_INLINE void add(const Unit* of_u, const Unit* right, int64_t steps, V* sum) const {
    using U = typename Vector<Unit, Level{}()>::type;
    constexpr int64_t LANES = Vector<Unit, Level{}()>::LANES;
    // Two sets of sums: one alone would wait for itself in every step. Both start at zero again
    // now and then: a long sum in one go would lose bits.
    for (int64_t begin = 0; begin < steps; begin += LONGEST) {
      const int64_t end = std::min(steps, begin + LONGEST);
      V even[VECTORS], odd[VECTORS];
      for (int v = 0; v < VECTORS; ++v) even[v] = odd[v] = V{};
      int64_t n = begin;
      for (; n + 2 <= end; n += 2) {
        const U first = U{} + of_u[n];
        const U second = U{} + of_u[n + 1];
        for (int v = 0; v < VECTORS; ++v) {
          even[v] = multiply_add(even[v], first,
                                 load<Unit, Level{}()>(right + (n * VECTORS + v) * LANES));
          odd[v] = multiply_add(odd[v], second,
                                load<Unit, Level{}()>(right + ((n + 1) * VECTORS + v) * LANES));
        }
      }
      for (int v = 0; v < VECTORS; ++v) {
        if (n < end) {
          even[v] = multiply_add(even[v], U{} + of_u[n],
                                 load<Unit, Level{}()>(right + (n * VECTORS + v) * LANES));
        }
        sum[v] += even[v] + odd[v];
      }
    }
  }

  // `count` rows with dense features.
  template <class P>
  MOELORA_INLINE void pack_rows(const S* from, int64_t stride, int64_t count, int64_t strip,
                                int64_t columns, int64_t strip_width, typename P::Unit* to) const {
    for (int64_t j = 0; j < count; j += P::PER) {
      const S* of_row = from + j * stride + strip;
      P::across(of_row, j + 1 < count ? of_row + stride : nullptr, columns,
                to + j / P::PER * strip_width);
    }
  }

  template <class P>
  MOELORA_INLINE void pack_expert(const S* from, int64_t ranks, int64_t strip, int64_t columns,
                                  int64_t strip_width, typename P::Unit* to) const {
    using Unit = typename P::Unit;
    if (feature == 1) {
      pack_rows<P>(from, rank, ranks, strip, columns, strip_width, to);
      return;
    }
    for (int64_t j = 0; j < ranks; j += P::PER * PANEL) {
      alignas(64) Unit block[STRIP * PANEL];
      const int64_t count = std::min(P::PER * PANEL, ranks - j);
      for (int64_t o = 0; o < columns; ++o) {
        P::along(from + (strip + o) * feature + j, count, block + o * PANEL);
      }
      for (int64_t k = 0; k < P::units(count); ++k) {
        Unit* of_units = to + (j / P::PER + k) * strip_width;
        for (int64_t o = 0; o < columns; ++o) of_units[o] = block[o * PANEL + k];
      }
    }
  }
};

// y = start + sums, for one row of a strip; start may be nullptr, or y.
template <class Y, class C>
MOELORA_INLINE void finish(const C* sums, int64_t columns, const Y* start, Y* y) {
  if (start == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) y[j] = narrow<Y>(sums[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) y[j] = narrow<Y>(sums[j] + C(widen(start[j])));
  }
}

// Where y starts from, by row of y.
template <class Y>
struct Start {
  const Y* data;
  int64_t stride;
  int64_t fan;

  MOELORA_INLINE const Y* row(int64_t index) const {
    return data == nullptr ? nullptr : data + index / fan * stride;
  }
};

template <class Level, int VECTORS, class S, class C, class Y>
MOELORA_INLINE void strip_kernel(const Expand<S, C>& expand, const Term* terms,
                                 const typename Operand<S, Level::pairs>::Unit* of_u, int64_t strip,
                                 int64_t begin, int64_t end, const Start<Y>& start, Y* y,
                                 C* buffer) {
  using P = Operand<S, Level::pairs>;
  constexpr int64_t WIDTH = VECTORS * Vector<C, Level{}()>::LANES;
  const int64_t columns = std::min(WIDTH, expand.O - strip);
  auto* packed = reinterpret_cast<typename P::Unit*>(buffer + 2 * STRIP);
  expand.template pack<P>(strip, columns, WIDTH, packed);
  for (int64_t row = begin; row < end; ++row) {
    expand.template row<Level, VECTORS>(row, strip, columns, packed, terms, of_u, buffer,
                                        buffer + STRIP);
    const Y* from = start.row(row);
    finish<Y, C>(buffer + STRIP, columns, from == nullptr ? nullptr : from + strip,
                 y + row * expand.O + strip);
  }
}

template <class Level, class S, class C, class Y>
void run(const Expand<S, C>& expand, int64_t rows, const Start<Y>& start, Y* y) {
  using P = Operand<S, Level::pairs>;
  constexpr int64_t LANES = Vector<C, Level{}()>::LANES;
  constexpr int MOST = int(STRIP / LANES) > 4 ? 4 : int(STRIP / LANES);
  std::vector<typename P::Unit> of_u(expand.places.pairs() * expand.stride());
  const std::vector<Term> terms = expand.template terms<P>(of_u.data());
  const int64_t units = expand.template all_units<P>();
  int vectors = MOST;
  while (vectors > 1 && units * vectors * LANES * int64_t(sizeof(C)) > STRIP_BYTES) vectors /= 2;
  const int64_t strips = (expand.O + vectors * LANES - 1) / (vectors * LANES);
  const int64_t chunks = (rows + ROWS - 1) / ROWS;
  const int64_t work = vectors * LANES * (std::min(rows, ROWS) * expand.width + units);
  torch::stable::parallel_for(0, strips * chunks, grain(work), [&](int64_t begin, int64_t end) {
    std::vector<C> buffer(2 * STRIP + units * vectors * LANES);
    vectorised([&](auto level) {
      if constexpr (std::is_same_v<decltype(level), Level>) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task / strips * ROWS;
          const int64_t last = std::min(rows, first + ROWS);
          const int64_t strip = task % strips * vectors * LANES;
          if (vectors == 4) {
            strip_kernel<Level, 4>(expand, terms.data(), of_u.data(), strip, first, last, start, y,
                                   buffer.data());
          } else if (vectors == 2) {
            strip_kernel<Level, 2>(expand, terms.data(), of_u.data(), strip, first, last, start, y,
                                   buffer.data());
          } else {
            strip_kernel<Level, 1>(expand, terms.data(), of_u.data(), strip, first, last, start, y,
                                   buffer.data());
          }
        }
      }
    });
  });
}

// As grouped_expand; `into` [T, O] in u.dtype is start and result at once.
Tensor expand_to(std::optional<Tensor> into, Tensor u, std::vector<Tensor> matrices,
                 std::optional<Tensor> start, const Tensor& order, const Tensor& offsets,
                 const std::vector<int64_t>& ranks, int64_t tokens, int64_t first, bool per_pair,
                 double dropout_p, bool dropout_per_expert, const std::optional<Tensor>& seed,
                 std::optional<Tensor> coefficients, std::optional<Tensor> expert_rows) {
  check_floating(u, "u");
  const Blocks blocks(ranks);
  const int64_t E = blocks.experts();
  const auto siblings = int64_t(matrices.size());
  STD_TORCH_CHECK(siblings > 0, "matrices: expected one per sibling, got none");
  const ScalarType dtype = u.scalar_type();
  const Places places(order, offsets, offsets.numel() - 1);
  STD_TORCH_CHECK(first >= 0 && (first + siblings) * E <= places.experts(), "first: siblings ",
                  first, " to ", first + siblings, " of ", places.experts() / E);
  STD_TORCH_CHECK(!per_pair || places.experts() == E, "per_pair: expected one sibling");
  u = row_major(u);
  const auto [pairs, width] = shape<2>(u, "u");
  check_size(pairs, places.pairs(), "u, pairs");
  check_size(width, *std::max_element(ranks.begin(), ranks.end()), "u, ranks");
  const Mask mask(dropout_p, dropout_per_expert, seed);

  // Either all matrices with dense features (A, transposed) or all with dense ranks (B).
  bool features = true;
  for (Tensor& matrix : matrices) {
    matrix = cast(matrix, dtype);
    features = features && matrix.stride(0) == 1 && matrix.stride(1) == matrices[0].stride(1);
  }
  const int64_t O = matrices[0].size(0);
  for (Tensor& matrix : matrices) {
    if (!features) matrix = row_major(matrix);
    check_size(matrix.size(0), O, "matrices, features");
    check_size(matrix.size(1), blocks.total, "matrices, ranks");
  }
  const bool of_tokens = start && start->dim() == 2;
  const ScalarType result = of_tokens ? start->scalar_type() : dtype;
  // Written in the dtype of u, or in that of the sums and cast.
  const ScalarType written = result == dtype ? dtype : compute_dtype(dtype);
  if (start) {
    start = of_tokens ? dense_rows(*start, written) : row_major(cast(*start, written));
    check_size(start->size(start->dim() - 1), O, "start, features");
    if (of_tokens) check_size(start->size(0), tokens, "start, tokens");
  }

  const int64_t slots = places.fan(tokens, "tokens");
  const int64_t rows = per_pair ? pairs : tokens;
  if (coefficients) {
    coefficients = row_major(cast(*coefficients, dtype));
    expert_rows = row_major(cast(*expert_rows, dtype));
    check_size(coefficients->numel(), pairs, "coefficients, pairs");
    check_size(expert_rows->size(0), siblings * E, "expert_rows, experts");
    check_size(expert_rows->size(1), O, "expert_rows, features");
  }
  const Tensor y = into ? *into : empty(rows, O, written);
  for_dtype(dtype, [&, width = width](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    Expand<S, C> expand{.places = places,
                        .first_expert = first * E,
                        .blocks = blocks,
                        .mask = mask,
                        .u = u.const_data_ptr<S>(),
                        .width = width,
                        .matrices = {},
                        .feature = features ? 1 : matrices[0].stride(0),
                        .rank = features ? matrices[0].stride(1) : 1,
                        .fan = per_pair ? 1 : slots,
                        .O = O};
    for (const Tensor& matrix : matrices) expand.matrices.push_back(matrix.const_data_ptr<S>());
    if (coefficients) {
      expand.coefficients = coefficients->const_data_ptr<S>();
      expand.expert_rows = expert_rows->const_data_ptr<S>();
    }
    const auto write = [&](auto of_y) {
      using Y = typename decltype(of_y)::type;
      const Start<Y> from{start ? start->const_data_ptr<Y>() : nullptr,
                          of_tokens ? start->stride(0) : 0, per_pair ? slots : 1};
      vectorised_level(
          [&](auto level) { run<decltype(level)>(expand, rows, from, y.mutable_data_ptr<Y>()); });
    };
    if (written == dtype) {
      write(Type<S>{});
    } else {
      write(Type<C>{});
    }
  });
  return cast(y, result);
}

}  // namespace

Tensor grouped_expand(Tensor u, std::vector<Tensor> matrices, std::optional<Tensor> start,
                      Tensor order, Tensor offsets, Tensor /*tiles*/, Tensor /*chunks*/,
                      std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
                      std::optional<Tensor> seed, int64_t tokens, int64_t first_sibling,
                      bool per_pair) {
  return expand_to(std::nullopt, u, matrices, start, order, offsets, ranks, tokens, first_sibling,
                   per_pair, dropout_p, dropout_per_expert, seed, std::nullopt, std::nullopt);
}

void grouped_expand_in_place(const Tensor& y, Tensor u, std::vector<Tensor> matrices, Tensor order,
                             Tensor offsets, std::vector<int64_t> ranks, int64_t first,
                             double dropout_p, bool dropout_per_expert, std::optional<Tensor> seed,
                             std::optional<Tensor> coefficients,
                             std::optional<Tensor> expert_rows) {
  STD_TORCH_CHECK(y.is_contiguous() && y.scalar_type() == u.scalar_type(), "y: of u's dtype");
  expand_to(y, u, matrices, y, order, offsets, ranks, y.size(0), first, false, dropout_p,
            dropout_per_expert, seed, coefficients, expert_rows);
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_expand", TORCH_BOX(&moelora::grouped_expand));
}
