// The op `grouped_weight_grad`, with sums over the pairs p of expert e in the order of positions:
//     dA_e = sum_p dh_p^T dropout(x_p)        dB_e = sum_p dy_p^T u_p
// Threads split the tasks. A task is one expert on one strip of columns, so an expert that has all
// tokens still occupies every thread.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Columns of a strip, and positions of a step: 64 KiB of widened rows, or 32 KiB of bfloat16 pairs.
// Narrower strips read short pieces of each row, which the prefetcher does not predict.
constexpr int64_t STRIP = 256;
constexpr int64_t STEP = 64;
// Positions of a partial sum: a longer sum would lose bits.
constexpr int64_t MAX_TERMS = 256;

// The gradient of one expert on one strip. L is the dtype of the gradients.
template <class S, class L, class C>
struct WeightGrad {
  const Routing& routing;
  const Blocks& blocks;
  const Mask& mask;
  int64_t width;  // the largest rank

  // Computes sum_p coefficients_p^T rows_p of an expert, for the columns from `strip` on. `matrix`
  // holds the rows, coefficients [P, width] are dh or u, and w is the padded rank. With RANKS_FIRST
  // (dA), sums is [w, STRIP] and dropout applies to the rows; else (dB) sums is [STRIP, w].
  template <class Level, bool RANKS_FIRST>
  MOELORA_INLINE void sum(int64_t expert, const Rows<S>& matrix, int64_t features, int64_t strip,
                          const S* coefficients, C* sums, C* buffer, S* dropped_rows) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Unit = typename P::Unit;
    constexpr int BYTES = Level{}();
    const int64_t e = expert % blocks.num_experts();
    const int64_t rank = blocks.ranks[e];
    const int64_t w = padded(rank);
    const int64_t columns = std::min(STRIP, features - strip);

    // Divide the buffer: scratch [STRIP], row_units [STEP, STRIP], rank_units [STEP, w], and a
    // partial sum if there are more than MAX_TERMS positions.
    C* scratch = buffer;
    auto* row_units = reinterpret_cast<Unit*>(buffer + STRIP);
    Unit* rank_units = row_units + STEP * STRIP;
    const bool has_partials = routing.end(expert) - routing.begin(expert) > MAX_TERMS;
    C* partial = has_partials ? buffer + STRIP + STEP * (STRIP + w) : sums;
    std::fill_n(sums, w * STRIP, C{0});
    if (routing.begin(expert) == routing.end(expert)) return;
    if (has_partials) std::fill_n(partial, w * STRIP, C{0});

    // Returns the columns of a position's row, after dropout.
    const auto read_row = [&](int64_t position, S* dropped_row) MOELORA_INLINE_LAMBDA {
      const int64_t row = matrix.row_of_position[position];
      const S* columns_of_row = matrix.row(row) + strip;
      if constexpr (!RANKS_FIRST) return columns_of_row;
      return drop_row(mask, columns_of_row, row, strip, features, columns, e, scratch, dropped_row);
    };

    for (int64_t first = routing.begin(expert); first < routing.end(expert); first += STEP) {
      const int64_t count = std::min(STEP, routing.end(expert) - first);
      // Fetch the rows of the next step. After the last step these are rows of the next expert,
      // which is the next task.
      const int64_t ahead = std::min(STEP, routing.num_routed() - first - count);
      for (int64_t k = 0; k < ahead; ++k) {
        const S* next_row = matrix.row(matrix.row_of_position[first + count + k]) + strip;
        for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(S))) {
          __builtin_prefetch(next_row + j, 0, 2);
        }
      }

      // Pack the rows and the coefficients.
      for (int64_t k = 0; k < count; k += P::PER_UNIT) {
        const bool has_second = P::PER_UNIT > 1 && k + 1 < count;
        const int64_t position = first + k;
        P::interleave(read_row(position, dropped_rows),
                      has_second ? read_row(position + 1, dropped_rows + STRIP) : nullptr, columns,
                      row_units + k / P::PER_UNIT * STRIP);
        const S* coefficient_row = coefficients + position * width;
        P::interleave(coefficient_row, has_second ? coefficient_row + width : nullptr, rank,
                      rank_units + k / P::PER_UNIT * w);
      }

      // Multiply them.
      const int64_t steps = P::units(count);
      if (RANKS_FIRST) {
        panel<BYTES>(w, STRIP, Factors<Unit>{rank_units, 1, w}, row_units, STRIP, steps, partial,
                     STRIP);
      } else {
        panel<BYTES>(STRIP, w, Factors<Unit>{row_units, 1, STRIP}, rank_units, w, steps, partial,
                     w);
      }

      // Add the partial sum to the sums if it is full, or if this is the last step.
      const int64_t next = first + STEP;
      const bool is_full = (next - routing.begin(expert)) % MAX_TERMS == 0;
      if (!has_partials || (next < routing.end(expert) && !is_full)) continue;
