// The gradients of A and B: sums over the pairs of each expert, in the order of their places. A
// task is one expert on a strip of columns, and strips come first, so that one expert with all
// tokens still occupies every thread.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dropout.h"
#include "grouped.h"
#include "ops.h"

namespace moelora {
namespace {

// Columns of a strip and places per step: 64 KiB of widened rows, or 32 KiB of pairs. Narrower
// strips read each row in pieces that no prefetcher sees coming.
constexpr int64_t STRIP = 256;
constexpr int64_t STEP = 64;
// Places of one running sum: a longer one would lose bits.
constexpr int64_t LONGEST = 256;

template <class S, class L, class C>
struct WeightGrad {
  const Places& places;
  const Blocks& blocks;
  const Mask& mask;
  int64_t width;

  // The sum over the places of `expert` of coefficients^T rows, columns from `strip` on:
  // sums [w, STRIP] with ranks first, else [STRIP, w], w the padded rank.
  template <class Level, bool RANKS_FIRST>
  MOELORA_INLINE void sum(int64_t expert, const Rows<S>& matrix, int64_t features, int64_t strip,
                          const S* coefficients, C* sums, C* buffer, S* kept) const {
    using P = Operand<S, Level::pairs>;
    using Unit = typename P::Unit;
    constexpr int BYTES = Level{}();
    const int64_t e = expert % blocks.experts();
    const int64_t rank = blocks.ranks[e];
    const int64_t w = padded(rank);
    const int64_t columns = std::min(STRIP, features - strip);
    C* scratch = buffer;
    auto* of_rows = reinterpret_cast<Unit*>(buffer + STRIP);
    Unit* of_ranks = of_rows + STEP * STRIP;
    const bool in_parts = places.last(expert) - places.first(expert) > LONGEST;
    C* part = in_parts ? buffer + STRIP + STEP * (STRIP + w) : sums;
    std::fill_n(sums, w * STRIP, C{0});
    if (in_parts) std::fill_n(part, w * STRIP, C{0});
    const auto read = [&](int64_t place, S* to) MOELORA_INLINE_LAMBDA {
      const int64_t row = matrix.of_place[place];
      const S* from = matrix.row(row) + strip;
      if constexpr (!RANKS_FIRST) return from;
      return dropped(mask, from, row * features + strip, columns, e, scratch, to);
    };
    for (int64_t first = places.first(expert); first < places.last(expert); first += STEP) {
      const int64_t count = std::min(STEP, places.last(expert) - first);
      // Places go on with the next expert, which is the next task.
      const int64_t ahead = std::min(STEP, places.routed() - first - count);
      for (int64_t k = 0; k < ahead; ++k) {
        const S* next = matrix.row(matrix.of_place[first + count + k]) + strip;
        for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(S))) __builtin_prefetch(next + j);
      }
      for (int64_t k = 0; k < count; k += P::PER) {
        const bool second = P::PER > 1 && k + 1 < count;
        const int64_t place = first + k;
        P::across(read(place, kept), second ? read(place + 1, kept + STRIP) : nullptr, columns,
                  of_rows + k / P::PER * STRIP);
        const S* of_place = coefficients + place * width;
        P::across(of_place, second ? of_place + width : nullptr, rank, of_ranks + k / P::PER * w);
      }
      const int64_t steps = P::units(count);
      if (RANKS_FIRST) {
        panel<BYTES>(w, STRIP, Factors<Unit>{of_ranks, 1, w}, of_rows, STRIP, steps, part, STRIP);
      } else {
        panel<BYTES>(STRIP, w, Factors<Unit>{of_rows, 1, STRIP}, of_ranks, w, steps, part, w);
      }
      const int64_t next = first + STEP;
      const bool full = (next - places.first(expert)) % LONGEST == 0;
      if (!in_parts || (next < places.last(expert) && !full)) continue;
#pragma omp simd
      for (int64_t j = 0; j < w * STRIP; ++j) {
        sums[j] += part[j];
        part[j] = 0;
      }
    }
  }

  // dA_e [rank, I], rows from `begin` on of da [n R, I].
  template <class Level>
  MOELORA_INLINE void of_a(int64_t expert, const Rows<S>& x, int64_t I, int64_t strip, const S* dh,
                           C* sums, C* buffer, S* kept, L* da) const {
    sum<Level, true>(expert, x, I, strip, dh, sums, buffer, kept);
    const int64_t e = expert % blocks.experts();
    const int64_t begin = expert / blocks.experts() * blocks.total + blocks.begin[e];
    const int64_t columns = std::min(STRIP, I - strip);
    for (int64_t j = 0; j < blocks.ranks[e]; ++j) {
      L* to = da + (begin + j) * I + strip;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) to[k] = narrow<L>(sums[j * STRIP + k]);
    }
  }

  // dB_e [O, rank], columns of db [O, R].
  template <class Level>
  MOELORA_INLINE void of_b(int64_t expert, const Rows<S>& dy, int64_t O, int64_t strip, const S* u,
                           C* sums, C* buffer, S* kept, L* db) const {
    sum<Level, false>(expert, dy, O, strip, u, sums, buffer, kept);
    const int64_t e = expert % blocks.experts();
    const int64_t w = padded(blocks.ranks[e]);
    for (int64_t o = strip; o < std::min(strip + STRIP, O); ++o) {
      L* to = db + o * blocks.total + blocks.begin[e];
      const C* from = sums + (o - strip) * w;
#pragma omp simd
      for (int64_t j = 0; j < blocks.ranks[e]; ++j) to[j] = narrow<L>(from[j]);
    }
  }
};

