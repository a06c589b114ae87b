// The op `grouped_expand`: from the ranks of each pair's expert to features,
//     y_t = start + sum over the pairs p of token t: dropout(u_p Mt_e)
// Threads split the tasks. A task is a strip of columns and a block of rows of y. The strip of all
// matrices stays in L2, so each row reads its experts from there, sums its pairs in registers, and
// is rounded and written once. The pairs need no sorting for this.
#include "grouped_expand.h"

#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "ops.h"

namespace moelora {
namespace {

// The packed strip of all matrices has at most this many bytes, unless one vector per column block
// needs more.
constexpr int64_t STRIP_BYTES = 512 << 10;
// Rows of a task; fewer if y has fewer.
constexpr int64_t ROWS = 4096;
// Rows between the row that is computed and the row of `start` that is fetched.
constexpr int64_t AHEAD = 8;

// y = start + sums, for one row of a strip. `start` may be null (0), or y. scratch: [strip width].
template <class Level, int VECTORS, class Y, class C, class V>
MOELORA_INLINE void write_row(const V* sums, int64_t columns, const Y* start, C* scratch, Y* y) {
  constexpr int BYTES = Level{}();
  constexpr int64_t LANES = Vector<C, BYTES>::LANES;
  constexpr bool is_one_step =
      std::is_same_v<Y, C> || (std::is_same_v<Y, BFloat16> && Level::bf16_pairs);
  if constexpr (is_one_step) {
    if (columns == VECTORS * LANES) {
      for (int v = 0; v < VECTORS; ++v) {
        V row = sums[v];
        if (start != nullptr) row += load_widened<Y, C, BYTES>(start + v * LANES);
        store_rounded<Y, C, BYTES>(y + v * LANES, row);
      }
      return;
    }
  }
  for (int v = 0; v < VECTORS; ++v) store<C, BYTES>(scratch + v * LANES, sums[v]);
  if (start == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) y[j] = narrow<Y>(scratch[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) y[j] = narrow<Y>(scratch[j] + C(widen(start[j])));
  }
}

// The row of `start` that each row of y begins with.
template <class Y>
struct Start {
  const Y* data;
  int64_t stride;
  // Rows of y that share a row of start: S with a row of y per pair, else 1.
  int64_t y_rows_per_row;

  MOELORA_INLINE const Y* row(int64_t index) const {
    return data == nullptr ? nullptr : data + index / y_rows_per_row * stride;
  }
};

// Computes one task: the rows [begin, end) of a strip of VECTORS vectors. `buffer` has STRIP
// numbers, then the packed strip.
template <class Level, int VECTORS, class S, class C, class Y>
MOELORA_INLINE void strip_kernel(const Expand<S, C>& expand, const Term* terms,
                                 const typename Operand<S, Level::bf16_pairs>::Unit* u_units,
                                 int64_t strip, int64_t begin, int64_t end, const Start<Y>& start,
                                 Y* y, C* buffer) {
  using P = Operand<S, Level::bf16_pairs>;
  constexpr int64_t WIDTH = VECTORS * Vector<C, Level{}()>::LANES;
  const int64_t columns = std::min(WIDTH, expand.O - strip);
  auto* packed = reinterpret_cast<typename P::Unit*>(buffer + STRIP);
  expand.template pack_strip<P>(strip, columns, WIDTH, packed);
  for (int64_t row = begin; row < end; ++row) {
    // A strip is a short piece of each row, which the prefetcher does not predict.
    if (start.data != nullptr && row + AHEAD < end) {
      const Y* next_row = start.row(row + AHEAD) + strip;
      for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(Y))) {
        __builtin_prefetch(next_row + j);
      }
    }
    typename Vector<C, Level{}()>::type sums[VECTORS];
    expand.template sum_row<Level, VECTORS>(row, strip, columns, packed, terms, u_units, buffer,
                                            sums);
    const Y* start_row = start.row(row);
    write_row<Level, VECTORS, Y, C>(sums, columns,
                                    start_row == nullptr ? nullptr : start_row + strip, buffer,
                                    y + row * expand.O + strip);
  }
}