#pragma omp simd
      for (int64_t j = 0; j < w * STRIP; ++j) {
        sums[j] += partial[j];
        partial[j] = 0;
      }
    }
  }

  // Writes dA_e [rank, columns of the strip] to its rows of da [n R, I].
  template <class Level>
  MOELORA_INLINE void compute_da(int64_t expert, const Rows<S>& x, int64_t I, int64_t strip,
                                 const S* dh, C* sums, C* buffer, S* dropped_rows, L* da) const {
    sum<Level, true>(expert, x, I, strip, dh, sums, buffer, dropped_rows);
    const int64_t e = expert % blocks.num_experts();
    const int64_t begin = expert / blocks.num_experts() * blocks.total + blocks.begin[e];
    const int64_t columns = std::min(STRIP, I - strip);
    for (int64_t j = 0; j < blocks.ranks[e]; ++j) {
      L* da_row = da + (begin + j) * I + strip;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) da_row[k] = narrow<L>(sums[j * STRIP + k]);
    }
  }

  // Writes dB_e [rows of the strip, rank] to its columns of db [O, R].
  template <class Level>
  MOELORA_INLINE void compute_db(int64_t expert, const Rows<S>& dy, int64_t O, int64_t strip,
                                 const S* u, C* sums, C* buffer, S* dropped_rows, L* db) const {
    sum<Level, false>(expert, dy, O, strip, u, sums, buffer, dropped_rows);
    const int64_t e = expert % blocks.num_experts();
    const int64_t w = padded(blocks.ranks[e]);
    for (int64_t o = strip; o < std::min(strip + STRIP, O); ++o) {
      L* db_row = db + o * blocks.total + blocks.begin[e];
      const C* sums_row = sums + (o - strip) * w;
#pragma omp simd
      for (int64_t j = 0; j < blocks.ranks[e]; ++j) db_row[j] = narrow<L>(sums_row[j]);
    }
  }
};

int64_t num_strips(int64_t features) { return (features + STRIP - 1) / STRIP; }