int64_t strips_of(int64_t features) { return (features + STRIP - 1) / STRIP; }

template <class S, class L>
void run(const Places& places, const Blocks& blocks, const Mask& mask, const Tensor& x,
         const Tensor& dh, const std::vector<Tensor>& dy, const Tensor& u, const Tensor& da,
         const std::vector<Tensor>& db) {
  using C = Compute<S>;
  const int64_t width = u.size(1);
  const WeightGrad<S, L, C> weight_grad{places, blocks, mask, width};
  const int64_t w = padded(width);
  const int64_t work = places.pairs() * w * STRIP / std::max<int64_t>(places.experts(), 1);
  const auto tasks = [&](int64_t strips, int64_t experts, const auto& task) {
    torch::stable::parallel_for(0, strips * experts, grain(work), [&](int64_t begin, int64_t end) {
      std::vector<C> buffer((2 * w + 1) * STRIP + STEP * (STRIP + w));
      std::vector<S> kept(mask.active() ? 2 * STRIP : 0);
      vectorised([&](auto level) {
        for (int64_t n = begin; n < end; ++n) {
          task(level, n % experts, n / experts * STRIP, buffer.data(), buffer.data() + w * STRIP,
               kept.data());
        }
      });
    });
  };
  const int64_t I = x.size(1);
  const std::vector<int32_t> row_of_x = places.rows_of(x, "x");
  const std::vector<int32_t> row_of_dy = places.rows_of(dy[0], "dy");
  const Rows<S> of_x{x.const_data_ptr<S>(), I, row_of_x.data()};
  const S* of_dh = dh.const_data_ptr<S>();
  L* to_a = da.mutable_data_ptr<L>();
  tasks(strips_of(I), places.experts(),
        [&](auto level, int64_t expert, int64_t strip, C* sums, C* rest, S* kept)
            MOELORA_INLINE_LAMBDA {
              weight_grad.template of_a<decltype(level)>(expert, of_x, I, strip, of_dh, sums, rest,
                                                         kept, to_a);
            });
  const S* of_u = u.const_data_ptr<S>();
  const int64_t E = blocks.experts();
  for (size_t i = 0; i < dy.size(); ++i) {
    const Rows<S> of_dy{dy[i].const_data_ptr<S>(), dy[i].stride(0), row_of_dy.data()};
    const int64_t O = dy[i].size(1);
    L* to_b = db[i].mutable_data_ptr<L>();
    tasks(strips_of(O), E,
          [&](auto level, int64_t e, int64_t strip, C* sums, C* rest, S* kept)
              MOELORA_INLINE_LAMBDA {
                weight_grad.template of_b<decltype(level)>(int64_t(i) * E + e, of_dy, O, strip,
                                                           of_u, sums, rest, kept, to_b);
              });
  }
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> grouped_weight_grad(
    Tensor x, Tensor dh, std::vector<Tensor> dy, Tensor u, Tensor order, Tensor offsets,
    Tensor /*tiles*/, Tensor /*chunks*/, std::vector<int64_t> ranks, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, ScalarType lora_dtype) {
  check_floating(x, "x");
  const auto [rows, I] = shape<2>(x, "x");
  const Blocks blocks(ranks);
  const auto siblings = int64_t(dy.size());
  STD_TORCH_CHECK(siblings > 0, "dy: expected one per sibling, got none");
  const ScalarType dtype = x.scalar_type();
  const Places places(order, offsets, siblings * blocks.experts());
  const Mask mask(dropout_p, dropout_per_expert, seed);
  const int64_t width = *std::max_element(ranks.begin(), ranks.end());
  x = row_major(x);
  dh = row_major(cast(dh, dtype));
  u = row_major(cast(u, dtype));
  for (const Tensor& of_ranks : {dh, u}) {
    check_size(of_ranks.size(0), places.pairs(), "dh, u, pairs");
    check_size(of_ranks.size(1), width, "dh, u, ranks");
  }
  // float64, or the dtype of x, or float32: what adapters may have.
  const ScalarType direct = lora_dtype == dtype ? dtype : compute_dtype(dtype);
  const Tensor da = empty(siblings * blocks.total, I, direct);
  std::vector<Tensor> db;
  for (Tensor& g : dy) {
    check_size(g.size(0), dy[0].size(0), "dy, rows");
    g = dense_rows(g, dtype);
    db.push_back(empty(g.size(1), blocks.total, direct));
  }
  for_dtype(dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    if (direct == dtype) {
      run<S, S>(places, blocks, mask, x, dh, dy, u, da, db);
    } else {
      run<S, Compute<S>>(places, blocks, mask, x, dh, dy, u, da, db);
    }
  });
  for (Tensor& of_sibling : db) of_sibling = cast(of_sibling, lora_dtype);
  return {cast(da, lora_dtype), db};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) {
  m.impl("grouped_weight_grad", TORCH_BOX(&moelora::grouped_weight_grad));
}
