// The op `ffn_inner`: whole-FFN experts between their frozen products, without a tensor of [P, F].
//     z = gate_out_t + u_gate Bgt        a = act(z) (up_out_t + u_up But)
//     summed_t = sum_k w_tk a_tk         h = dropout(a) Adt        u = scale w h
// ffn_inner.h describes how threads and steps split the work.
#include "ffn_inner.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops.h"

namespace moelora {
namespace {

template <class S, class C>
struct InnerForward {
  const Inner<S, C>& inner;
  const Tensor& summed;
  C* h_sums;  // [ranges, num_routed, padded(width)]

  // Scratch space of a thread, in numbers of C.
  int64_t scratch_size(const Ranges& ranges) const {
    return 3 * inner.ranks * STRIP * ranges.size() + inner.token_blocks.size() * STRIP +
           4 * CHUNK * STRIP + CHUNK * (inner.tensors.width + padded(inner.tensors.width));
  }

  // Computes a of a chunk from gate = u_gate Bgt and up = u_up But [CHUNK, STRIP]. Adds w a to the
  // rows of `sums`, and writes dropout(a) to `values`.
  template <class Level, class V>
  MOELORA_INLINE void activate_chunk(const Chunk& chunk, int64_t strip, int64_t first_token,
                                     C* gate, const C* up, C* sums, V* values) const {
    constexpr int BYTES = Level{}();
    constexpr int64_t LANES = Vector<C, BYTES>::LANES;
    using Numbers = typename Vector<C, BYTES>::type;
    const InnerTensors& t = inner.tensors;
    alignas(64) S copies[2][STRIP];
    for (int64_t n = 0; n < chunk.size(); ++n) {
      const int64_t pair = inner.pair(chunk.begin + n), token = pair / t.K;
      const S* gate_out = inner.row(t.gate_out, token, strip, copies[0]);
      const S* up_out = inner.row(t.up_out, token, strip, copies[1]);
      C* a = gate + n * STRIP;
      const C* up_row = up + n * STRIP;
      for_activation(inner.activation, [&](auto activation) MOELORA_INLINE_LAMBDA {
        for (int64_t j = 0; j < STRIP; j += LANES) {
          const Numbers z = load_widened<S, C, BYTES>(gate_out + j) + load<C, BYTES>(a + j);
          const Numbers z_up = load_widened<S, C, BYTES>(up_out + j) + load<C, BYTES>(up_row + j);
          store<C, BYTES>(a + j, activate<activation()>(z).value * z_up);
        }
      });
      const C weight = inner.weights[pair];
      if (weight != 0) {
        C* sum = sums + (token - first_token) * STRIP;
#pragma omp simd
        for (int64_t j = 0; j < STRIP; ++j) sum[j] += weight * a[j];
      }
      if (inner.mask.active()) {
        inner.mask.apply(a, pair, strip * STRIP, t.F, inner.columns(strip), chunk.expert);
      }
      for (int64_t j = 0; j < STRIP; j += LANES) {
        store_rounded<V, C, BYTES>(values + n * STRIP + j, load<C, BYTES>(a + j));
      }
    }
  }