// Computes y [rows, O].
template <class Level, class S, class C, class Y>
void run(const Expand<S, C>& expand, int64_t rows, const Start<Y>& start, Y* y) {
  using P = Operand<S, Level::bf16_pairs>;
  constexpr int64_t LANES = Vector<C, Level{}()>::LANES;
  constexpr int MAX_VECTORS = int(STRIP / LANES) > 4 ? 4 : int(STRIP / LANES);
  std::vector<typename P::Unit> u_units(expand.routing.num_pairs() * expand.units_per_pair());
  const std::vector<Term> terms = expand.template pack_terms<P>(u_units.data());

  // Choose the width of a strip, so that its packed matrices stay in L2.
  const int64_t units = expand.template units_per_column<P>();
  int vectors = MAX_VECTORS;
  while (vectors > 1 && units * vectors * LANES * int64_t(sizeof(C)) > STRIP_BYTES) vectors /= 2;
  const int64_t strips = (expand.O + vectors * LANES - 1) / (vectors * LANES);
  const int64_t row_blocks = (rows + ROWS - 1) / ROWS;
  const int64_t work = vectors * LANES * (std::min(rows, ROWS) * expand.width + units);
  torch::stable::parallel_for(0, strips * row_blocks, grain(work), [&](int64_t begin, int64_t end) {
    std::vector<C> buffer(STRIP + units * vectors * LANES);
    vectorised([&](auto level) {
      if constexpr (std::is_same_v<decltype(level), Level>) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task / strips * ROWS;
          const int64_t last = std::min(rows, first + ROWS);
          const int64_t strip = task % strips * vectors * LANES;
          if (vectors == 4) {
            strip_kernel<Level, 4>(expand, terms.data(), u_units.data(), strip, first, last, start,
                                   y, buffer.data());
          } else if (vectors == 2) {
            strip_kernel<Level, 2>(expand, terms.data(), u_units.data(), strip, first, last, start,
                                   y, buffer.data());
          } else {
            strip_kernel<Level, 1>(expand, terms.data(), u_units.data(), strip, first, last, start,
                                   y, buffer.data());
          }
        }
      }
    });
  });
}

// Computes `grouped_expand`. With in_place_y [T, O] in u's dtype, y is that tensor.
Tensor expand_to(const std::optional<Tensor>& in_place_y, const ExpandArguments& arguments,
                 std::optional<Tensor> start, int64_t tokens, bool per_pair) {
  Tensor u = arguments.u;
  std::vector<Tensor> matrices = arguments.matrices;
  std::optional<Tensor> coefficients = arguments.coefficients;
  std::optional<Tensor> expert_rows = arguments.expert_rows;
  const std::vector<int64_t>& ranks = arguments.ranks;
  const int64_t first_sibling = arguments.first_sibling;

  // Check the arguments.
  check_floating(u, "u");
  const Blocks blocks(ranks);
  const int64_t E = blocks.num_experts();
  const auto num_matrices = int64_t(matrices.size());
  STD_TORCH_CHECK(num_matrices > 0, "matrices: expected a tensor for each sibling, got none");
  const ScalarType dtype = u.scalar_type();
  const Routing routing(arguments.order, arguments.offsets, arguments.offsets.numel() - 1);
  STD_TORCH_CHECK(first_sibling >= 0 && (first_sibling + num_matrices) * E <= routing.num_experts(),
                  "first_sibling: expected matrices of at most ", routing.num_experts() / E,
                  " siblings, got siblings ", first_sibling, " to ",
                  first_sibling + num_matrices - 1);
  STD_TORCH_CHECK(!per_pair || routing.num_experts() == E, "per_pair: expected one sibling, got ",
                  routing.num_experts() / E);
  u = row_major(u);
  const auto [pairs, width] = shape<2>(u, "u");
  check_size(pairs, routing.num_pairs(), "u, pairs");
  check_size(width, *std::max_element(ranks.begin(), ranks.end()), "u, ranks");
  const Mask mask(arguments.dropout_p, arguments.dropout_per_expert, arguments.seed);

  // Either the features of all matrices are dense (A, transposed), or the ranks of all (B).
  bool dense_features = true;
  for (Tensor& matrix : matrices) {
    matrix = cast(matrix, dtype);
    dense_features =
        dense_features && matrix.stride(0) == 1 && matrix.stride(1) == matrices[0].stride(1);
  }
  const int64_t O = matrices[0].size(0);
  for (Tensor& matrix : matrices) {
    if (!dense_features) matrix = row_major(matrix);
    check_size(matrix.size(0), O, "matrices, features");
    check_size(matrix.size(1), blocks.total, "matrices, ranks");
  }

  // y is written in u's dtype or in the compute dtype, and cast to the result's dtype at the end.
  const bool start_per_token = start && start->dim() == 2;
  const ScalarType result_dtype = start_per_token ? start->scalar_type() : dtype;
  const ScalarType y_dtype = result_dtype == dtype ? dtype : compute_dtype(dtype);
  if (start) {
    start = start_per_token ? dense_rows(*start, y_dtype) : row_major(cast(*start, y_dtype));
    check_size(start->size(start->dim() - 1), O, "start, features");
    if (start_per_token) check_size(start->size(0), tokens, "start, tokens");
  }

  const int64_t slots = routing.pairs_per_row(tokens, "tokens");
  const int64_t rows = per_pair ? pairs : tokens;
  if (coefficients) {
    coefficients = row_major(cast(*coefficients, dtype));
    expert_rows = row_major(cast(*expert_rows, dtype));
    check_size(coefficients->numel(), pairs, "coefficients, pairs");
    check_size(expert_rows->size(0), num_matrices * E, "expert_rows, experts");
    check_size(expert_rows->size(1), O, "expert_rows, features");
  }

  // Compute y.
  const Tensor y = in_place_y ? *in_place_y : empty(rows, O, y_dtype);
  for_dtype(dtype, [&, width = width](auto type) {
    using S = typename decltype(type)::type;
    using C = Compute<S>;
    Expand<S, C> expand{.routing = routing,
                        .first_expert = first_sibling * E,
                        .blocks = blocks,
                        .mask = mask,
                        .u = u.const_data_ptr<S>(),
                        .width = width,
                        .matrices = {},
                        .feature_stride = dense_features ? 1 : matrices[0].stride(0),
                        .rank_stride = dense_features ? matrices[0].stride(1) : 1,
                        .pairs_per_row = per_pair ? 1 : slots,
                        .O = O};
    for (const Tensor& matrix : matrices) expand.matrices.push_back(matrix.const_data_ptr<S>());
    if (coefficients) {
      expand.coefficients = coefficients->const_data_ptr<S>();
      expand.expert_rows = expert_rows->const_data_ptr<S>();
    }
    const auto write_y = [&](auto y_type) {
      using Y = typename decltype(y_type)::type;
      const Start<Y> y_start{start ? start->const_data_ptr<Y>() : nullptr,
                             start_per_token ? start->stride(0) : 0, per_pair ? slots : 1};
      vectorised_level([&](auto level) {
        run<decltype(level)>(expand, rows, y_start, y.mutable_data_ptr<Y>());
      });
    };
    if (y_dtype == dtype) {
      write_y(Type<S>{});
    } else {
      write_y(Type<C>{});
    }
  });
  return cast(y, result_dtype);
}

}  // namespace