// Computes da [n R, I] and db n x [O_i, R], both in L.
template <class S, class L>
void run(const Routing& routing, const Blocks& blocks, const Mask& mask, const Tensor& x,
         const Tensor& dh, const std::vector<Tensor>& dy, const Tensor& u, const Tensor& da,
         const std::vector<Tensor>& db) {
  using C = Compute<S>;
  const int64_t width = u.size(1);
  const WeightGrad<S, L, C> weight_grad{routing, blocks, mask, width};
  const int64_t w = padded(width);
  const int64_t work =
      routing.num_pairs() * w * STRIP / std::max<int64_t>(routing.num_experts(), 1);

  // Calls task(level, expert, strip, sums, buffer, dropped_rows) for every expert of every strip.
  const auto for_tasks = [&](int64_t strips, int64_t num_experts, const auto& task) {
    torch::stable::parallel_for(
        0, strips * num_experts, grain(work), [&](int64_t begin, int64_t end) {
          std::vector<C> buffer((2 * w + 1) * STRIP + STEP * (STRIP + w));
          std::vector<S> dropped_rows(mask.active() ? 2 * STRIP : 0);
          vectorised([&](auto level) {
            for (int64_t n = begin; n < end; ++n) {
              task(level, n % num_experts, n / num_experts * STRIP, buffer.data(),
                   buffer.data() + w * STRIP, dropped_rows.data());
            }
          });
        });
  };

  // dA of all experts.
  const int64_t I = x.size(1);
  const std::vector<int32_t> x_row_of_position = routing.rows_of_positions(x, "x");
  const std::vector<int32_t> dy_row_of_position = routing.rows_of_positions(dy[0], "dy");
  const Rows<S> x_rows{x.const_data_ptr<S>(), I, x_row_of_position.data()};
  const S* dh_data = dh.const_data_ptr<S>();
  L* da_data = da.mutable_data_ptr<L>();
  for_tasks(num_strips(I), routing.num_experts(),
            [&](auto level, int64_t expert, int64_t strip, C* sums, C* buffer, S* dropped_rows)
                MOELORA_INLINE_LAMBDA {
                  weight_grad.template compute_da<decltype(level)>(
                      expert, x_rows, I, strip, dh_data, sums, buffer, dropped_rows, da_data);
                });

  // dB of each sibling's experts.
  const S* u_data = u.const_data_ptr<S>();
  const int64_t E = blocks.num_experts();
  for (size_t i = 0; i < dy.size(); ++i) {
    const Rows<S> dy_rows{dy[i].const_data_ptr<S>(), dy[i].stride(0), dy_row_of_position.data()};
    const int64_t O = dy[i].size(1);
    L* db_data = db[i].mutable_data_ptr<L>();
    for_tasks(num_strips(O), E,
              [&](auto level, int64_t e, int64_t strip, C* sums, C* buffer, S* dropped_rows)
                  MOELORA_INLINE_LAMBDA {
                    weight_grad.template compute_db<decltype(level)>(int64_t(i) * E + e, dy_rows, O,
                                                                     strip, u_data, sums, buffer,
                                                                     dropped_rows, db_data);
                  });
  }
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> grouped_weight_grad(
    Tensor x, Tensor dh, std::vector<Tensor> dy, Tensor u, Tensor order, Tensor offsets,
    Tensor /*tiles*/, Tensor /*chunks*/, std::vector<int64_t> ranks, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, ScalarType lora_dtype) {
  check_floating(x, "x");
  const auto [x_rows, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(dy.size());
  STD_TORCH_CHECK(siblings > 0, "dy: expected a tensor for each sibling, got none");
  const ScalarType dtype = x.scalar_type();
  const Routing routing(order, offsets, siblings * blocks.num_experts());
  const Mask mask(dropout_p, dropout_per_expert, seed);
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  x = row_major(x);
  dh = row_major(cast(dh, dtype));
  u = row_major(cast(u, dtype));
  for (const Tensor& coefficients : {dh, u}) {
    check_size(coefficients.size(0), routing.num_pairs(), "dh, u, pairs");
    check_size(coefficients.size(1), width, "dh, u, ranks");
  }
  // The kernels write x's dtype or the compute dtype. Any other dtype is cast at the end.
  const ScalarType grad_dtype = lora_dtype == dtype ? dtype : compute_dtype(dtype);
  const Tensor da = empty(siblings * blocks.total, I, grad_dtype);
  std::vector<Tensor> db;
  for (Tensor& dy_i : dy) {
    check_size(dy_i.size(0), dy[0].size(0), "dy, rows");
    dy_i = dense_rows(dy_i, dtype);
    db.push_back(empty(dy_i.size(1), blocks.total, grad_dtype));
  }
  for_dtype(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    if (grad_dtype == dtype) {
      run<S, S>(routing, blocks, mask, x, dh, dy, u, da, db);
    } else {
      run<S, Compute<S>>(routing, blocks, mask, x, dh, dy, u, da, db);
    }
  });
  for (Tensor& db_i : db) db_i = cast(db_i, lora_dtype);
  return {cast(da, lora_dtype), db};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_weight_grad", TORCH_BOX(&moelora::grouped_weight_grad));
}