  template <class Level>
  MOELORA_INLINE void run_range(int64_t range, const Ranges& ranges, C* scratch) const {
    using P = Operand<S, Level::bf16_pairs>;
    using Unit = typename P::Unit;
    using V = typename Inner<S, C>::template Value<P>;
    const InnerTensors& t = inner.tensors;
    const TokenBlocks& blocks = inner.token_blocks;
    const int64_t w = padded(t.width);
    const Tensor* const us[] = {&t.u_gate, &t.u_up};
    // B of gate and up, and Ad, of a strip; the strips of the range follow each other.
    const int64_t matrix = inner.ranks * STRIP;
    auto* packed = reinterpret_cast<Unit*>(scratch);
    Unit* u_units = packed + 3 * matrix * ranges.size();
    C* product = reinterpret_cast<C*>(u_units + CHUNK * t.width);
    C* gate = product + CHUNK * w;  // and up
    C* partial = gate + 2 * CHUNK * STRIP;
    auto* values = reinterpret_cast<V*>(partial + CHUNK * STRIP);
    C* sums = partial + 2 * CHUNK * STRIP;
    C* range_sums = h_sums + range * blocks.num_routed() * w;

    const int64_t first_strip = ranges.first_strip(range);
    const int64_t end_strip = ranges.first_strip(range + 1);
    for (int64_t strip = first_strip; strip < end_strip; ++strip) {
      Unit* packed_strip = packed + (strip - first_strip) * 3 * matrix;
      for (int64_t i = 0; i < 2; ++i) {
        inner.template pack_expand<P, Level{}()>(i == 0 ? t.gate_b : t.up_b, strip,
                                                 packed_strip + i * matrix);
      }
      for (int64_t e = 0; e < inner.blocks.num_experts(); ++e) {
        if (!inner.has_pairs(e)) continue;
        const S* a = t.down_a.template const_data_ptr<S>() + inner.blocks.begin[e] * t.F;
        inner.template pack_columns<P, Level{}()>(
            a + strip * STRIP, t.F, inner.blocks.ranks[e], inner.columns(strip),
            padded(inner.blocks.ranks[e]), packed_strip + 2 * matrix + inner.begin[e] * STRIP);
      }
    }
    for (int64_t block = 0; block < blocks.count(); ++block) {
      for (int64_t strip = first_strip; strip < end_strip; ++strip) {
        const Unit* packed_strip = packed + (strip - first_strip) * 3 * matrix;
        // Fetch the strip after this one.
        const bool is_last = strip + 1 == end_strip;
        const int64_t next_block = is_last ? block + 1 : block;
        if (next_block < blocks.count()) {
          for (const Tensor* rows : {&t.gate_out, &t.up_out}) {
            inner.prefetch(*rows, next_block, is_last ? first_strip : strip + 1);
          }
        }
        std::fill_n(sums, blocks.size() * STRIP, C{0});
        for (int64_t c = blocks.first_chunk(block); c < blocks.first_chunk(block + 1); ++c) {
          const Chunk& chunk = blocks.chunks()[c];
          // One call for both, because every call is inlined.
          for (int64_t i = 0; i < 2; ++i) {
            inner.template expand<Level>(chunk, *us[i], packed_strip + i * matrix,
                                         gate + i * CHUNK * STRIP, u_units, partial);
          }
          activate_chunk<Level>(chunk, strip, blocks.first_token(block), gate, gate + CHUNK * STRIP,
                                sums, values);
          inner.template shrink<Level>(chunk, strip, strip == first_strip, values,
                                       packed_strip + 2 * matrix, product, range_sums);
        }
        inner.template write_block<Level>(sums, block, strip, summed);
      }
    }
  }
};

template <class S>
void run(const InnerTensors& tensors, const Routing& routing, const Blocks& blocks,
         const std::vector<double>& scaling, const Mask& mask, Activation activation,
         const Tensor& summed, const Tensor& h, const Tensor& u) {
  using C = Compute<S>;
  const TokenBlocks token_blocks(routing, tensors.T, tensors.K);
  const PairWeights<C> weights(tensors.weights, routing, compute_dtype(tensors.dtype));
  const Inner<S, C> inner(tensors, routing, token_blocks, blocks, weights, mask, activation);
  const int64_t width = tensors.width, w = padded(width);
  const Ranges ranges(tensors.F, w);
  const Tensor h_sums =
      empty(ranges.count * token_blocks.num_routed(), w, compute_dtype(tensors.dtype));
  const InnerForward<S, C> forward{inner, summed, h_sums.mutable_data_ptr<C>()};
  const int64_t work =
      (tensors.T * tensors.K + tensors.R) * (3 * width + 32) * tensors.F / ranges.count;
  torch::stable::parallel_for(0, ranges.count, grain(work), [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialised<C>(forward.scratch_size(ranges));
    vectorised([&](auto level) {
      for (int64_t range = begin; range < end; ++range) {
        forward.template run_range<decltype(level)>(range, ranges, scratch.get());
      }
    });
  });

  // Add the ranges, round to h, and gate.
  const std::vector<C> scales = to_compute<C>(scaling);
  S* h_data = h.mutable_data_ptr<S>();
  S* u_data = u.mutable_data_ptr<S>();
  inner.add_ranges(h_sums, ranges.count, [&](int64_t e, int64_t position, const C* sum) {
    const C scale = scales[e] * weights[routing.pair(position)];
    S* h_row = h_data + position * width;
    S* u_row = u_data + position * width;
    for (int64_t j = 0; j < width; ++j) {
      h_row[j] = narrow<S>(j < blocks.ranks[e] ? sum[j] : C{0});
      u_row[j] = narrow<S>(scale == 0 ? C{0} : scale * C(widen(h_row[j])));
    }
  });
  clear_rows<S>(h, routing.num_routed());
  clear_rows<S>(u, routing.num_routed());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ffn_inner(
    Tensor gate_out, Tensor up_out, Tensor u_gate, Tensor u_up, Tensor gate_b, Tensor up_b,
    Tensor down_a, Tensor weights, Tensor order, Tensor offsets, Tensor /*tiles*/,
    Tensor /*chunks*/, std::vector<int64_t> ranks, std::vector<double> scaling, double dropout_p,
    bool dropout_per_expert, std::optional<Tensor> seed, std::string activation) {
  const Blocks blocks(ranks);
  check_size(int64_t(scaling.size()), blocks.num_experts(), "scaling");
  const InnerTensors tensors(gate_out, up_out, u_gate, u_up, gate_b, up_b, down_a, weights, blocks);
  const Routing routing(order, offsets, blocks.num_experts());
  check_size(routing.num_pairs(), tensors.T * tensors.K, "order");
  const Mask mask(dropout_p, dropout_per_expert, seed);
  const Tensor summed = empty(tensors.T, tensors.F, tensors.dtype);
  const Tensor h = empty(routing.num_pairs(), tensors.width, tensors.dtype);
  const Tensor u = empty(routing.num_pairs(), tensors.width, tensors.dtype);
  for_dtype(tensors.dtype, [&](auto type) {
    run<typename decltype(type)::type>(tensors, routing, blocks, scaling, mask,
                                       activation_named(activation), summed, h, u);
  });
  return {summed, h, u};
}

}  // namespace moelora

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, m) { m.impl("ffn_inner", TORCH_BOX(&moelora::ffn_inner)); }