Tensor grouped_expand(Tensor u, std::vector<Tensor> matrices, std::optional<Tensor> start,
                      Tensor order, Tensor offsets, Tensor /*tiles*/, Tensor /*chunks*/,
                      std::vector<int64_t> ranks, double dropout_p, bool dropout_per_expert,
                      std::optional<Tensor> seed, int64_t tokens, int64_t first_sibling,
                      bool per_pair) {
  const ExpandArguments arguments{.u = u,
                                  .matrices = matrices,
                                  .order = order,
                                  .offsets = offsets,
                                  .ranks = ranks,
                                  .first_sibling = first_sibling,
                                  .dropout_p = dropout_p,
                                  .dropout_per_expert = dropout_per_expert,
                                  .seed = seed};
  return expand_to(std::nullopt, arguments, start, tokens, per_pair);
}

Tensor grouped_dx(Tensor dh, std::optional<Tensor> dlogits, std::vector<Tensor> lora_a,
                  std::vector<Tensor> router_weight, Tensor order, Tensor offsets, Tensor tiles,
                  Tensor chunks, std::vector<int64_t> ranks, double dropout_p,
                  bool dropout_per_expert, std::optional<Tensor> seed, int64_t tokens,
                  bool /*sparse_dlogits*/) {
  for (Tensor& a : lora_a) a = transposed(a);
  const Tensor dx = grouped_expand(dh, lora_a, std::nullopt, order, offsets, tiles, chunks, ranks,
                                   dropout_p, dropout_per_expert, seed, tokens, 0, false);
  if (dlogits) {
    const ScalarType dtype = dh.scalar_type();
    for (Tensor& weight : router_weight) weight = cast(weight, dtype);
    addmm_out(dx, dx, cast(*dlogits, dtype), stacked(router_weight, false));
  }
  return dx;
}

void grouped_expand_in_place(const Tensor& y, const ExpandArguments& arguments) {
  const ScalarType dtype = arguments.u.scalar_type();
  STD_TORCH_CHECK(y.is_contiguous(), "y: expected a contiguous tensor");
  STD_TORCH_CHECK(y.scalar_type() == dtype, "y: expected the dtype of u, ", dtype, ", got ",
                  y.scalar_type());
  expand_to(y, arguments, y, y.size(0), false);
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_dx", TORCH_BOX(&moelora::grouped_dx));
  m.impl("grouped_expand", TORCH_BOX(&moelora::grouped_expand));
}
